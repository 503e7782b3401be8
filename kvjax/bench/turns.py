"""Contestants take turns in one process, so that a noisy machine is noisy for all of them: read the ratios."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from rich.console import Console
from rich.progress import track

LEAST = 0.02  # seconds of a turn of short calls
MOST = 1000  # calls of a turn
FAILURES = (NotImplementedError, jax.errors.JaxRuntimeError, MemoryError)  # of one contestant, not of a command
MEASURED = 256 << 20  # bytes of the array that bandwidth is measured with


class Contestant(NamedTuple):
    """Something that is timed.

    Attributes:
      name: for people.
      turn: does its work once and returns the seconds it took.
      work: what a turn gets done, in the unit that contestants are compared in (tokens, calls, bytes).
      bytes: that a turn has to move; 0 = not counted.
      flop: of its products, a multiplication and an addition apart; 0 = not counted.
      facts: what to report beside the times.
    """

    name: str
    turn: Callable[[], float]
    work: float
    bytes: int = 0
    flop: float = 0.0
    facts: dict[str, Any] = {}  # noqa: RUF012  (never changed)


class Limits(NamedTuple):
    """What the machine can do: the best seen in a run."""

    copy: float  # memory bandwidth [bytes/s] of a copy, what is read and what is written counted
    read: float  # likewise, of reading a matrix
    product: float  # [FLOP/s] of two large square matrices

    def seconds(self, size: float, flop: float) -> float:
        """The least time in which so many bytes are moved and so many products made."""
        return max(size / max(self.copy, self.read), flop / self.product)

    def __str__(self) -> str:
        copy, read, product = (number / 1e9 for number in self)
        return f"copy {copy:,.1f} GB/s, read {read:,.1f} GB/s, products {product:,.0f} GFLOP/s"


class Timings(NamedTuple):
    """Times of contestants that took turns."""

    limits: Limits
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


def probes(dtype: DTypeLike) -> list[Contestant]:
    """What `Limits` are measured with: a copy, a matrix-vector product, which only reads, and a product of matrices."""
    side = math.isqrt(MEASURED // 4)
    small = side // 8 if jax.default_backend() == "cpu" else side  # 1,024: as fast as larger ones
    matrix, x = jnp.ones((side, side), jnp.float32), jnp.ones((1, side), jnp.float32)
    square = jnp.ones((small, small), dtype)
    copy, product = jax.jit(lambda m: -m), jax.jit(lambda x, m: x @ m)
    found = []
    for name, call, work in (
        ("copy", lambda: copy(matrix), 2 * matrix.nbytes),
        ("read", lambda: product(x, matrix), matrix.nbytes),
        ("product", lambda: product(square, square), 2 * small**3),
    ):
        turn, times = repeated(call)
        found.append(Contestant(name, turn, times * work))
    return found


def prepared(name: str, make: Callable[[], Contestant]) -> Contestant | dict[str, Any]:
    """A contestant after its first turn, which may compile and does not count; a row that says why there is none."""
    try:
        contestant = make()
        contestant.turn()
        return contestant
    except FAILURES as error:
        return {"name": name, "failed": reason(error)}


def reason(error: BaseException) -> str:
    """An error in one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def measure(found: Sequence[Contestant | dict[str, Any]], rounds: int, dtype: DTypeLike = jnp.float32) -> Timings:
    """Let all take turns that can.

    Args:
      found: contestants that have had a turn, and rows of those that could not.
      rounds: turns of each.
      dtype: of the products that the machine's limit is measured with.
    """
    contestants, machine = [each for each in found if isinstance(each, Contestant)], probes(dtype)
    seconds: dict[str, list[float]] = {each.name: [] for each in (*machine, *contestants)}
    for _ in track(range(rounds), description="rounds", transient=True, console=Console(stderr=True)):
        for contestant in contestants:
            seconds[contestant.name].append(contestant.turn())
            for probe in machine:
                seconds[probe.name].append(probe.turn())
    best = (probe.work / min(seconds.pop(probe.name), default=math.nan) for probe in machine)
    return Timings(Limits(*best), seconds)


def rows(
    entries: Sequence[Contestant | dict[str, Any]], measured: Timings, against: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """A dict per contestant, of medians over the rounds.

    Args:
      entries: as `measure` was given them.
      measured: their times.
      against: whose speed is 1: `x NAME` is the median over rounds of how many times as fast, in the same round.
    """
    by_name = {each.name: each for each in entries if isinstance(each, Contestant)}
    speeds = {name: by_name[name].work / np.asarray(times) for name, times in measured.seconds.items()}
    found = []
    for each in entries:
        if not isinstance(each, Contestant):
            found.append(each)
            continue
        name = each.name
        seconds = np.asarray(measured.seconds[name])
        row = {
            "name": name,
            "seconds": float(np.median(seconds)),
            "quartiles": [float(q) for q in np.quantile(seconds, (0.25, 0.75))],
            "work": each.work,
            "per_s": float(np.median(speeds[name])),
        }
        least = measured.limits.seconds(each.bytes, each.flop)
        row["of_limit"] = least / row["seconds"] if least else None
        for what in ("bytes", "flop"):
            if amount := getattr(each, what):
                row |= {what: amount, f"{what}_per_s": amount / row["seconds"]}
        row |= {f"x {other}": float(np.median(speeds[name] / speeds[other])) for other in against if other in speeds}
        found.append(row | each.facts)
    return found
