"""Speed, measured on this machine; every command prints a table and writes JSON, a table and a picture with --out DIR.

    python -m kvjax.bench kernels --all          each kernel, shape and store against XLA and other libraries
    python -m kvjax.bench decode --model llama-3-8b --methods full,h2o:20% --batch max
    python -m kvjax.bench prefill                prompts, and what a method adds to attention
    python -m kvjax.bench peers --model FILE.gguf   beside transformers and llama.cpp, on the same weights
    python -m kvjax.bench device --minutes 8     all that decides on a GPU or TPU, in one call
    python -m kvjax.bench serve                  requests that come and go, over equal bytes of cache
    python -m kvjax.bench convert                a checkpoint's conversion: speed and memory
    python -m kvjax.bench tune                   block sizes of the kernels, for the table that the kernels read

Without a command it is `decode`. COMMAND --help shows a command's flags. All contestants of a table take turns in one
process: read the ratios.
"""

import argparse
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path

from kvjax.bench import flags
from kvjax.cli import command
from kvjax.errors import InputError

PROG = "kvjax.bench"
# A module each, and a function of `flags` and of `settings`.
COMMANDS = ("kernels", "decode", "prefill", "peers", "device", "serve", "convert", "tune")


def parser(name: str) -> command.Parser:
    """A command's flags, with those that all have."""
    raw, add = argparse.RawDescriptionHelpFormatter, getattr(flags, name)
    p = command.Parser(prog=f"{PROG} {name}", description=inspect.getdoc(add), formatter_class=raw)
    add(p)
    rounds = flags.ROUNDS.get(name, 7)
    p.add_argument("--rounds", type=int, default=rounds, help=f"turns of each contestant (default: {rounds})")
    p.add_argument("--out", type=Path, metavar="DIR", help="write JSON, a table and a picture")
    p.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return p


def settings_of(name: str) -> Callable[[argparse.Namespace], None]:
    """What says what a command's flags mean, and refuses what is wrong with them."""
    from kvjax.bench import settings

    return getattr(settings, name)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    argv = command.given(argv)
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    if argv[:1] and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        raise InputError(f"no command {argv[0]!r}: choose from {', '.join(COMMANDS)}")
    name, given = (argv[0], argv[1:]) if argv[:1] and argv[0] in COMMANDS else ("decode", argv)
    args = parser(name).parse_args(given)
    if args.rounds < 1:
        raise InputError(f"--rounds {args.rounds} is not at least 1")
    from kvjax.bench import report

    settings_of(name)(args)
    report.check(args.out)
    found = importlib.import_module(f"kvjax.bench.{name}").run(args, [PROG, name, *given])
    if found is not None:
        report.tell(found, as_json=args.json, out=args.out)


if __name__ == "__main__":
    command.run(PROG, main)
