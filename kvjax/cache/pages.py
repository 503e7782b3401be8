"""The page pool: which physical pages belong to which row.

Rows are flattened to one axis here: a table is `[rows M]`. An entry equal to the pool's size means "no page"; reads of
such an entry are masked by the caller, writes to it are dropped. Free pages are a stack. Popping and pushing are
cumulative sums, so allocation works inside `jit` and for all rows at once.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

LARGEST = 2**29  # slots; twice as many still fit 32 bits
SMALLEST_PAGE = 8
LARGEST_PAGE = 128


def ladder(n: int, steps: int, smallest: int) -> int:
    """The smallest rung >= n, with `steps` rungs per power of two and none closer than `smallest`.

    Shapes are taken from a ladder, so that a new length rarely means a new compilation. The excess is at most
    `1 / steps` of n (or `smallest - 1`).

    >>> [ladder(n, steps=8, smallest=64) for n in (1, 64, 65, 1000, 1025, 16000)]
    [64, 64, 128, 1024, 1152, 16384]
    """
    octave = 1 << max(n - 1, 1).bit_length() - 1
    step = max(octave // steps, smallest)
    return -(-n // step) * step


def page_size(row: int, platform: str | None = None) -> int:
    """Slots of a page for rows of up to `row` slots: the partly filled last page wastes at most 1/32 of a full row.

    But on TPUs every page has 128 slots, as many as a vector has lanes. A pool of smaller pages, if what it holds of a
    slot is narrower than that, would be laid with its pages on the lanes: each spread over the memory of 128.

    Args:
      row: slots.
      platform: "cpu", "gpu" or "tpu"; None = JAX's default.
    """
    if (platform or jax.default_backend()) == "tpu":
        return LARGEST_PAGE
    return min(max(1 << max(row // 32, 1).bit_length() - 1, SMALLEST_PAGE), LARGEST_PAGE)


def pages_for(slots, page: int):
    """Pages that hold `slots` slots; works on Python ints and on arrays."""
    return (slots + page - 1) // page


def grow(
    table: Int[Array, "rows M"],
    free: Int[Array, " P"],
    num_free: Int[Array, " one"],
    want: Int[Array, " rows"],
    max_new: int,
) -> tuple[Int[Array, "rows M"], Int[Array, " one"]]:
    """Give each row the first `want` pages of its table; at most the last `max_new` of them may be missing.

    When the pool runs dry the remaining entries stay empty.
    """
    rows, width = table.shape
    size = free.shape[0]
    logical = jnp.minimum(want, width)[:, None] - max_new + jnp.arange(max_new)
    held = table.at[jnp.arange(rows)[:, None], jnp.maximum(logical, 0)].get(mode="promise_in_bounds") < size
    need = (logical >= 0) & ~held
    rank = jnp.cumsum(need.reshape(-1)).reshape(need.shape) - 1
    granted = need & (rank < num_free)
    page = free[jnp.where(granted, num_free - 1 - rank, 0)]
    at = jnp.where(granted, logical, width)
    table = table.at[jnp.arange(rows)[:, None], at].set(page, mode="drop")
    return table, num_free - jnp.sum(granted, dtype=num_free.dtype)


def shrink(
    table: Int[Array, "rows M"],
    free: Int[Array, " P"],
    num_free: Int[Array, " one"],
    want: Int[Array, " rows"],
) -> tuple[Int[Array, "rows M"], Int[Array, " P"], Int[Array, " one"]]:
    """Leave each row the first `want` pages of its table and push the others back."""
    size = free.shape[0]
    drop = (jnp.arange(table.shape[1]) >= want[:, None]) & (table < size)
    rank = jnp.cumsum(drop.reshape(-1)).reshape(drop.shape) - 1
    free = free.at[jnp.where(drop, num_free + rank, size)].set(table, mode="drop")
    return jnp.where(drop, size, table), free, num_free + jnp.sum(drop, dtype=num_free.dtype)
