"""Will it fit, and how fast at best? For a chip that need not be there."""

import argparse

from kvjax.cli import command
from kvjax.errors import InputError
from kvjax.plan import aot, chips
from kvjax.plan.chips import Chip
from kvjax.plan.flags import PROG, parse
from kvjax.plotting import check_picture


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    argv = command.given(argv)
    args = parse(argv)
    chip = chips.chosen(args.chip, args.memory)
    if args.serve:
        from kvjax.plan import serving

        serving.run(args, chip)
        return
    check(args, chip)
    from kvjax.plan import planning

    planning.run(args, argv, chip)


def check(args: argparse.Namespace, chip: Chip) -> None:
    """Raise `InputError` for what cannot be planned, before anything is compiled."""
    if args.out is not None:
        check_picture(args.out)
    if args.estimate:
        return
    if chip.target is None:
        raise InputError(f"nothing compiles for {chip.name} ahead of time: add --estimate")
    if reason := aot.missing(chip.target):
        raise InputError(f"{reason}, or add --estimate")


if __name__ == "__main__":
    command.run(PROG, main)
