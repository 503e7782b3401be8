"""Measure once how a model's layers and heads share a budget: `python -m kvjax.calibrate MODEL OUT`.

OUT is a small JSON file, for methods with `split=OUT`. In the model's directory as kvjax-profile.json, or beside a GGUF
file as FILE.gguf.kvjax-profile.json, it is found for `split=profile`.
"""

import argparse
import functools
from pathlib import Path

from rich.console import Console
from rich.progress import track

from kvjax import compilation
from kvjax.checkpoint import fingerprint
from kvjax.checkpoint.lorc import calibration
from kvjax.cli import command
from kvjax.cli.console import to_stdout
from kvjax.cli.flags import add_number_flags, numbers
from kvjax.files import output
from kvjax.generation.calibrate import METHOD, TEXTS, calibrate, check, sample
from kvjax.generation.model import load_from
from kvjax.policies.budgets import profile


def parser() -> command.Parser:
    """The command line's flags."""
    p = command.Parser(
        prog="kvjax.calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("model", metavar="MODEL", help="a checkpoint, as in kvjax.generate")
    p.add_argument("out", metavar="OUT", type=Path, help="the file to write")
    p.add_argument(
        "--method",
        default=METHOD,
        metavar="NAME",
        help=f"what compares the tokens of all layers and heads, such as snapkv+split=global (default: {METHOD})",
    )
    p.add_argument("--text", type=Path, metavar="FILE", help=f"up to {TEXTS} times 1,024 tokens of it (default: prose)")
    add_number_flags(p)
    p.add_argument("--ignore-config", action="append", default=[], metavar="FIELD", help="as in kvjax.convert")
    return p


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    p = parser()
    args = p.parse_args(argv)
    command.run(p.prog, lambda: _calibrate(args))


def _calibrate(args: argparse.Namespace) -> None:
    output.check_writable(args.out)
    check(args.method)
    text = None if args.text is None else calibration.read_text(args.text)
    compilation.enable_compilation_cache()
    model, directory = load_from(args.model, **numbers(args), ignore_config=args.ignore_config)
    counted = functools.partial(track, description="calibrating", console=Console(stderr=True))
    found = calibrate(model, args.method, sample(model, text), counted)
    profile.write(args.out, found, fingerprint(directory), args.method)
    layers, levels = len(found.shares[0]), len(found.levels)
    to_stdout().print(f"{args.out}: shares of {layers} layers at {levels} levels", markup=False, highlight=False)


if __name__ == "__main__":
    main()
