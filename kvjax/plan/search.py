"""The largest batch and the largest context that fit."""

from collections.abc import Callable
from typing import NamedTuple

MOST = {"batch": 2**16, "context": 2**22}  # sequences; tokens
UNIT = {"batch": 1, "context": 64}  # prompts are padded to multiples of so many tokens, at least
TRIES = 4  # compilations on the way to a size that is known to fit


class Largest(NamedTuple):
    """The largest size that fits."""

    size: int  # 0 = none
    verified: bool  # it was compiled and fits, and the next one was compiled and does not


def largest(needs: Callable[[int], int], usable: int, most: int) -> int:
    """The largest n from 1 to `most` that needs at most `usable` bytes, 0 if none does.

    `needs` must not fall. What it needs grows about in proportion, so the next guess is where a line through two sizes
    meets the limit; every third guess halves the range, whatever the line says.

    >>> largest(lambda n: 7 * n + 5, usable=100, most=1000)
    13
    """
    first = needs(1)
    if first > usable:
        return 0
    low, at_low, high, at_high, turn = 1, first, most + 1, 0, 0
    guess = 2
    while high - low > 1:
        turn += 1
        need = needs(guess)
        if need <= usable:
            low, at_low = guess, need
        else:
            high, at_high = guess, need
        steps, rise = (high - low, at_high - at_low) if at_high else (max(low - 1, 1), at_low - first)
        guess = low + (usable - at_low) * steps // max(rise, 1)
        if turn % 3 == 0:
            guess = (low + high) // 2 if at_high else 2 * low
        guess = min(max(guess, low + 1), high - 1)
    return low


def verified(
    needs: Callable[[int], int], compiled: Callable[[int], int], usable: int, most: int, known: tuple[int, int]
) -> Largest:
    """The same by estimates, and compiled to be sure: the one that fits, and the next one that does not.

    Args:
      needs: bytes by estimate.
      compiled: bytes by compilation.
      usable, most: as in `largest`.
      known: a size and the bytes that its compilation gave; estimates are shifted by what they missed there.
    """
    seen = dict([known])

    def of(n: int) -> int:
        if n not in seen:
            seen[n] = compiled(n)
        return seen[n]

    at, size = known[0], 0
    for _ in range(TRIES):
        missed = seen[at] / needs(at)
        size = largest(lambda n, by=missed: int(needs(n) * by), usable, most)
        if size and of(size) > usable:
            at = size
        elif size < most and of(size + 1) <= usable:
            at = size + 1
        else:
            return Largest(size, True)
    fitting = [n for n, need in seen.items() if need <= usable]
    return Largest(max(fitting, default=0), False)
