"""Decode attention on GPUs: Pallas, lowered by Triton.

A program reads a share of one row's filled slots, a block at a time. Slots are the rows of every matrix and the few
query heads its columns, so no product is padded to sixteen queries. Codes of a few bits are spread into bfloat16 with
one logical instruction for two of them and are never scaled: with number = code x scale + zero,

    q . key      = scale (q . codes) + zero (sum of q)                  once per slot and group
    sum p value  = sum (p scale) codes + sum p zero                     once per slot and group

`codes` carry a bias there (see `gpu_block.spread`), which the zero term takes back.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Int

from pallas_kernels.codes import assemble, to_numbers, whole
from pallas_kernels.decode_attention import gpu_expand
from pallas_kernels.decode_attention.formats import Format, format_of
from pallas_kernels.decode_attention.gpu_block import Block, bias_of, spread
from pallas_kernels.decode_attention.reference import EMPTY, KeyExpansion, PagedKV, Partial, merge
from pallas_kernels.product import dot
from pallas_kernels.soft_cap import soft_cap

LOG2E = math.log2(math.e)
PROGRAMS = 2 * 132  # that fill a chip: two for each multiprocessor of an H200
NARROWEST = 16  # numbers of a piece, slots of a block: the least width of a matrix product
WIDEST = 128
SMALL_PAGE = 64  # slots: rows of smaller pages are gathered slot by slot


def decode_attention(
    parts: Sequence[PagedKV],
    *,
    scale: float,
    after: Int[Array, "B K"] | None = None,
    cap: float | None = None,
    place: Callable[[Int[Array, "B K S"]], Int[Array, "B K S"]] | None = None,
    expand: KeyExpansion | None = None,
    with_logits: bool = False,
    block: int | None = None,
    splits: int | None = None,
    interpret: bool = False,
) -> Partial:
    """Attention of one query per row: the contract of `reference.decode_attention`, in one launch.

    Args:
      block: slots of a step, a power of two; None = by the width of codes.
      splits: programs of a row; None = as many as fill a large chip.
      interpret: run without a GPU, slowly.
    """
    plans = [_plan(part, block, expand) for part in parts]
    rows, g = math.prod(parts[0].q.shape[:2]), parts[0].q.shape[2]
    splits = splits or max(1, min(PROGRAMS // rows, max(plan.steps for plan in plans) // 4))
    flat = lambda x: x.reshape(rows, *x.shape[2:])
    # Triton's blocks are powers of two: query heads are padded, 3 of them to 4.
    lanes = 1 << (g - 1).bit_length()
    positions = place is None and (after is not None or expand is not None)
    inputs = {
        "parts": [
            {
                "q": jnp.pad(flat(part.q), ((0, 0), (0, lanes - g), (0, 0))), "k": part.k, "v": part.v,
                "table": flat(part.table), "length": flat(part.length), "pos": part.pos if positions else None,
                "place": None if place is None else _places(part, plan, place),
            }
            for part, plan in zip(parts, plans, strict=True)
        ],
        "after": None if after is None else flat(after),
        "expand": None if expand is None else gpu_expand.operands(expand, parts[0].length.shape),
    }  # fmt: skip
    warps, stages = 4, 3
    if expand is not None:
        scale *= expand.rotation.magnitude
        warps, stages = gpu_expand.WARPS, gpu_expand.stages(expand, [plan.key for plan in plans])
    leaves, tree = jax.tree.flatten(inputs)
    shapes, results = jax.tree.flatten([_results(plan, rows, splits, lanes, with_logits) for plan in plans])
    body = functools.partial(
        _kernel, tree=tree, results=results, plans=plans, splits=splits, scale=scale, cap=cap, interpret=interpret
    )
    found = pl.pallas_call(
        body,
        out_shape=shapes,
        grid=(rows, splits),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=stages),
        name="decode_attention",
    )(*leaves)
    return merge([_partial(*each) for each in zip(parts, plans, jax.tree.unflatten(results, found), strict=True)])


class _Plan(NamedTuple):
    """How a part is read; hashable."""

    key: Format
    value: Format
    page: int  # slots
    block: int  # slots of a step
    steps: int  # that read a full row


def _plan(part: PagedKV, block: int | None, expand: KeyExpansion | None) -> _Plan:
    # Halves of keys that are rotated as they lie are in different pieces.
    turned = expand is not None and expand.up is None
    widest = min(WIDEST, part.q.shape[-1] // 2) if turned else WIDEST
    key = _format("keys", part.decode_key, part.k, part.q.dtype, widest)
    value = _format("values", part.decode_value, part.v, part.q.dtype)
    if value.run:
        raise NotImplementedError("values with scales per channel are for xla only")
    if key.run and part.page % key.run:
        raise NotImplementedError(f"runs of {key.run} slots in pages of {part.page}, across two of them")
    if expand is not None:
        gpu_expand.check(expand, key, value, 1 << (part.q.shape[2] - 1).bit_length())
        block = block or gpu_expand.SLOTS
    block = key.run or block or min(_block(key, value), max(NARROWEST, 1 << (part.capacity - 1).bit_length()))
    if part.page >= SMALL_PAGE and part.page & (part.page - 1) == 0:
        block = min(block, part.page)
    return _Plan(key, value, part.page, block, pl.cdiv(part.capacity, block))


def _places(part: PagedKV, plan: _Plan, place: Callable[[Array], Array]) -> Int[Array, "rows slots"]:
    """Of a row's slots, padded to whole steps."""
    found = part.places(place).reshape(-1, part.capacity)
    return jnp.pad(found, ((0, 0), (0, plan.steps * plan.block - part.capacity)))


def _block(key: Format, value: Format) -> int:
    """Slots of a step: registers hold a block's numbers, and shared memory a few blocks' codes."""
    if jnp.float32 in (key.dtype, value.dtype):
        return 32
    bits = {key.bits, value.bits}
    return 64 if 3 in bits else 256 if max(bits) < 8 else 128


def _format(name: str, decode: Any, codes: Any, dtype: DTypeLike, widest: int = WIDEST) -> Format:
    """How a pool is read; raises `NotImplementedError` for what this kernel cannot read."""
    made = format_of(name, decode, codes, dtype, widest)
    least = min(piece.width for piece in made.pieces)
    if least < NARROWEST:
        raise NotImplementedError(f"{name} of {made.width} numbers have a piece of {least}, less than {NARROWEST}")
    return made


def _results(plan: _Plan, rows: int, splits: int, lanes: int, logits: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """What the programs of a row make of a part."""
    of_split = lambda *shape: jax.ShapeDtypeStruct((rows, splits, *shape, lanes), jnp.float32)
    packed = sum(piece.width for piece in plan.value.pieces)
    shapes = {"o": of_split(packed), "zero": of_split(max(plan.value.groups, 1)), "l": of_split(), "m": of_split()}
    slots = jax.ShapeDtypeStruct((rows, lanes, plan.steps * plan.block), jnp.float32)
    return shapes | ({"logits": slots} if logits else {})


def _partial(part: PagedKV, plan: _Plan, found: dict[str, Array]) -> Partial:
    """What the splits of a part's rows found, merged."""
    (b, heads, g), value = part.q.shape[:3], plan.value
    o, zero, l, m = (found[name][..., :g] for name in ("o", "zero", "l", "m"))
    # Splits without a slot hold nothing. XLA may not see through the maximum: its own fusion has lost it before.
    top = jax.lax.optimization_barrier(m.max(axis=1))
    back = jnp.exp(m - top[:, None])
    # A matrix product would round to fewer bits on some GPUs.
    o, zero = (jnp.swapaxes((x * back[:, :, None]).sum(axis=1), 1, 2) for x in (o, zero))
    ends = np.cumsum([piece.width for piece in value.pieces])[:-1].tolist()
    o = assemble(value.pieces, [x * p.weight for x, p in zip(jnp.split(o, ends, axis=-1), value.pieces, strict=True)])
    if value.groups:
        o = o + to_numbers(zero, value.size, value.width)
    by_row = lambda x: x.reshape(b, heads, *x.shape[1:])
    whole_row = Partial(by_row(o), by_row((l * back).sum(axis=1)), by_row(top))
    if "logits" not in found:
        return whole_row
    logits = by_row(found["logits"][:, :g, : part.capacity])
    filled = jnp.arange(part.capacity) < part.length[..., None, None]
    # Blocks behind a row's end were not written.
    return whole_row._replace(logits=(jnp.where(filled, logits, EMPTY),))


def _kernel(*refs: Any, tree: Any, results: Any, plans: Sequence[_Plan], splits: int, scale: float, cap: float | None,
            interpret: bool) -> None:  # fmt: skip
    """A share of each part of a row, one part after the other."""
    inputs = jax.tree.unflatten(tree, refs[: tree.num_leaves])
    outs = jax.tree.unflatten(results, refs[tree.num_leaves :])
    for part, plan, out in zip(inputs["parts"], plans, outs, strict=True):
        _attend(part, inputs["after"], inputs["expand"], out, plan, splits, scale, cap, interpret)


def _attend(part: dict[str, Any], after: Any, expand: Any, out: dict[str, Any], plan: _Plan, splits: int, scale: float,
            cap: float | None, interpret: bool) -> None:  # fmt: skip
    """A share of a part of a row."""
    key, value, page, block, _ = plan
    row, split = pl.program_id(0), pl.program_id(1)
    length = part["length"][row]
    filled = pl.cdiv(length, block)
    share = pl.cdiv(filled, splits)
    lanes = part["q"].shape[1]
    if expand is None:
        query = [part["q"].at[row, :, pl.ds(p.start, p.width)][...] for p in key.pieces]
        score = functools.partial(_scores, part["k"], query=query, sums=_sums(query, key), key=key, interpret=interpret)
    else:
        score = functools.partial(gpu_expand.scores, part, expand, row=row, key=key, interpret=interpret)

    def step(i: Array, carry: tuple) -> tuple:
        accs, zeros, l, m = carry
        at = Block(part["table"], row, i, page, block, length)
        s = score(at) * scale
        s = soft_cap(s, cap)
        seen = at.slot < length
        if after is not None:
            seen &= at.place(part, row) > after[row]
        s = jnp.where(seen[:, None], s, EMPTY)
        if "logits" in out:
            every = jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
            plt.store(out["logits"].at[row, every, jnp.broadcast_to(at.slot[:, None], s.shape)], s)
        top = jnp.maximum(m, s.max(axis=0))
        old, p = jnp.exp2((m - top) * LOG2E), jnp.exp2((s - top[None, :]) * LOG2E)
        p = jnp.where(seen[:, None], p, jnp.zeros_like(p))
        accs, zeros = _add_values(part["v"], at, p, old, accs, zeros, value, interpret)
        return accs, zeros, l * old + p.sum(axis=0), top

    nothing = (
        tuple(jnp.zeros((piece.width, lanes), jnp.float32) for piece in value.pieces),
        tuple(jnp.zeros((lanes,), jnp.float32) for _ in range(value.groups)),
        jnp.zeros((lanes,), jnp.float32),
        jnp.full((lanes,), EMPTY, jnp.float32),
    )
    accs, zeros, l, m = jax.lax.fori_loop(split * share, jnp.minimum((split + 1) * share, filled), step, nothing)
    at = 0
    for piece, acc in zip(value.pieces, accs, strict=True):
        out["o"].at[row, split, pl.ds(at, piece.width), :][...] = acc
        at += piece.width
    for group, zero in enumerate(zeros):
        out["zero"].at[row, split, group, :][...] = zero
    out["l"].at[row, split, :][...] = l
    out["m"].at[row, split, :][...] = m


def _sums(query: list[Array], key: Format) -> dict[int, Array]:
    """What the query's numbers of each group add up to, from the plane of the lowest bits."""
    found: dict[int, Array] = {}
    for numbers, piece in zip(query, key.pieces, strict=True):
        if key.groups and piece.weight == 1:
            total = numbers.astype(jnp.float32).sum(axis=1)
            found[piece.group] = found[piece.group] + total if piece.group in found else total
    return found


def _bias(read: Format) -> int:
    """What `spread` adds to a number, all its planes together."""
    return bias_of(read) * sum({piece.weight for piece in read.pieces})


def _scores(pool: Any, at: Block, query: list[Array], sums: dict[int, Array], key: Format, interpret: bool) -> Array:
    """`[block lanes]`, before the scale of logits."""
    if not key.groups:
        parts = [(at.vectors(pool, p.at, p.width), q) for p, q in zip(key.pieces, query, strict=True)]
        return sum(dot(codes, q.astype(codes.dtype), (1, 1)) for codes, q in parts)  # pyright: ignore
    if key.run:
        return _run_scores(pool, at, query, key, interpret)
    total = None
    for group in range(key.groups):
        own = [(piece, x) for piece, x in zip(key.pieces, query, strict=True) if piece.group == group]
        codes = [spread(at.vectors(pool["codes"], p.at, p.width), p, key, interpret) for p, _ in own]
        dots = [dot(x, q.astype(key.dtype), (1, 1)) * p.weight for x, (p, q) in zip(codes, own, strict=True)]
        scale = whole(at.numbers(pool["scale"], group))
        zero = _zero(pool, at, scale, key, group) - _bias(key) * scale
        part = scale[:, None] * functools.reduce(jnp.add, dots) + zero[:, None] * sums[group][None, :]
        total = part if total is None else total + part
    return total  # pyright: ignore[reportReturnType]


def _run_scores(pool: Any, at: Block, query: list[Array], key: Format, interpret: bool) -> Array:
    """`_scores` for one run of slots: the channels' scales are those of the query."""
    total = None
    for piece, numbers in zip(key.pieces, query, strict=True):
        scale, zero = (at.spread(pool[name], piece, key.run) for name in ("scale", "zero"))
        numbers = numbers.astype(jnp.float32)
        scaled = (numbers * scale[None, :]).astype(key.dtype)
        codes = spread(at.vectors(pool["codes"], piece.at, piece.width), piece, key, interpret)
        bias = bias_of(key) * scaled.astype(jnp.float32).sum(axis=1)
        part = (dot(codes, scaled, (1, 1)) - bias[None, :]) * piece.weight
        if piece.weight == 1:
            part = part + (numbers * zero[None, :]).sum(axis=1)[None, :]
        total = part if total is None else total + part
    return total  # pyright: ignore[reportReturnType]


def _zero(pool: Any, at: Block, scale: Array, read: Format, group: int) -> Array:
    return scale * read.offset if read.offset is not None else whole(at.numbers(pool["zero"], group))


def _add_values(
    pool: Any, at: Block, p: Array, old: Array, accs: tuple, zeros: tuple, value: Format, interpret: bool
) -> tuple[tuple, tuple]:
    """The sums of values and of zero terms, with this block's."""
    if not value.groups:
        parts = [at.vectors(pool, piece.at, piece.width) for piece in value.pieces]
        more = [dot(x, p.astype(x.dtype), (0, 0)) for x in parts]
        return tuple(acc * old[None, :] + x for acc, x in zip(accs, more, strict=True)), ()
    weights, more = [], []
    for group in range(value.groups):
        scale = whole(at.numbers(pool["scale"], group))
        weight = (p * scale[:, None]).astype(value.dtype)
        # The bias is taken back from the rounded weights: it is larger than the codes.
        bias = _bias(value) * weight.astype(jnp.float32).sum(axis=0)
        if value.offset is None:
            zero = (p * whole(at.numbers(pool["zero"], group))[:, None]).sum(axis=0)
        else:
            zero = value.offset * weight.astype(jnp.float32).sum(axis=0)
        weights.append(weight)
        more.append(zeros[group] * old + zero - bias)
    new = []
    for acc, piece in zip(accs, value.pieces, strict=True):
        codes = spread(at.vectors(pool["codes"], piece.at, piece.width), piece, value, interpret)
        new.append(acc * old[None, :] + dot(codes, weights[piece.group], (0, 0)))
    return tuple(new), tuple(more)
