"""Contestants take turns in one process, so that a noisy machine is noisy for all of them: read the ratios."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

LEAST = 0.02  # seconds of a turn of short calls
MOST = 1000  # calls of a turn
MEASURED = 256 << 20  # bytes of the array that bandwidth is measured with


class Contestant(NamedTuple):
    """Something that is timed.

    Attributes:
      name: for people.
      turn: does its work once and returns the seconds it took.
      work: what a turn gets done, in the unit that contestants are compared in (tokens, calls, bytes).
      bytes: that a turn has to move; 0 = not counted.
      facts: what to report beside the times.
    """

    name: str
    turn: Callable[[], float]
    work: float
    bytes: int = 0
    facts: dict[str, Any] = {}  # noqa: RUF012  (never changed)


class Timings(NamedTuple):
    """Times of contestants that took turns."""

    copy: float  # memory bandwidth [bytes/s]: of a copy, what is read and what is written counted; the best seen
    read: float  # likewise, of reading a matrix
    seconds: dict[str, list[float]]  # of each turn, by contestant


def repeated(call: Callable[[], Any], wait: Callable[[Any], Any] = jax.block_until_ready) -> tuple[Callable, int]:
    """A turn of as many calls as take `LEAST` seconds, queued one behind the other; and their number.

    Args:
      call: does the work, or queues it.
      wait: for what `call` returned; called once a turn, so that a device does not idle between calls.
    """
    wait(call())  # compiles
    once = timed(lambda: wait(call()))
    times = min(max(1, math.ceil(LEAST / once)), MOST)

    def work() -> None:
        out = None
        for _ in range(times):
            out = call()
        wait(out)

    return lambda: timed(work), times


def timed(work: Callable[[], Any]) -> float:
    """Seconds that a function takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def bandwidth() -> tuple[Contestant, Contestant]:
    """What the memory can do: a copy, and a matrix-vector product, which only reads."""
    side = math.isqrt(MEASURED // 4)
    matrix, x = jnp.ones((side, side), jnp.float32), jnp.ones((1, side), jnp.float32)
    copy, read = jax.jit(lambda m: -m), jax.jit(lambda x, m: x @ m)
    found = []
    for name, call, size in (
        ("copy", lambda: copy(matrix), 2 * matrix.nbytes),
        ("read", lambda: read(x, matrix), matrix.nbytes),
    ):
        turn, times = repeated(call)
        found.append(Contestant(name, turn, times, times * size))
    return found[0], found[1]


def measure(contestants: Sequence[Contestant], rounds: int) -> Timings:
    """Let all take turns; the first turn of each, which may compile, does not count."""
    memory = bandwidth()
    for contestant in contestants:
        contestant.turn()
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in (*memory, *contestants)}
    for _ in track(range(rounds), description="rounds", transient=True, console=Console(stderr=True)):
        for contestant in contestants:
            seconds[contestant.name].append(contestant.turn())
            for probe in memory:
                seconds[probe.name].append(probe.turn())
    copy, read = (probe.bytes / min(seconds.pop(probe.name), default=math.nan) for probe in memory)
    return Timings(copy, read, seconds)


def rows(contestants: Sequence[Contestant], measured: Timings, against: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A dict per contestant, of medians over the rounds.

    Args:
      contestants: as they took turns.
      measured: their times.
      against: whose speed is 1: `x NAME` is the median over rounds of how many times as fast, in the same round.
    """
    by_name = {contestant.name: contestant for contestant in contestants}
    speeds = {name: by_name[name].work / np.asarray(times) for name, times in measured.seconds.items()}
    found = []
    for name, contestant in by_name.items():
        seconds = np.asarray(measured.seconds[name])
        row = {
            "name": name,
            "seconds": float(np.median(seconds)),
            "quartiles": [float(q) for q in np.quantile(seconds, (0.25, 0.75))],
            "work": contestant.work,
            "per_s": float(np.median(speeds[name])),
        }
        if contestant.bytes:
            rate = contestant.bytes / row["seconds"]
            row |= {"bytes": contestant.bytes, "bytes_per_s": rate, "of_copy": rate / measured.copy}
            row["times_floor"] = max(measured.copy, measured.read) / rate
        row |= {f"x {other}": float(np.median(speeds[name] / speeds[other])) for other in against if other in speeds}
        found.append(row | contestant.facts)
    return found
