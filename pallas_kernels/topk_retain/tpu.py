"""Top-k retention on TPUs: Pallas, lowered by Mosaic.

Eight rows at a time, one in each sublane, are read into vector memory once and stay there. The least priority that is
kept is found bit by bit, seen as an integer in the same order. Sums over 128 tokens are products with a triangle, since
a vector has no cumulative sum; so each kept token learns how many before it go, which is how far it has to move. All
tokens move at once by 1, 2, 4, ... places, as their distances' bits say, the lowest first. No two of them meet: between
neighbours that are kept, as many places lie as their distances differ by,

    (j - s_j mod M) - (i - s_i mod M) = 1 + (s_j div M - s_i div M) M >= 1         for i < j, M = 2, 4, 8, ...

Positions and scores move along. Then XLA sorts what is kept, and keys and values are copied (`tpu_copy`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Bool, Float, Int, Shaped

from pallas_kernels.blocks import LANES
from pallas_kernels.topk_retain.reference import LEAST, Kept, check, ordered
from pallas_kernels.topk_retain.tpu_copy import SPARE, copy

ROWS = 8  # sublanes of a vector


def topk_retain(
    priority: Float[Array, "B K T"],
    count: Int[Array, "B K"],
    k: Shaped[Array, "B K T R"],
    v: Shaped[Array, "B K T W"],
    pos: Int[Array, "B K T"],
    stat: Float[Array, "B K T"],
    *,
    n: int,
    chunk: int = 1024,
    interpret: Any = False,
) -> Kept:
    """The best tokens of each row: the contract of `reference.topk_retain`.

    Args:
      chunk: tokens that are held in registers, a multiple of 128.
      interpret: run without a TPU, slowly: True, or `pltpu.InterpretParams`.
    """
    check(n, priority)
    shape, t = priority.shape[:2], priority.shape[-1]
    key = ordered(priority.astype(jnp.float32))
    count = jnp.clip(count, 0, n)
    found = _select([x.reshape(-1, t) for x in (key, pos, stat)], count.reshape(-1), n, chunk, interpret)
    key, pos, stat, index = (x.reshape(*shape, n) for x in found)
    filled = jnp.arange(n) < count[..., None]
    empty = (~LEAST, t, -1, 0)
    slots = (
        jnp.where(filled, x, jnp.asarray(y, x.dtype)) for x, y in zip((~key, index, pos, stat), empty, strict=True)
    )
    _, index, pos, stat = jax.lax.sort(tuple(slots), num_keys=2, is_stable=False)

    def pick(x: Array) -> Array:
        found = copy(x.reshape(-1, *x.shape[2:]), index.reshape(-1, n), count.reshape(-1), interpret)
        return found.reshape(*shape, *found.shape[1:])

    return Kept(index, pick(k), pick(v), pos, stat)


def _select(
    rows: Sequence[Shaped[Array, "r T"]], count: Int[Array, " r"], n: int, chunk: int, interpret: Any
) -> list[Shaped[Array, "r n"]]:
    """What rows have at their best tokens, in the order of time, and these tokens' indices; the first are compared."""
    r, t = rows[0].shape
    chunk = min(chunk, pl.cdiv(t, LANES) * LANES)
    tokens, slots = pl.cdiv(t, chunk) * chunk, pl.cdiv(n, LANES) * LANES
    more = -r % ROWS
    pad = lambda x, fill: jnp.pad(x, ((0, more), (0, tokens - t)), constant_values=fill)
    rows = [pad(x, fill) for x, fill in zip(rows, (LEAST, 0, 0), strict=True)]
    dtypes = [*(x.dtype for x in rows), jnp.dtype(jnp.int32)]
    held = sum(ROWS * (tokens + chunk) * dtype.itemsize for dtype in dtypes) + SPARE
    if not interpret and held > (room := pltpu.get_tpu_info().vmem_capacity_bytes):
        raise NotImplementedError(f"rows of {t} tokens take {held} bytes of vector memory, of {room}")
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    *found, shift = pl.pallas_call(
        functools.partial(_kernel, chunk=chunk, bits=(t - 1).bit_length()),
        out_shape=[jax.ShapeDtypeStruct((r + more, slots), dtype) for dtype in dtypes],
        grid=((r + more) // ROWS,),
        in_specs=[pl.BlockSpec((ROWS, LANES), lambda i: (i, 0)), *[anywhere] * len(rows)],
        out_specs=[anywhere] * len(dtypes),
        scratch_shapes=[pltpu.VMEM((ROWS, tokens + chunk), dtype) for dtype in dtypes],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=held),
        interpret=interpret,
        name="topk_retain",
    )(jnp.broadcast_to(jnp.pad(count, (0, more))[:, None], (r + more, LANES)), *rows)
    return [x[:r, :n] for x in (*found, jnp.arange(slots) + shift)]


def _kernel(count_ref: Any, *refs: Any, chunk: int, bits: int) -> None:
    sources, outs, held = refs[:3], refs[3:7], refs[7:]
    key_ref, *_, shift_ref = held
    tokens, slots = sources[0].shape[1], outs[0].shape[1]
    rows = pl.ds(pl.multiple_of(pl.program_id(0) * ROWS, ROWS), ROWS)
    for source, ref in zip(sources, held, strict=False):
        pltpu.sync_copy(source.at[rows], ref.at[:, pl.ds(0, tokens)])
    count = count_ref[:, :1].astype(jnp.float32)
    _distances(key_ref, shift_ref, count, _threshold(key_ref, count, tokens, chunk), tokens, chunk)
    shift_ref[:, pl.ds(tokens, chunk)] = jnp.zeros((ROWS, chunk), jnp.int32)
    for bit in range(bits):
        _move(held, 1 << bit, tokens, chunk)
    for ref, out in zip(held, outs, strict=True):
        pltpu.sync_copy(ref.at[:, pl.ds(0, slots)], out.at[rows])


def _each(tokens: int, chunk: int, do: Callable[[Array, Any], Any], start: Any = None) -> Any:
    """Do something with the first token of each chunk, in order, and what was done before."""
    return jax.lax.fori_loop(0, tokens // chunk, lambda i, x: do(pl.multiple_of(i * chunk, chunk), x), start)


def _pieces(x: Array) -> list[Array]:
    return [x[:, at : at + LANES] for at in range(0, x.shape[1], LANES)]


def _reaching(key_ref: Any, bound: Int[Array, "rows 1"], tokens: int, chunk: int) -> Float[Array, "rows 1"]:
    """How many priorities are higher than a bound."""

    def add(start: Array, total: Array) -> Array:
        higher = key_ref[:, pl.ds(start, chunk)] > bound
        return functools.reduce(jnp.add, _pieces(_numbers(higher)), total)

    return _each(tokens, chunk, add, jnp.zeros((ROWS, LANES), jnp.float32)).sum(axis=1, keepdims=True)


def _numbers(x: Bool[Array, "*n"]) -> Float[Array, "*n"]:
    return jnp.where(x, 1.0, 0.0)


def _threshold(key_ref: Any, count: Float[Array, "rows 1"], tokens: int, chunk: int) -> Int[Array, "rows 1"]:
    """The largest value that at least `count` priorities reach."""

    def fix(i: Array, low: Array) -> Array:
        bound = low + jnp.left_shift(1, 31 - i)  # the highest bit is the sign: from the least integer to 0
        return jnp.where(_reaching(key_ref, bound - 1, tokens, chunk) >= count, bound, low)

    return jax.lax.fori_loop(0, 32, fix, jnp.full((ROWS, 1), LEAST, jnp.int32))


def _distances(key_ref: Any, shift_ref: Any, count: Array, threshold: Array, tokens: int, chunk: int) -> None:
    """Write by how many places each kept token moves; 0 for the others."""
    ties_kept = count - _reaching(key_ref, threshold, tokens, chunk)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
    triangle = _numbers(row <= column).astype(jnp.bfloat16)

    def write(start: Array, before: tuple[Array, Array]) -> tuple[Array, Array]:
        key = key_ref[:, pl.ds(start, chunk)]
        masks = [_numbers(mask) for mask in (key > threshold, key == threshold)]
        stacked = jnp.concatenate([piece for mask in masks for piece in _pieces(mask)], axis=0).astype(jnp.bfloat16)
        ranks = jnp.dot(stacked, triangle, preferred_element_type=jnp.float32)
        above, tied = before
        for i, (higher, tie) in enumerate(zip(*map(_pieces, masks), strict=True)):
            rank = lambda j: ranks[j * ROWS : (j + 1) * ROWS]
            rank_above, rank_tied = above + rank(i), tied + rank(i + chunk // LANES)
            keep = (higher > 0) | ((tie > 0) & (rank_tied <= ties_kept))
            slot = rank_above + jnp.minimum(rank_tied, ties_kept) - 1
            token = start + i * LANES + jax.lax.broadcasted_iota(jnp.int32, keep.shape, 1)
            distance = jnp.where(keep, token - slot.astype(jnp.int32), 0)
            shift_ref[:, pl.ds(pl.multiple_of(start + i * LANES, LANES), LANES)] = distance
            above, tied = rank_above[:, -1:], rank_tied[:, -1:]
        return above, tied

    _each(tokens, chunk, write, (jnp.zeros((ROWS, 1), jnp.float32),) * 2)


def _move(held: Sequence[Any], by: int, tokens: int, chunk: int) -> None:
    """Move tokens `by` places towards the first, where their distance has that bit."""

    def move(start: Array, _: Any) -> None:
        here = pl.ds(start, chunk)

        def coming(ref: Any) -> Array:
            if by >= LANES:
                return ref[:, pl.ds(pl.multiple_of(jnp.minimum(start + by, tokens), LANES), chunk)]
            return pltpu.roll(ref[:, pl.ds(start, chunk + LANES)], chunk + LANES - by, 1)[:, :chunk]

        *others, shift_ref = held
        stays, comes = shift_ref[:, here], coming(shift_ref)
        taken = (comes & by) != 0
        for ref in others:
            ref[:, here] = jnp.where(taken, coming(ref), ref[:, here])
        shift_ref[:, here] = jnp.where(taken, comes, jnp.where((stays & by) != 0, 0, stays))

    _each(tokens, chunk, move)
