"""Work in steps: generators that yield on the way, and return what they have come to."""

from collections.abc import Callable, Generator
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def drain(steps: Generator[S, None, T], show: Callable[[S], None] | None = None) -> T:
    """What a generator returns; what it yields on the way is shown."""
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            return end.value
        if show is not None:
            show(step)
