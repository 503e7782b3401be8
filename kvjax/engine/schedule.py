"""Who reads and who decodes next: plain Python, without a device.

A request waits, then its prompt is read, layer by layer between the steps of those that decode, then it decodes. It is
admitted when a seat is free and the pages that it may need are: none is ever taken from a request that runs. The first
that waits goes first; while it does not fit, others may pass it, at most `PASSES` times.
"""

from collections.abc import Hashable, Iterable
from typing import NamedTuple

PASSES = 8  # requests that may go before one that came earlier
READERS = 2  # prompts that are read side by side; each has a residual stream and a cache of its own


class Waiting(NamedTuple):
    """A request that is not admitted yet."""

    key: Hashable
    pages: tuple[int, ...]  # promised to it in each tier
    seats: int  # that it needs
    passed: int = 0  # how often a later one was admitted before it


class Schedule:
    """Seats and pages, and who has them.

    Args:
      seats: how many there are.
      pages: of each tier.
      queue: most requests that may wait.
    """

    def __init__(self, seats: int, pages: tuple[int, ...], queue: int):
        self.free = list(range(seats))
        self.pages, self.queue = pages, queue
        self.promised = [0] * len(pages)
        self.waiting: list[Waiting] = []
        self._held: dict[Hashable, tuple[tuple[int, ...], list[int]]] = {}

    def fits(self, pages: Iterable[int], seats: int, total: int) -> bool:
        """Whether a request can ever be admitted to so many seats in all."""
        return seats <= total and all(wanted <= size for wanted, size in zip(pages, self.pages, strict=True))

    def add(self, key: Hashable, pages: tuple[int, ...], seats: int) -> bool:
        """Queue a request, or return False where the queue is full."""
        if len(self.waiting) >= self.queue:
            return False
        self.waiting.append(Waiting(key, pages, seats))
        return True

    def admit(self) -> tuple[Hashable, list[int]] | None:
        """The next request that can be read, and its seats; it holds them and its pages until `end`."""
        for place, one in enumerate(self.waiting):
            if self._has_room(one):
                del self.waiting[place]
                self.waiting[:place] = [each._replace(passed=each.passed + 1) for each in self.waiting[:place]]
                seats = [self.free.pop(0) for _ in range(one.seats)]
                self.promised = [a + b for a, b in zip(self.promised, one.pages, strict=True)]
                self._held[one.key] = (one.pages, seats)
                return one.key, seats
            if one.passed >= PASSES:
                return None
        return None

    def leave(self, key: Hashable) -> None:
        """Forget a request that waits."""
        self.waiting = [one for one in self.waiting if one.key != key]

    def end(self, key: Hashable) -> None:
        """Take back what a request holds."""
        pages, seats = self._held.pop(key)
        self.promised = [a - b for a, b in zip(self.promised, pages, strict=True)]
        self.free = sorted([*self.free, *seats])

    def _has_room(self, one: Waiting) -> bool:
        fits = zip(self.promised, one.pages, self.pages, strict=True)
        return one.seats <= len(self.free) and all(used + wanted <= size for used, wanted, size in fits)
