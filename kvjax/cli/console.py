"""Where commands print."""

import sys

from rich.console import Console

WIDE = 10_000  # characters: wider than any table


def to_stdout() -> Console:
    """The console of standard output; where that is no terminal, no line is broken and no cell cut off."""
    return Console(width=None if sys.stdout.isatty() else WIDE)
