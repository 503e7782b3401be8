"""Handing out slots: how many of the best scores each row has, and whole numbers that add up to a total.

Everything is exact in 32-bit integers and costs a few passes over the scores: no sort of all scores is needed.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

BITS = 31  # of a float that is not negative, as an integer in the same order


def count_best(scores: Float[Array, "R B T"], k: Int[Array, " B"]) -> Int[Array, "R B"]:
    """How many of the k largest scores of all rows together lie in each row.

    Args:
      scores: not negative; -1 where there is none.
      k: at most as many as there are.

    Ties go to the first row. The k-th largest score is found by bisection.
    Cost: 31 counting passes over the scores.
    """
    bits, threshold = _kth(scores, k)
    above, ties = jnp.sum(bits > threshold, axis=2), jnp.sum(bits == threshold, axis=2)
    return jnp.where(k > 0, above + _in_turn(ties, k - above.sum(axis=0)), 0)


def choose_best(scores: Float[Array, "R B T"], k: Int[Array, " B"]) -> Bool[Array, "R B T"]:
    """Where the k largest scores of all rows together are; all that there are, if they are fewer.

    Args:
      scores: not negative; -1 where there is none.
      k: how many.

    Ties go to the first row, in a row to the first.
    Cost: 31 counting passes over the scores.
    """
    bits, threshold = _kth(scores, k)
    above, ties = bits > threshold, bits == threshold
    rows, batch, width = bits.shape
    turn = jnp.cumsum(jnp.moveaxis(ties, 0, 1).reshape(batch, -1), axis=1)
    turn = jnp.moveaxis(turn.reshape(batch, rows, width), 1, 0)
    return above | (ties & (turn <= (k - above.sum(axis=(0, 2)))[:, None]))


def _kth(scores: Float[Array, "R B T"], k: Int[Array, " B"]) -> tuple[Int[Array, "R B T"], Int[Array, "B 1"]]:
    """Scores as integers in the same order, and the k-th largest of all rows together; -1 has a negative integer."""
    bits = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.int32)

    def halve(_: Int[Array, ""] | int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # count(low) >= k > count(high)
        middle = low + (high - low) // 2
        enough = jnp.sum(bits >= middle[:, None], axis=(0, 2)) >= k
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    bounds = jnp.zeros_like(k), jnp.full_like(k, jnp.iinfo(jnp.int32).max)
    return bits, jax.lax.fori_loop(0, BITS, halve, bounds)[0][:, None]


def hand_out(
    wanted: Int[Array, "R B"],
    unit: int | Int[Array, "#B"] | Int[Array, ""],
    total: Int[Array, " B"],
    min_slots: Array,
    max_slots: Array,
) -> Int[Array, "R B"]:
    """Whole slots for each row, near `wanted / unit`, from `min_slots` to `max_slots`, `total` in all where possible.

    Each row gets the whole part of what it wants. What is left goes slot by slot to the row that lacks most, what is
    too much is taken from the row that lacks least; ties go to the first row.
    """
    start = jnp.clip(wanted // unit, min_slots, max_slots)
    lack = wanted - start * unit  # in 1 / unit slots
    left = total - start.sum(axis=0)
    above, below = max_slots - start, start - min_slots
    more = _largest(lack, unit, above, jnp.minimum(jnp.maximum(left, 0), above.sum(axis=0)))
    # Giving one up makes a row lack one more: the first to give has the least lack.
    fewer = _largest(-lack, unit, below, jnp.minimum(jnp.maximum(-left, 0), below.sum(axis=0)))
    return start + more - fewer


def _largest(lack: Array, unit: int | Array, slots: Array, count: Int[Array, " B"]) -> Int[Array, "R B"]:
    """Of all numbers `lack - t unit`, 0 <= t < slots, how many of the `count` largest belong to each row."""
    taken = lambda level: jnp.clip((lack - level) // unit + 1, 0, slots)

    def halve(_: Int[Array, ""] | int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # taken(low) >= count > taken(high)
        middle = low + (high - low) // 2
        enough = taken(middle).sum(axis=0) >= count
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    high = lack.max(axis=0) + 1
    low = (lack - slots * unit).min(axis=0)
    level = jax.lax.fori_loop(0, 32, halve, (low, high))[0]
    above = taken(level + 1)
    return jnp.where(count > 0, above + _in_turn(taken(level) - above, count - above.sum(axis=0)), 0)


def _in_turn(slots: Int[Array, "R B"], count: Int[Array, " B"]) -> Int[Array, "R B"]:
    """`count` things to rows in turn, each row filled before the next one."""
    before = jnp.cumsum(slots, axis=0) - slots
    return jnp.clip(count - before, 0, slots)
