"""What users are told: the one error, and lines about what is done another way."""

import difflib
import functools
import sys
from collections.abc import Iterable

LONGEST = 1000  # characters of a message


class InputError(ValueError):
    """What a user gave cannot be used; the message is one clear line.

    Command lines print the message on stderr and exit with status 2. Whatever files and flags put into a message, it is
    a line that a terminal can show.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(message: str) -> str:
    """A message without line breaks and control codes, its middle left out if it is long.

    >>> one_line("no\\n  \\x1b[31mred")
    'no \\\\x1b[31mred'
    """
    if len(message) > LONGEST:
        message = f"{message[: LONGEST * 2 // 3]} ... {message[-LONGEST // 3 :]}"
    message = " ".join(message.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)


def unknown(what: str, name: str, known: Iterable[str]) -> InputError:
    """What to raise for a name that is none of those that are known.

    >>> unknown("method", "H2O", ["full", "h2o"])
    InputError("unknown method 'H2O': choose from full, h2o (did you mean h2o?)")
    """
    known = list(known)
    near = difflib.get_close_matches(name.lower(), known, 1)
    return InputError(
        f"unknown {what} {name!r}: choose from {', '.join(known)}{f' (did you mean {near[0]}?)' if near else ''}"
    )


@functools.cache
def say_once(line: str) -> None:
    """Print a line to standard error, the first time."""
    print(line, file=sys.stderr)
