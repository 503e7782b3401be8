"""A tier: slots of one number format in a pool of pages that all rows share, and the operations on it.

A policy sees one layer at a time (`layer`, `with_layer`) and logical slots; only this file and `pages.py` know pages.
Slots `[0, length)` of a row are filled. Their order carries no meaning unless a policy gives it one.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from kvjax.cache import pages
from kvjax.cache.store import KVStore
from kvjax.spec import PyTree
from pallas_kernels.pools import lies_across, reading

PER_ROW = ("table", "length", "budget", "balance", "state")  # fields of a tier that a layer has a part of
SHAPE = ("layers", "batch", "heads", "row", "page", "slots", "widths", "store", "dtype", "positions", "scores")
FEW = 4  # slots of a row that may be read with their pages


class Tier(NamedTuple):
    """A pool of pages and, per row, which of them hold its slots; on a mesh each device's own, side by side.

    With a leading `L` axis it is the tier of several layers of equal widths, without it one layer's view.
    """

    k: PyTree  # key codes, every leaf [P page ...]
    v: PyTree  # value codes, every leaf [P page ...]
    pos: Int[Array, "P page"] | tuple  # position of the slot's token; () = slot s holds position s
    score: Float[Array, "P page"] | tuple  # the policy's statistic; () = none is kept
    table: Int[Array, "*L B K M"]  # physical page of a row's m-th logical page; P = none
    length: Int[Array, "*L B K"]  # filled slots
    budget: Int[Array, "*L B K"]  # slots that the row may keep
    free: Int[Array, " P"]  # stack of free pages
    num_free: Int[Array, " one"]  # an entry for each device that has a pool of its own
    balance: Float[Array, "*L B K R"] | tuple  # of a balanced store: factor on each channel of keys; () = none
    state: PyTree  # what the policy remembers of each row, a NamedTuple of its own; every leaf [*L B K ...]

    @property
    def page(self) -> int:
        """Slots of a page."""
        return jax.tree.leaves(self.k)[0].shape[1]

    @property
    def capacity(self) -> int:
        """Slots that a row's table can address."""
        return self.table.shape[-1] * self.page


class Slots(NamedTuple):
    """The contents of slots, every leaf `[B K n ...]`; `pos` and `score` are () where the tier keeps none."""

    k: PyTree
    v: PyTree
    pos: Int[Array, "B K n"] | tuple = ()
    score: Float[Array, "B K n"] | tuple = ()


class Bytes(NamedTuple):
    """Allocated bytes by part; the parts add up to `total`."""

    payload: int  # codes of filled slots
    scales: int  # scales and zero points
    statistics: int  # positions, scores, balances, the policy's state
    tables: int  # page tables, lengths, budgets, free list
    slack: int  # codes of slots that are allocated and empty
    total: int


@functools.partial(jax.jit, static_argnames=SHAPE)  # one by one, its arrays would take as many programs
def init(
    *,
    layers: int,
    batch: int,
    heads: int,
    row: int,
    page: int | None = None,
    slots: int,
    widths: tuple[int, int],
    store: KVStore,
    dtype: DTypeLike,
    positions: bool = True,
    scores: bool = False,
    state: PyTree = (),
) -> Tier:
    """An empty tier.

    Args:
      layers, batch, heads: L, B, K.
      row: most slots that any row may fill.
      page: slots of a page; None = `pages.page_size(row)`, for rows of equal lengths.
      slots: slots of all rows together, each row rounded up to whole pages.
      widths: cached width of keys and of values.
      store: codecs of both.
      dtype: the model's dtype.
      positions: store each slot's position; without, slot s holds position s.
      scores: store a statistic per slot.
      state: of the policy, every leaf `[L B K ...]`.
    """
    page = page or pages.page_size(row)
    size = -(-slots // page)
    width = pages.pages_for(row, page)
    return Tier(
        k=store.key.init(size, page, widths[0], dtype),
        v=store.value.init(size, page, widths[1], dtype),
        pos=jnp.full((size, page), -1, jnp.int32) if positions else (),
        score=jnp.zeros((size, page), jnp.float32) if scores else (),
        table=jnp.full((layers, batch, heads, width), size, jnp.int32),
        length=jnp.zeros((layers, batch, heads), jnp.int32),
        budget=jnp.full((layers, batch, heads), row, jnp.int32),
        free=jnp.arange(size, dtype=jnp.int32),
        num_free=jnp.asarray([size], jnp.int32),
        balance=jnp.ones((layers, batch, heads, widths[0])) if store.balanced else (),
        state=state,
    )


def layer(tier: Tier, index: int | Int[Array, ""]) -> Tier:
    """One layer's view."""
    pick = lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
    return tier._replace(**{name: jax.tree.map(pick, getattr(tier, name)) for name in PER_ROW})


def with_layer(tier: Tier, index: int | Int[Array, ""], old: Tier, new: Tier) -> Tier:
    """The tier with one layer's view written back; what is still the same array as in `old` is left alone."""

    def put_back(x: Array, before: Array, after: Array) -> Array:
        return x if after is before else jax.lax.dynamic_update_index_in_dim(x, after, index, 0)

    merged = {name: jax.tree.map(put_back, *(getattr(each, name) for each in (tier, old, new))) for name in PER_ROW}
    return new._replace(**merged)


def reserve(tier: Tier, n: Int[Array, "*L B K"], max_new: int) -> Tier:
    """Take pages, so that the first `n` slots of each row can be written.

    Args:
      tier: a tier or a layer's view.
      n: slots per row; rows that have room for them are left alone.
      max_new: bound on the slots that may be new.
    """
    rows = tier.length.size
    new_pages = min(pages.pages_for(max_new, tier.page) + (max_new > 1), tier.table.shape[-1])
    table, num_free = pages.grow(
        tier.table.reshape(rows, -1), tier.free, tier.num_free, pages.pages_for(n, tier.page).reshape(rows), new_pages
    )
    return tier._replace(table=table.reshape(tier.table.shape), num_free=num_free)


def take(tier: Tier, slot: Int[Array, "B K n"]) -> Slots:
    """The contents of slots of a layer's view; empty slots hold anything, their position is -1."""
    page, offset = _locate(tier, slot)
    read = lambda x: _read(x, page, offset)
    filled = slot < tier.length[..., None]
    return Slots(
        k=jax.tree.map(read, tier.k),
        v=jax.tree.map(read, tier.v),
        pos=jnp.where(filled, slot if isinstance(tier.pos, tuple) else read(tier.pos), -1),
        score=() if isinstance(tier.score, tuple) else read(tier.score),
    )


def put(tier: Tier, slot: Int[Array, "B K n"], slots: Slots, where: Bool[Array, "B K n"]) -> Tier:
    """Write slots of a layer's view, in place when donated; rows grow to hold them.

    Args:
      tier: a layer's view.
      slot: where to write: a filled slot, or appending in order from `length`, in pages that `reserve` took. During
        decoding one slot per row is reserved (see `PoolHooks.reserve`).
      slots: what to write, as codes, dense ones in any dtype; `pos` and `score` are ignored where the tier keeps none.
      where: False drops the write.
    """
    page, offset = _locate(tier, slot)
    page = jnp.where(where, page, tier.free.shape[0])
    written = page < tier.free.shape[0]
    write = lambda x, y: _write(x, page, offset, y.astype(x.dtype))
    return _with(tier, slots, write, jnp.where(written, slot + 1, 0))


def fill(tier: Tier, slots: Slots, count: Int[Array, "B K"]) -> Tier:
    """Write the first `count` slots of each row of a layer's view, page by page, in those that `reserve` took.

    At most as many as `slots`, `[B K n ...]`, have. What follows them there is written, too, to the end of a page: it
    must be finite, since attention multiplies what empty slots hold by weights of 0. A prompt's padding is.
    """
    n = jax.tree.leaves(slots.k)[0].shape[2]
    m, count = min(pages.pages_for(n, tier.page), tier.table.shape[-1]), jnp.minimum(count, n)
    first = jnp.arange(m) * tier.page
    page = jnp.where(first < count[..., None], tier.table[..., :m], tier.free.shape[0])
    written = jnp.where(page < tier.free.shape[0], jnp.minimum(first + tier.page, count[..., None]), 0)

    def write(pool: Array, x: Any) -> Array:
        x = x.astype(pool.dtype)[:, :, : m * tier.page]
        x = jnp.pad(x, [(0, 0), (0, 0), (0, m * tier.page - x.shape[2]), *[(0, 0)] * (x.ndim - 3)])
        return pool.at[page].set(x.reshape(*page.shape, *pool.shape[1:]), mode="drop")

    return _with(tier, slots, write, written)


def gather_masked(
    where: Bool[Array, "B K n"], k: Float[Array, "B K n R"], v: Float[Array, "B K n W"]
) -> tuple[Float[Array, "B K n R"], Float[Array, "B K n W"], Int[Array, "B K n"]]:
    """Keys, values and places of the tokens that are marked in each row, one after the other; then the first token's.

    Gathered before they are encoded, as `fill` writes them: codes of few bits would be wide in a TPU's memory.
    """
    _, index = jax.vmap(jax.vmap(lambda row: _places(row, row.size)))(where)
    take = lambda x: jnp.take_along_axis(x, index[..., None], axis=2)
    return take(k), take(v), index


def trim(tier: Tier, n: Int[Array, "*L B K"]) -> Tier:
    """Keep the first `n` slots of each row and give the pages behind them back.

    Args:
      tier: a tier or a layer's view.
      n: slots to keep; rows that hold fewer are left alone.
    """
    length = jnp.minimum(tier.length, n)
    rows = tier.length.size
    want = pages.pages_for(length, tier.page).reshape(rows)
    table, free, num_free = pages.shrink(tier.table.reshape(rows, -1), tier.free, tier.num_free, want)
    return tier._replace(table=table.reshape(tier.table.shape), free=free, num_free=num_free, length=length)


def place(tier: Tier, slot: Int[Array, "B K n"], pos: Int[Array, "B K n"], where: Bool[Array, "B K n"]) -> Tier:
    """Write the positions of filled slots of a layer's view."""
    assert not isinstance(tier.pos, tuple)
    page, offset = _locate(tier, slot)
    return tier._replace(pos=_write(tier.pos, jnp.where(where, page, tier.free.shape[0]), offset, pos))


def expired(tier: Tier, now: Int[Array, " B"], window: int | None) -> tuple[Bool[Array, "B K"], Int[Array, "B K"]]:
    """Whether a row of a layer's view has a slot that nobody can read again, and where its next token goes.

    A slot has left a sliding window at position `now`; without a window none has. The token goes into the first one
    that has, else behind the last slot.
    """
    if window is None:
        return jnp.zeros(tier.length.shape, bool), tier.length
    pos = positions(tier)
    left = (pos >= 0) & (pos <= (now - window)[:, None, None])
    gone = jnp.any(left, axis=-1)
    return gone, jnp.where(gone, jnp.argmax(left, axis=-1), tier.length)


def remove(tier: Tier, slot: Int[Array, "B K"], where: Bool[Array, "B K"]) -> tuple[Tier, Slots]:
    """Remove one slot of each row, and return it: the row's last slot takes its place. The row keeps its pages."""
    last = jnp.maximum(tier.length - 1, 0)
    # Read together, and before the write: a pool that is read once more after it is written would be copied.
    both = jax.lax.optimization_barrier(take(tier, jnp.stack([slot, last], axis=-1)))
    lost, moved = (jax.tree.map(lambda x, i=i: x[:, :, i : i + 1], both) for i in (0, 1))
    return put(tier, slot[..., None], moved, where[..., None])._replace(
        length=jnp.where(where, last, tier.length)
    ), lost


def reading_keys(tier: Tier, per_block: int, run: Callable[[Callable[[Int[Array, ""]], PyTree]], Any]) -> Any:
    """A loop that reads the keys of a layer's view, a block of `per_block` pages at a time.

    `run` is given a function of a block's number: its key codes `[B K n ...]`; empty slots hold anything.
    """
    pad = ((0, 0), (0, 0), (0, -tier.table.shape[-1] % per_block))
    table = jnp.pad(tier.table, pad, constant_values=tier.free.shape[0])
    slots = lambda x: x.reshape(*tier.length.shape, per_block * tier.page, *x.shape[4:])
    at = lambda i: jax.lax.dynamic_slice_in_dim(table, i * per_block, per_block, axis=2)
    return reading(tier.k, lambda pages: run(lambda i: jax.tree.map(slots, pages(at(i)))))


def positions(tier: Tier) -> Int[Array, "B K S"]:
    """Position of every slot of a layer's view, -1 where it is empty."""
    slot = jnp.arange(tier.capacity)
    pos = slot if isinstance(tier.pos, tuple) else _rows(tier, tier.pos)
    return jnp.where(slot < tier.length[..., None], pos, -1)


def held(tier: Tier) -> Int[Array, "*L B K"]:
    """Filled slots of each row but for those at position -1, whose tokens are read from another tier."""
    if isinstance(tier.pos, tuple):
        return tier.length
    count = lambda table, length: jnp.sum(positions(tier._replace(table=table, length=length)) >= 0, -1, jnp.int32)
    if tier.table.ndim == 3:
        return count(tier.table, tier.length)
    return jax.lax.map(lambda rows: count(*rows), (tier.table, tier.length))


def scores(tier: Tier) -> Float[Array, "B K S"]:
    """The statistic of every slot of a layer's view; empty slots hold anything."""
    if isinstance(tier.score, tuple):
        raise ValueError("this tier keeps no scores: allocate it with scores=True")
    return _rows(tier, tier.score)


def with_scores(tier: Tier, score: Float[Array, "B K S"]) -> Tier:
    """Write the statistic of every slot of a layer's view."""
    if isinstance(tier.score, tuple):
        raise ValueError("this tier keeps no scores: allocate it with scores=True")
    paged = score.reshape(*tier.table.shape, tier.page)
    return tier._replace(score=tier.score.at[tier.table].set(paged, mode="drop"))


def resize(tier: Tier, size: int, width: int | None = None) -> Tier:
    """A copy of the tier with a pool of `size` pages, at least as many as its rows hold.

    A row's table can address `width` pages then, at least as many as before; None = as many as before.
    """
    before, place = tier.free.shape[0], jnp.arange(size, dtype=jnp.int32)
    held = jnp.zeros(before, bool).at[tier.table].set(True, mode="drop")
    (number, source), count = _places(held, size), jnp.sum(held, dtype=jnp.int32)
    pick = lambda tree: jax.tree.map(lambda x: x[source], tree)
    table = jnp.where(tier.table < before, number[jnp.minimum(tier.table, before - 1)], size)
    more = 0 if width is None else width - tier.table.shape[-1]
    return tier._replace(
        k=pick(tier.k),
        v=pick(tier.v),
        pos=pick(tier.pos),
        score=pick(tier.score),
        table=jnp.pad(table, [(0, 0)] * (table.ndim - 1) + [(0, more)], constant_values=size),
        free=jnp.minimum(place + count, size - 1),
        num_free=(size - count)[None],
    )


def nbytes(tier: Tier, length: np.ndarray | None = None, itemsize: int | None = None) -> Bytes:
    """Bytes of a tier by part, as allocated.

    Args:
      tier: whose arrays are counted.
      length: filled slots, on the host, without those that are not `held`; None = all that are filled, read back.
      itemsize: count values that no store encodes as this many bytes each; None = as many as they have.
    """
    length = np.asarray(tier.length) if length is None else length
    bits = lambda x: x.size * jax.dtypes.itemsize_bits(x.dtype)
    size = lambda tree: sum(math.ceil(bits(x) / 8) for x in jax.tree.leaves(tree))
    plain = lambda codes: itemsize is not None and not isinstance(codes, dict)
    payload = sum(itemsize * x.size if plain(x) else size(_payload(x)) for x in (tier.k, tier.v))
    scales = sum(size(x) - size(_payload(x)) for x in (tier.k, tier.v))
    statistics = size((tier.pos, tier.score, tier.balance, tier.state))
    tables = size((tier.table, tier.length, tier.budget, tier.free, tier.num_free))
    slots = tier.free.shape[0] * tier.page
    filled = payload * int(np.sum(length)) // slots
    return Bytes(filled, scales, statistics, tables, payload - filled, payload + scales + statistics + tables)


def _places(marks: Bool[Array, " n"], size: int) -> tuple[Int[Array, " n"], Int[Array, " size"]]:
    """How many marks go before each place, less one at places without; the places of the first `size` marks, then 0."""
    number = jnp.cumsum(marks, dtype=jnp.int32) - 1
    return number, jnp.zeros(size, jnp.int32).at[jnp.where(marks, number, size)].set(
        jnp.arange(marks.size), mode="drop"
    )


def _payload(codes: PyTree) -> PyTree:
    return codes["codes"] if isinstance(codes, dict) else codes


def _locate(tier: Tier, slot: Int[Array, "B K n"]) -> tuple[Int[Array, "B K n"], Int[Array, "B K n"]]:
    """Physical page (P where there is none) and offset of logical slots."""
    logical = slot // tier.page
    page = jnp.take_along_axis(tier.table, logical, axis=-1, mode="clip")
    return jnp.where(logical < tier.table.shape[-1], page, tier.free.shape[0]), slot % tier.page


def _with(tier: Tier, slots: Slots, write: Callable[[Array, Any], Array], ends: Int[Array, "B K n"]) -> Tier:
    """A layer's view with slots written to each pool, its rows filled up to the last of some ends."""
    return tier._replace(
        k=jax.tree.map(write, tier.k, slots.k),
        v=jax.tree.map(write, tier.v, slots.v),
        pos=tier.pos if isinstance(tier.pos, tuple) else write(tier.pos, slots.pos),
        score=tier.score if isinstance(tier.score, tuple) else write(tier.score, slots.score),
        length=jnp.maximum(tier.length, jnp.max(ends, axis=-1)),
    )


def _read(pool: Array, page: Int[Array, "B K n"], offset: Int[Array, "B K n"]) -> Array:
    """Slots `[B K n ...]` of a pool's leaf `[P page ...]`, on TPUs with their pages where they are few."""

    def slots(pool: Array) -> Array:
        return pool.at[page, offset].get(mode="clip")

    def of_whole_pages(pool: Array) -> Array:
        here = (jnp.arange(pool.shape[1]) == offset[..., None])[..., None]
        return jnp.where(here, pool.at[page].get(mode="clip"), 0).sum(axis=3, dtype=pool.dtype)

    if page.shape[-1] > FEW or not lies_across(pool):
        return slots(pool)
    return jax.lax.platform_dependent(pool, tpu=of_whole_pages, default=slots)


def _write(pool: Array, page: Int[Array, "B K n"], offset: Int[Array, "B K n"], x: Array) -> Array:
    """A pool's leaf `[P page ...]` with slots `[B K n ...]` written, those in page P dropped.

    On TPUs with their pages, one of every row at a time, if they are not more than a page's.
    """
    n = page.shape[-1]

    def slots(pool: Array, x: Array) -> Array:
        return pool.at[page, offset].set(x, mode="drop")

    def whole_pages(pool: Array, x: Array) -> Array:
        def write(i: int | Array, pool: Array) -> Array:
            own, at, new = (jax.lax.dynamic_index_in_dim(y, i, 2, keepdims=False) for y in (page, offset, x))
            here = (jnp.arange(pool.shape[1]) == at[..., None])[..., None]
            return pool.at[own].set(jnp.where(here, new[:, :, None], pool.at[own].get(mode="clip")), mode="drop")

        return write(0, pool) if n == 1 else jax.lax.fori_loop(0, n, write, pool)

    if n > pages.LARGEST_PAGE or not lies_across(pool):
        return slots(pool, x)
    return jax.lax.platform_dependent(pool, x, tpu=whole_pages, default=slots)


def _rows(tier: Tier, pool: Array) -> Array:
    """A pool's leaf `[P page ...]` as rows `[B K S ...]`."""
    return pool.at[tier.table].get(mode="clip").reshape(*tier.length.shape, tier.capacity, *pool.shape[2:])
