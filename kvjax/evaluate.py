"""Score methods at equal bytes: tasks x methods x budgets, one JSON line per sample; `report DIR` draws the result.

A run that was killed goes on where it stopped when it is started again with the same --out.
"""

import argparse
from pathlib import Path
from typing import get_args

from kvjax import compilation
from kvjax.cli import command
from kvjax.cli.flags import add_number_flags
from kvjax.errors import InputError
from kvjax.evaluation.grid import BATCH_TOKENS, build_grid, split
from kvjax.files.text import read_prose
from kvjax.methods import read_entry
from kvjax.tasks.registry import TASKS, make_task
from kvjax.tasks.task import Form

PROG = "kvjax.evaluate"
MOST = 10_000  # samples of a part


def parser() -> command.Parser:
    """The command line's flags."""
    p = command.Parser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--model", metavar="M", help="Hugging Face directory, GGUF file, hub id or Orbax directory (default: demo)"
    )
    p.add_argument(
        "--reference",
        metavar="M",
        help="model that kl compares with: what --model was made from, or --model without its --weights (default: it)",
    )
    p.add_argument("--tasks", metavar="T,...", help=f"of {', '.join(TASKS)}")
    p.add_argument(
        "--methods", metavar="M,...", help="names such as h2o or mikv+low_store=int4 (default: all, or --config's)"
    )
    p.add_argument(
        "--config", type=Path, action="append", default=[], metavar="FILE.toml",
        help="a method with its budget, as kvjax.generate reads it; repeatable; flags take precedence",
    )  # fmt: skip
    p.add_argument(
        "--budgets", metavar="B,...", help="such as 10%%,20%%,512 (default: each method's own, or its config's)"
    )
    p.add_argument(
        "--samples", type=int, default=50, metavar="N", help="contexts per task and length or data set (default: 50)"
    )
    p.add_argument("--out", type=Path, metavar="DIR", help="where results go; an earlier run's folder continues it")
    p.add_argument("--lengths", metavar="N,...", help="of prompt and answer together [tokens] (default: by --form)")
    p.add_argument("--form", choices=get_args(Form), help="of the prompts: short is what the demo model is trained on")
    p.add_argument(
        "--question", choices=("seen", "unseen"), default="seen",
        help="unseen: the context is compressed, once, before its questions are read (default: seen)",
    )  # fmt: skip
    command.add_store_flags(p)
    p.add_argument("--set", action="append", default=[], metavar="NAME.KEY=VALUE", help="a task's or method's argument")
    p.add_argument("--data", type=Path, metavar="DIR", help="folder of the official files of longbench and gsm8k")
    p.add_argument("--text", type=Path, metavar="FILE", help="for haystacks and perplexity (default: shipped)")
    p.add_argument("--no-chat", action="store_true", help="do not wrap prompts in the checkpoint's chat template")
    p.add_argument("--batch", type=int, metavar="N", help=f"prompts at once (default: {BATCH_TOKENS} tokens)")
    p.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    add_number_flags(p)
    command.add_mesh_flag(p)
    command.add_ignore_flag(p)
    p.add_argument("--list-tasks", action="store_true", help="show all tasks and their arguments")
    return p


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    argv = command.given(argv)
    if argv[:1] == ["report"]:
        _report(argv[1:])
        return
    args = parser().parse_args(argv)
    if args.list_tasks:
        _list_tasks()
        return
    if args.tasks is None or args.out is None:
        raise InputError("give --tasks and --out, or: report DIR")
    settings = _settings(args.set)
    tasks = [make_task(name, settings.get(name)) for name in split(args.tasks)]
    grid = build_grid(args, settings)
    _check(args, {task.name for task in tasks}, {read_entry(point.method)[0] for point in grid}, settings)
    args.lengths = _lengths(args.lengths)
    text = None if args.text is None else read_prose(args.text)
    compilation.enable_compilation_cache()
    from kvjax.evaluation import evaluate

    evaluate.run(args, [PROG, *argv], tasks, grid, settings, text)


def _list_tasks() -> None:
    from kvjax.cli.console import to_stdout
    from kvjax.cli.factories import list_factories

    list_factories(to_stdout(), TASKS, "task", "what it asks")


def _settings(pairs: list[str]) -> dict[str, dict[str, str]]:
    """`--set needle.depths=3` as `{"needle": {"depths": "3"}}`."""
    settings: dict[str, dict[str, str]] = {}
    for name, value in command.read_settings(pairs).items():
        owner, dot, key = name.partition(".")
        if not dot:
            raise InputError(f"--set {name}={value}: name the task or method, such as needle.depths=3")
        settings.setdefault(owner, {})[key] = value
    return settings


def _check(args: argparse.Namespace, tasks: set[str], methods: set[str], settings: dict[str, dict[str, str]]) -> None:
    """Raise `InputError` for flags that cannot be followed, before anything is loaded."""
    if not tasks or not methods:
        raise InputError(f"--{'methods' if tasks else 'tasks'} names none")
    for name in settings:
        if name not in tasks | methods:
            raise InputError(f"--set {name}: no such task or method in this run")
    if args.budgets is not None and not split(args.budgets):
        raise InputError("--budgets names none")
    command.check_numbers(args, samples=MOST, batch=command.MOST_SEQUENCES)
    if args.reference is not None and "kl" not in tasks:
        raise InputError(f"--reference {args.reference} is for the task kl, which --tasks does not name")
    if args.seed < 0:
        raise InputError(f"--seed {args.seed} is not at least 0")
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out {args.out} is a file")
    if args.data is not None and not args.data.is_dir():
        raise InputError(f"--data {args.data} is not a folder")


def _lengths(text: str | None) -> tuple[int, ...] | None:
    """Lengths as they are given; the model's context limit is another matter."""
    if text is None:
        return None
    try:
        lengths = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        lengths = ()
    if not lengths or min(lengths) < 1:
        raise InputError(f"--lengths {text!r} is not a list of lengths such as 256,512")
    return lengths


def _report(argv: list[str]) -> None:
    p = command.Parser(prog=f"{PROG} report", description="Tables and pictures of a run.")
    p.add_argument("directory", type=Path, metavar="DIR", help="the --out of a run, where the report goes")
    p.add_argument("others", type=Path, nargs="*", metavar="OTHER", help="runs of the same samples with other models")
    args = p.parse_args(argv)
    from kvjax.cli.console import to_stdout
    from kvjax.evaluation import report

    report.write(args.directory, to_stdout(), args.others)


if __name__ == "__main__":
    command.run(PROG, main)
