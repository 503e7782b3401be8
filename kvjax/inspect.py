"""Show which tokens of a prompt each layer and head keeps, or what a cache would cost without running anything.

Without a prompt, the demo model reads a long list and a question about it. `lorc CHECKPOINT` shows what low-rank keys
and values cost and lose.
"""

import argparse
from pathlib import Path

from kvjax import compilation
from kvjax.cache.pages import LARGEST
from kvjax.cli import command
from kvjax.cli.flags import CONTEXT, SHOWCASE_METHOD, add_shared_flags
from kvjax.cli.prompts import read_ids, read_texts
from kvjax.convert import add_lorc_flags, lorc_options
from kvjax.errors import InputError
from kvjax.methods import default_budget, make
from kvjax.plotting import check_picture

PROG = "kvjax.inspect"
LORC = "keep=60%"  # of `lorc` without --lorc or --lorc-ranks


def parser() -> command.Parser:
    """The command line's flags; those that `kvjax.generate` has too mean the same."""
    p = command.Parser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_flags(p, method=SHOWCASE_METHOD)
    p.add_argument("--max-new-tokens", type=int, default=1, metavar="N", help="the last is not cached (default: 1)")
    p.add_argument("--layer", type=int, metavar="L", help="show this layer only, counted from 0")
    p.add_argument("--head", type=int, metavar="H", help="show this key/value head only, counted from 0")
    p.add_argument(
        "--out",
        type=Path,
        nargs="?",
        const=Path("kept.png"),
        metavar="FILE.png",
        help="draw it (default: kept.png)",
    )
    p.add_argument("--dry-run", action="store_true", help="no weights: what the method does, and the cache's bytes")
    p.add_argument("--context", type=int, metavar="N", help=f"prompt tokens of a dry run (default: up to {CONTEXT})")
    p.add_argument("--batch", type=int, metavar="N", help="sequences of a dry run (default: 1)")
    return p


def lorc_parser() -> command.Parser:
    """The flags of `kvjax.inspect lorc`; those about ranks are `kvjax.convert`'s."""
    about = "What low-rank keys and values (LoRC) cost and lose, before a checkpoint is converted and after."
    p = command.Parser(prog=f"{PROG} lorc", description=f"{about} Without --lorc or --lorc-ranks: {LORC}.")
    where, drawn = (
        "Hugging Face directory, GGUF file, hub id, or converted (default: demo)",
        "draw it (default: spectra.png)",
    )
    p.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help=where)
    p.add_argument("--out", type=Path, nargs="?", const=Path("spectra.png"), metavar="FILE.png", help=drawn)
    p.add_argument("--json", action="store_true", help="print one JSON object, with all singular values")
    command.add_ignore_flag(p)
    add_lorc_flags(p, "plain")  # spectra of the weights: no text has to be read
    return p


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Flags, and the defaults that depend on the method."""
    args = command.parse(parser(), argv)
    args.method = args.method or SHOWCASE_METHOD
    args.budget = args.budget if args.budget is not None else default_budget(args.method)
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    argv = command.given(argv)
    if argv[:1] == ["lorc"]:
        _lorc(argv[1:])
        return
    args = parse(argv)
    recipe = make(args.method, args.budget, args.arguments)
    _check(args)
    texts, ids = read_texts(args), [read_ids(text) for text in args.prompt_tokens or ()]
    compilation.enable_compilation_cache()
    from kvjax.inspection import show

    show.run(args, recipe, texts, ids)


def _lorc(argv: list[str]) -> None:
    p = lorc_parser()
    args = p.parse_args(argv)
    if args.out is not None:
        check_picture(args.out)
    given = [name for name in vars(args) if name.startswith("lorc") and getattr(args, name) != p.get_default(name)]
    args.lorc = LORC if args.lorc is None and args.lorc_ranks is None else args.lorc
    options = lorc_options(args, "plain")
    from kvjax.inspection import lorc_report

    lorc_report.run(args, options, given)


def _check(args: argparse.Namespace) -> None:
    """Raise `InputError` for flags that cannot be followed, before anything is loaded."""
    given = sum(len(prompts or ()) for prompts in (args.prompt, args.prompt_file, args.prompt_tokens))
    if given > 1:
        raise InputError(f"{given} prompts are given: one is shown at a time")
    if not given and not args.dry_run and (args.model is not None or args.chat):
        raise InputError("give a prompt: --prompt TEXT, --prompt-file FILE or --prompt-tokens 1,2,3")
    if args.chat and not (args.prompt or args.prompt_file):
        raise InputError("--chat wraps text: give --prompt TEXT or --prompt-file FILE")
    if args.dry_run:
        _refuse("a dry run keeps no tokens to show", out=args.out, layer=args.layer, head=args.head)
        _refuse("the prompt says how long the context is", context=args.context if given else None)
    else:
        _refuse("only a dry run counts without a prompt: add --dry-run", context=args.context, batch=args.batch)
    command.check_numbers(args, context=LARGEST, batch=command.MOST_SEQUENCES, max_new_tokens=LARGEST)
    if args.out is not None:
        check_picture(args.out)


def _refuse(why: str, **flags: object) -> None:
    for name, value in flags.items():
        if value is not None:
            raise InputError(f"--{name}: {why}")


if __name__ == "__main__":
    command.run(PROG, main)
