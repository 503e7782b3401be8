"""Score methods at equal bytes: tasks x methods x budgets, one JSON line per sample; `report DIR` draws the result.

A run that was killed goes on where it stopped when it is started again with the same --out.
"""

import argparse
import functools
import itertools
import shlex
import sys
import time
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvjax import compilation
from kvjax.checkpoint import fingerprint
from kvjax.cli import command
from kvjax.cli.console import to_stdout
from kvjax.cli.factories import list_factories
from kvjax.cli.flags import add_method_flags, add_number_flags, numbers
from kvjax.errors import InputError, say_once
from kvjax.evaluation import manifest, report, runner
from kvjax.evaluation.runner import Evaluation, Point
from kvjax.files.text import read_text
from kvjax.generation.generate import check_recipe
from kvjax.generation.model import Model, load_from
from kvjax.methods import LEARNED, METHODS, default_budget, make, read_entry, taken
from kvjax.plan import dry_run
from kvjax.policies.budgets import profile
from kvjax.policies.budgets.budget import parse_keep
from kvjax.tasks.registry import TASKS, make_task
from kvjax.tasks.task import Request, Sample, Task

PROG = "kvjax.evaluate"
Entry = tuple[str, str | int | None]  # a method as `read_entry` takes it; its budget, None = the default
BATCH_TOKENS = 8192  # tokens of the prompts that are run together
MOST = 10_000  # samples of a part
LENGTHS = {"short": (512, 1024), "natural": (2048, 4096)}


def parser() -> command.Parser:
    """The command line's flags."""
    p = command.Parser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--model", metavar="M", help="Hugging Face directory, GGUF file, hub id or Orbax directory (default: demo)"
    )
    p.add_argument(
        "--reference", metavar="M", help="model that kl compares with, such as what --model was made from (default: it)"
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
    p.add_argument("--form", choices=LENGTHS, help="of the prompts: short is what the demo model is trained on")
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
    p.add_argument("--ignore-config", action="append", default=[], metavar="FIELD", help="ignore a config.json field")
    p.add_argument("--list-tasks", action="store_true", help="show all tasks and their arguments")
    return p


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["report"]:
        _report(argv[1:])
        return
    args, console = parser().parse_args(argv), to_stdout()
    if args.list_tasks:
        list_factories(console, TASKS, "task", "what it asks")
        return
    if args.tasks is None or args.out is None:
        raise InputError("give --tasks and --out, or: report DIR")
    settings = _settings(args.set)
    tasks = [make_task(name, settings.get(name)) for name in _split(args.tasks)]
    grid = _grid(args, settings)
    _check(args, {task.name for task in tasks}, {read_entry(point.method)[0] for point in grid}, settings)
    text = _read_text(args.text)
    compilation.enable_compilation_cache()
    load = functools.partial(load_from, ignore_config=args.ignore_config, mesh=args.mesh)
    model, directory = load(args.model, **numbers(args))
    reference, origin = (None, None) if args.reference is None else load(args.reference, dtype=numbers(args)["dtype"])
    for point in grid:
        check_recipe(model, point.recipe)
    weights, profiles = fingerprint(directory), _profiles(model, grid, settings)
    _check_profile(model, weights, profiles)
    request, chat = _request(args, model, text)
    samples = {task.name: task.samples(request) for task in tasks}
    batch = args.batch or max(1, BATCH_TOKENS // max(request.lengths))
    arguments = {
        "model": model.name, "weights": weights, "stop": model.stop,
        "reference": reference and reference.name, "reference_weights": origin and fingerprint(origin),
        "tasks": list(samples),
        "methods": list(dict.fromkeys(point.method for point in grid)),
        "budgets": _budgets(args), "samples": args.samples, "seed": args.seed,
        "lengths": request.lengths, "form": request.form, "question": args.question, "chat": chat, "batch": batch,
        "asked": "beside" if args.question == "unseen" else None,  # of a context, not after it as in earlier versions
        "settings": settings, "data": args.data and str(args.data),
        "text": manifest.digest(request.text),
        "dtype": jnp.dtype(model.decoder.dtype).name, "bits": model.spec.weights, "ignore_config": args.ignore_config,
    }  # fmt: skip
    unseen = args.question == "unseen"
    evaluation = Evaluation(model, batch=batch, unseen=unseen, chat=chat, reference=reference)
    with runner.results(args.out) as (done, file):
        calls = manifest.earlier(args.out, arguments, profiles) if done else []
        evaluation.check(samples, done)
        manifest.write(args.out, [PROG, *argv], arguments, calls, profiles)
        run(evaluation, tasks, samples, grid, done, file)
    console.print(f"python -m kvjax.evaluate report {shlex.quote(str(args.out))}", highlight=False)


def _profiles(model: Model, grid: Sequence[Point], settings: dict[str, dict[str, str]]) -> dict[str, str]:
    """Digests of the profiles that methods use, by what their `split` says."""
    entries = (read_entry(point.method) for point in grid)
    splits = {({"split": ""} | settings.get(name, {}) | given)["split"] for name, given in entries}
    found = {split: profile.read(profile.find(split)) for split in splits if split.endswith(".json")}
    if "profile" in splits and model.spec.profile is not None:
        found["profile"] = model.spec.profile
    return {split: manifest.digest(repr((spec.levels, spec.shares))) for split, spec in found.items()}


def _check_profile(model: Model, weights: str, profiles: dict[str, str]) -> None:
    """Say where the profile that lies beside the weights is of other ones."""
    own = model.spec.profile
    if "profile" in profiles and own is not None and own.model not in ("", weights):
        say_once(f"{own.source} was measured on other weights: python -m kvjax.calibrate measures these")


def _grid(args: argparse.Namespace, settings: dict[str, dict[str, str]]) -> list[Point]:
    """The methods and budgets that the flags name."""
    stores = command.stores(args)
    names = ("" if args.config else "all") if args.methods is None else args.methods
    entries = [*_named(names), *(configured(file, settings, stores) for file in args.config)]
    return points(entries, _budgets(args), settings, stores)


def _request(args: argparse.Namespace, model: Model, text: str | None) -> tuple[Request, bool]:
    """What tasks are told to write prompts, and whether these are wrapped in the chat template."""
    form = args.form or ("short" if args.model is None else "natural")
    chat = form == "natural" and not args.no_chat and model.tokenizer is not None and model.tokenizer.has_template
    lengths = _lengths(args.lengths, model, form)
    return runner.request(
        model, samples=args.samples, seed=args.seed, lengths=lengths, form=form, chat=chat, text=text, data=args.data
    ), chat


def run(
    evaluation: Evaluation,
    tasks: list[Task],
    samples: dict[str, list[Sample]],
    grid: list[Point],
    done: runner.Done,
    file: FileIO,
) -> None:
    """Run what has no result yet, and write every batch's results as soon as they are there."""
    batches = {task.name: list(evaluation.batches(task, samples[task.name])) for task in tasks}
    left = [Work(p, t, b) for p in grid for t in tasks for b in batches[t.name] if not _keys(t, p, b) <= done.keys()]
    total, ran, start = sum(len(work.batch.samples) for work in left), 0, time.monotonic()
    console = Console(stderr=True, highlight=False)
    console.print(f"{total} samples to run, in {len(grid)} methods and budgets")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=console, disable=not console.is_terminal)
    with bars as progress, compilation.few_programs() as forget:  # a long grid would fill the memory with code
        bar = progress.add_task("", total=total)
        for _, works in itertools.groupby(left, key=lambda work: work.point):
            for name, several in itertools.groupby(works, key=Work.name):
                progress.update(bar, description=name)
                for work in several:
                    try:
                        lines = evaluation.run(work.task, work.point, work.batch)
                    except InputError as error:
                        raise InputError(f"{name}: {error}") from None
                    runner.append(file, lines, done)
                    progress.advance(bar, len(lines))
                    ran += len(lines)
                if not console.is_terminal:  # where a bar shows nothing until the end
                    minutes = (time.monotonic() - start) / 60
                    rest = minutes / ran * (total - ran)
                    console.print(f"{name}: {ran} of {total} in {minutes:.1f} min, about {rest:.1f} min left")
            forget()


class Work(NamedTuple):
    """A batch under one method and budget."""

    point: Point
    task: Task
    batch: runner.Batch

    def name(self) -> str:
        """What it is, for the screen."""
        return f"{self.task.name} {self.point.method} {self.point.budget or ''}".strip()


def _keys(task: Task, point: Point, batch: runner.Batch) -> set[runner.Key]:
    return {(task.name, s.part, s.index, s.asked, point.method, point.budget) for s in batch.samples}


def configured(path: Path, settings: dict[str, dict[str, str]], stores: dict[str, str]) -> Entry:
    """The method of a config file, with the arguments that are not the method's defaults; its budget.

    `settings` and `stores` are the command line's, which take the place of the file's.
    """
    p = command.Parser(prog=PROG)
    add_method_flags(p, method="none")
    args = command.parse(p, ["--config", str(path)])
    if args.method is None:
        raise InputError(f"{path} names no method")
    given = stores.keys() | settings.get(args.method, {}).keys()
    chosen = {key: value for key, value in args.arguments.items() if key not in given}
    make(args.method, args.budget, chosen)  # raises what is wrong with them
    usual = dry_run.arguments(args.method, {}) | {"kernels": "cpu"}
    own = {key: value for key, value in chosen.items() if value != usual[key]}
    return "".join([args.method, *(f"+{key}={value}" for key, value in own.items())]), args.budget


def points(
    entries: Sequence[Entry],
    budgets: list[str] | None,
    settings: dict[str, dict[str, str]] | None = None,
    stores: dict[str, str] | None = None,
) -> list[Point]:
    """The grid's methods with their budgets; a method that takes no budget appears once.

    `budgets` are those of all methods; None = an entry's own, or its method's default. `settings` are arguments of the
    methods that they name, `stores` of all that have them: these become part of the method's name.
    """
    grid, left = [], set(stores or {})
    for budget in budgets or ():
        parse_keep(budget, "--budgets")
    for entry, own in entries:
        name, arguments = read_entry(entry)
        takes, common = default_budget(name), taken(name, stores or {})
        left -= common.keys()
        full_name = entry + "".join(f"+{key}={value}" for key, value in common.items() if key not in arguments)
        given = common | (settings or {}).get(name, {}) | arguments
        for budget in [takes if own is None else own] if takes is None or not budgets else budgets:
            label = None if budget is None else str(budget)
            grid.append(Point(full_name, label, make(name, budget, given)))
    if left:
        raise InputError(f"no method of this run takes {', '.join(sorted(left))}")
    if budgets and all(point.budget is None for point in grid):
        raise InputError("no method of this run takes a budget: leave --budgets out")
    return list({(point.method, point.budget): point for point in grid}.values())


def _named(methods: str) -> list[Entry]:
    every = [name for name in METHODS if name not in LEARNED]  # that any model can run
    return [(entry, None) for entry in (every if methods == "all" else _split(methods))]


def _budgets(args: argparse.Namespace) -> list[str] | None:
    return None if args.budgets is None else _split(args.budgets)


def _split(names: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))


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
    if args.budgets is not None and not _split(args.budgets):
        raise InputError("--budgets names none")
    command.check_numbers(args, samples=MOST, batch=command.MOST_SEQUENCES)
    if args.reference is not None and "kl" not in tasks:
        raise InputError(f"--reference {args.reference} is for the task kl, which --tasks does not name")
    if args.seed < 0:
        raise InputError(f"--seed {args.seed} is not at least 0")
    if args.data is not None and not args.data.is_dir():
        raise InputError(f"--data {args.data} is not a folder")


def _lengths(text: str | None, model: Model, form: str) -> tuple[int, ...]:
    limit = model.spec.max_position
    if text is None:
        return tuple(sorted({min(length, limit) for length in LENGTHS[form]}))
    try:
        lengths = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise InputError(f"--lengths {text!r} is not a list of lengths such as 256,512") from None
    if min(lengths) < 1 or max(lengths) > limit:
        raise InputError(f"--lengths {text}: lengths are 1 to {limit}, the model's context limit")
    return lengths


def _read_text(path: Path | None) -> str | None:
    if path is None:
        return None
    text = read_text(path)
    if not text.strip():
        raise InputError(f"{path} is empty")
    return text


def _report(argv: list[str]) -> None:
    p = command.Parser(prog=f"{PROG} report", description="Tables and pictures of a run.")
    p.add_argument("directory", type=Path, metavar="DIR", help="the --out of a run, where the report goes")
    p.add_argument("others", type=Path, nargs="*", metavar="OTHER", help="runs of the same samples with other models")
    args = p.parse_args(argv)
    report.write(args.directory, to_stdout(), args.others)


if __name__ == "__main__":
    command.run(PROG, main)
