"""Measure once how a model's layers and heads share a budget: `python -m kvjax.calibrate MODEL OUT`.

OUT is a small JSON file, for methods with `split=OUT`. In the model's directory as kvjax-profile.json, or beside a GGUF
file as FILE.gguf.kvjax-profile.json, it is found for `split=profile`.
"""

import argparse
from pathlib import Path

from kvjax import compilation
from kvjax.cli import command
from kvjax.cli.flags import add_number_flags
from kvjax.files import output
from kvjax.files.text import read_prose
from kvjax.methods import default_budget, make, read_entry
from kvjax.policies.budgets.profile import METHOD, TEXTS, check_measure

PROG = "kvjax.calibrate"


def parser() -> command.Parser:
    """The command line's flags."""
    p = command.Parser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    command.add_ignore_flag(p)
    return p


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    args = parser().parse_args(argv)
    output.check_writable(args.out)
    name, arguments = read_entry(args.method)
    check_measure(args.method, make(name, default_budget(name), arguments).budget)
    text = None if args.text is None else read_prose(args.text)
    compilation.enable_compilation_cache()
    from kvjax.cli import calibrating

    calibrating.run(args, text)


if __name__ == "__main__":
    command.run(PROG, main)
