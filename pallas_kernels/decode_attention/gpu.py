"""Decode attention on GPUs: Pallas, lowered by Triton.

A program reads a share of one row's filled slots, a block at a time. Slots are the rows of every matrix and the few
query heads its columns, so no product is padded to sixteen queries. Codes of a few bits are spread into bfloat16 with
one logical instruction for two of them and are never scaled: with number = code x scale + zero,

    q . key      = scale (q . codes) + zero (sum of q)                  once per slot and group
    sum p value  = sum (p scale) codes + sum p zero                     once per slot and group

`codes` carry a bias there (see `_spread`), which the zero term takes back.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from pallas_kernels.blocks import powers
from pallas_kernels.codes import (
    DENSE,
    Affine,
    Dense,
    Float8,
    PerChannel,
    Piece,
    assemble,
    groups_of,
    pieces,
    whole,
    width_of,
)
from pallas_kernels.decode_attention.reference import EMPTY, Partial
from pallas_kernels.soft_cap import soft_cap

LOG2E = math.log2(math.e)
PROGRAMS = 2 * 132  # that fill a chip: two for each multiprocessor of an H200
BIAS = 128  # of a code as bfloat16
NARROWEST = 16  # numbers of a piece: the least inner width of a matrix product
WIDEST = 128
SMALL_PAGE = 64  # slots: rows of smaller pages are gathered slot by slot


class _Format(NamedTuple):
    """How a kernel reads one of the two pools; hashable."""

    pieces: tuple[Piece, ...]
    dtype: Any  # of the numbers that are multiplied
    groups: int = 0  # with a scale each; 0 = no scales
    bits: int = 16
    offset: int | None = None  # of all codes, instead of zero points
    float8: bool = False
    run: int = 0  # slots that share the scales of their channels; 0 = each slot has its own

    @property
    def bias(self) -> int:
        """What `_spread` adds to a number, all its planes together."""
        return BIAS * sum({piece.weight for piece in self.pieces}) if self.biased else 0

    @property
    def biased(self) -> bool:
        """Whether `_spread` adds something."""
        return self.bits < 8 and self.dtype == jnp.bfloat16


def decode_attention(
    q: Float[Array, "B K G H"],
    k: Any,
    v: Any,
    table: Int[Array, "B K M"],
    length: Int[Array, "B K"],
    pos: Int[Array, "P page"] | None = None,
    *,
    scale: float,
    after: Int[Array, "B K"] | None = None,
    cap: float | None = None,
    decode_key: Callable[[Any, DTypeLike], Float[Array, "B K s R"]] = DENSE,
    decode_value: Callable[[Any, DTypeLike], Float[Array, "B K s W"]] = DENSE,
    with_logits: bool = False,
    block: int | None = None,
    splits: int | None = None,
    interpret: bool = False,
) -> Partial:
    """Attention of one query per row: the contract of `reference.decode_attention`.

    Args:
      block: slots of a step, a power of two; None = by the width of codes.
      splits: programs of a row; None = as many as fill a large chip.
      interpret: run without a GPU, slowly.
    """
    b, heads, g = q.shape[:3]
    page = jax.tree.leaves(k)[0].shape[1]
    key, value = _format("keys", decode_key, k, q.dtype), _format("values", decode_value, v, q.dtype)
    block = key.run or block or _block(key, value)
    if key.run and page % key.run:
        raise NotImplementedError(f"runs of {key.run} slots in pages of {page}, across two of them")
    if page >= SMALL_PAGE and page & (page - 1) == 0:
        block = min(block, page)
    rows, slots = b * heads, table.shape[-1] * page
    steps = pl.cdiv(slots, block)
    splits = splits or max(1, min(PROGRAMS // rows, steps // 4))
    flat = lambda x: x.reshape(rows, *x.shape[2:])
    width = width_of(decode_value, v)
    # Triton's blocks are powers of two: query heads are padded, 3 of them to 4.
    lanes = 1 << (g - 1).bit_length()
    query = jnp.pad(flat(q), ((0, 0), (0, lanes - g), (0, 0)))
    packed = sum(piece.width for piece in value.pieces)
    out = [
        jax.ShapeDtypeStruct((rows, splits, packed, lanes), jnp.float32),
        jax.ShapeDtypeStruct((rows, splits, max(value.groups, 1), lanes), jnp.float32),
        jax.ShapeDtypeStruct((rows, splits, lanes), jnp.float32),
        jax.ShapeDtypeStruct((rows, splits, lanes), jnp.float32),
    ]
    if with_logits:
        out.append(jax.ShapeDtypeStruct((rows, lanes, steps * block), jnp.float32))
    inputs = {
        "q": query, "k": k, "v": v, "table": flat(table), "length": flat(length),
        "pos": pos if after is not None else None, "after": None if after is None else flat(after),
    }  # fmt: skip
    leaves, tree = jax.tree.flatten(inputs)
    body = functools.partial(
        _kernel, tree=tree, key=key, value=value, page=page, block=block, splits=splits, scale=scale, cap=cap,
        logits=with_logits, interpret=interpret,
    )  # fmt: skip
    found = pl.pallas_call(
        body,
        out_shape=out,
        grid=(rows, splits),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=3),
        name="decode_attention",
    )(*leaves)
    o, zero, l, m = (x[..., :g] for x in found[:4])
    # Splits without a slot hold nothing. XLA may not see through the maximum: its own fusion has lost it before.
    top = jax.lax.optimization_barrier(m.max(axis=1))
    back = jnp.exp(m - top[:, None])
    # A matrix product would round to fewer bits on some GPUs.
    o, zero = (jnp.swapaxes((x * back[:, :, None]).sum(axis=1), 1, 2) for x in (o, zero))
    ends = np.cumsum([piece.width for piece in value.pieces])[:-1].tolist()
    o = assemble(value.pieces, [x * p.weight for x, p in zip(jnp.split(o, ends, axis=-1), value.pieces, strict=True)])
    if value.groups:
        o = o + jnp.repeat(zero, width // value.groups, axis=-1)
    part = Partial(
        o.reshape(b, heads, g, width),
        (l * back).sum(axis=1).reshape(b, heads, g),
        top.reshape(b, heads, g),
    )
    if not with_logits:
        return part
    filled = jnp.arange(slots) < length[..., None, None]
    logits = found[4][:, :g, :slots].reshape(b, heads, g, slots)
    return part._replace(logits=jnp.where(filled, logits, EMPTY))  # blocks behind a row's end were not written


def _block(key: _Format, value: _Format) -> int:
    """Slots of a step: registers hold a block's numbers, and shared memory a few blocks' codes."""
    if jnp.float32 in (key.dtype, value.dtype):
        return 32
    bits = {key.bits, value.bits}
    return 64 if 3 in bits else 256 if max(bits) < 8 else 128


def _format(name: str, decode: Any, codes: Any, dtype: DTypeLike) -> _Format:
    """How a pool is read; raises `NotImplementedError` for what this kernel cannot read."""
    width, dtype = width_of(decode, codes), jnp.dtype(dtype)
    if isinstance(decode, Dense):
        found = tuple(Piece(start, size, start, 0, 0, 1, 0) for start, size in powers(width, WIDEST))
        made = _Format(found, codes.dtype)
    elif isinstance(decode, Affine):
        groups = groups_of(decode, codes)
        offset = -decode.middle if decode.symmetric else None
        made = _Format(pieces(decode.bits, width, groups, WIDEST), dtype, groups, decode.bits, offset)
    elif isinstance(decode, Float8):
        made = _Format(pieces(8, width, 1, WIDEST), dtype, 1, 8, offset=0, float8=True)
    elif isinstance(decode, PerChannel) and name == "keys":
        made = _Format(pieces(decode.bits, width, 1, WIDEST), dtype, 1, decode.bits, run=decode.group)
    else:
        raise NotImplementedError(f"{name} in the format {decode} are for xla only")
    if any(piece.width < NARROWEST for piece in made.pieces):
        least = min(piece.width for piece in made.pieces)
        raise NotImplementedError(f"{name} of {width} numbers have a piece of {least}, less than {NARROWEST}")
    return made


def _kernel(*refs: Any, tree: Any, key: _Format, value: _Format, page: int, block: int, splits: int, scale: float,
            cap: float | None, logits: bool, interpret: bool) -> None:  # fmt: skip
    ins, outs = refs[: tree.num_leaves], refs[tree.num_leaves :]
    ref = jax.tree.unflatten(tree, ins)
    o_ref, zero_ref, l_ref, m_ref, *logits_ref = outs
    row, split = pl.program_id(0), pl.program_id(1)
    length = ref["length"][row]
    filled = pl.cdiv(length, block)
    share = pl.cdiv(filled, splits)
    query = [ref["q"].at[row, :, pl.ds(p.start, p.width)][...] for p in key.pieces]
    lanes = query[0].shape[0]
    sums = _sums(query, key)

    def step(i: Array, carry: tuple) -> tuple:
        accs, zeros, l, m = carry
        at = _Block(ref["table"], row, i, page, block, length)
        s = _scores(ref["k"], at, query, sums, key, interpret) * scale
        s = soft_cap(s, cap)
        seen = at.slot < length
        if ref["after"] is not None:
            seen &= at.position(ref["pos"]) > ref["after"][row]
        s = jnp.where(seen[:, None], s, EMPTY)
        if logits:
            every = jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
            plt.store(logits_ref[0].at[row, every, jnp.broadcast_to(at.slot[:, None], s.shape)], s)
        top = jnp.maximum(m, s.max(axis=0))
        old, p = jnp.exp2((m - top) * LOG2E), jnp.exp2((s - top[None, :]) * LOG2E)
        p = jnp.where(seen[:, None], p, jnp.zeros_like(p))
        accs, zeros = _add_values(ref["v"], at, p, old, accs, zeros, value, interpret)
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
        o_ref.at[row, split, pl.ds(at, piece.width), :][...] = acc
        at += piece.width
    for group, zero in enumerate(zeros):
        zero_ref.at[row, split, group, :][...] = zero
    l_ref.at[row, split, :][...] = l
    m_ref.at[row, split, :][...] = m


class _Block:
    """A block of a row's slots, and how its part of a pool is loaded."""

    def __init__(self, table: Any, row: Array, index: Array, page: int, block: int, length: Array):
        self.slot = index * block + jnp.arange(block)
        self._block, self._filled = block, self.slot < length
        self._whole = page % block == 0  # the block is a part of one page
        if self._whole:
            self._page, self._offset = table[row, index * block // page], pl.multiple_of(index * block % page, block)
        else:
            logical = jnp.where(self._filled, self.slot // page, 0)
            self._page, self._offset = plt.load(table.at[row, logical]), self.slot % page

    def vectors(self, pool: Any, start: int, width: int) -> Array:
        """`[block width]` of a pool `[P page ...]`."""
        if self._whole:
            return pool.at[self._page, pl.ds(self._offset, self._block), pl.ds(start, width)][...]
        shape = self._block, width
        column = start + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        page, offset, filled = (jnp.broadcast_to(x[:, None], shape) for x in (self._page, self._offset, self._filled))
        return plt.load(pool.at[page, offset, column], mask=filled, other=0)

    def numbers(self, pool: Any, column: int) -> Array:
        """`[block]` of a pool `[P page ...]`: one column."""
        if self._whole:
            return pool.at[self._page, pl.ds(self._offset, self._block), column][...]
        at = jnp.full((self._block,), column, jnp.int32)
        return plt.load(pool.at[self._page, self._offset, at], mask=self._filled, other=0)

    def spread(self, pool: Any, piece: Piece, run: int) -> Array:
        """`[width]` of the scales that a run of slots, this block, keeps beside it."""
        each = pool.shape[-1]
        channel = piece.start + jnp.arange(piece.width)
        offset = self._offset if self._whole else self._offset[0]
        page = self._page if self._whole else self._page[0]
        return whole(plt.load(pool.at[page, offset + channel // each, channel % each]))

    def position(self, pool: Any) -> Array:
        """The slots' positions."""
        if pool is None:
            return self.slot
        if self._whole:
            return pool.at[self._page, pl.ds(self._offset, self._block)][...]
        return plt.load(pool.at[self._page, self._offset], mask=self._filled, other=0)


def _sums(query: list[Array], key: _Format) -> dict[int, Array]:
    """What the query's numbers of each group add up to, from the plane of the lowest bits."""
    found: dict[int, Array] = {}
    for numbers, piece in zip(query, key.pieces, strict=True):
        if key.groups and piece.weight == 1:
            total = numbers.astype(jnp.float32).sum(axis=1)
            found[piece.group] = found[piece.group] + total if piece.group in found else total
    return found


def _dot(a: Array, b: Array, over: tuple[int, int]) -> Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _scores(pool: Any, at: _Block, query: list[Array], sums: dict[int, Array], key: _Format, interpret: bool) -> Array:
    """`[block lanes]`, before the scale of logits."""
    if not key.groups:
        parts = [(at.vectors(pool, p.at, p.width), q) for p, q in zip(key.pieces, query, strict=True)]
        return sum(_dot(codes, q.astype(codes.dtype), (1, 1)) for codes, q in parts)  # pyright: ignore
    if key.run:
        return _run_scores(pool, at, query, key, interpret)
    total = None
    for group in range(key.groups):
        own = [(piece, x) for piece, x in zip(key.pieces, query, strict=True) if piece.group == group]
        codes = [_spread(at.vectors(pool["codes"], p.at, p.width), p, key, interpret) for p, _ in own]
        dots = [_dot(x, q.astype(key.dtype), (1, 1)) * p.weight for x, (p, q) in zip(codes, own, strict=True)]
        scale = whole(at.numbers(pool["scale"], group))
        zero = _zero(pool, at, scale, key, group) - key.bias * scale
        part = scale[:, None] * functools.reduce(jnp.add, dots) + zero[:, None] * sums[group][None, :]
        total = part if total is None else total + part
    return total  # pyright: ignore[reportReturnType]


def _run_scores(pool: Any, at: _Block, query: list[Array], key: _Format, interpret: bool) -> Array:
    """`_scores` for one run of slots: the channels' scales are those of the query."""
    total = None
    for piece, numbers in zip(key.pieces, query, strict=True):
        scale, zero = (at.spread(pool[name], piece, key.run) for name in ("scale", "zero"))
        numbers = numbers.astype(jnp.float32)
        scaled = (numbers * scale[None, :]).astype(key.dtype)
        codes = _spread(at.vectors(pool["codes"], piece.at, piece.width), piece, key, interpret)
        bias = (BIAS if key.biased else 0) * scaled.astype(jnp.float32).sum(axis=1)
        dot = (_dot(codes, scaled, (1, 1)) - bias[None, :]) * piece.weight
        if piece.weight == 1:
            dot = dot + (numbers * zero[None, :]).sum(axis=1)[None, :]
        total = dot if total is None else total + dot
    return total  # pyright: ignore[reportReturnType]


def _zero(pool: Any, at: _Block, scale: Array, read: _Format, group: int) -> Array:
    return scale * read.offset if read.offset is not None else whole(at.numbers(pool["zero"], group))


def _add_values(
    pool: Any, at: _Block, p: Array, old: Array, accs: tuple, zeros: tuple, value: _Format, interpret: bool
) -> tuple[tuple, tuple]:
    """The sums of values and of zero terms, with this block's."""
    if not value.groups:
        parts = [at.vectors(pool, piece.at, piece.width) for piece in value.pieces]
        more = [_dot(x, p.astype(x.dtype), (0, 0)) for x in parts]
        return tuple(acc * old[None, :] + x for acc, x in zip(accs, more, strict=True)), ()
    weights, more = [], []
    for group in range(value.groups):
        scale = whole(at.numbers(pool["scale"], group))
        weight = (p * scale[:, None]).astype(value.dtype)
        # The bias is taken back from the rounded weights: it is larger than the codes.
        bias = value.bias * weight.astype(jnp.float32).sum(axis=0)
        if value.offset is None:
            zero = (p * whole(at.numbers(pool["zero"], group))[:, None]).sum(axis=0)
        else:
            zero = value.offset * weight.astype(jnp.float32).sum(axis=0)
        weights.append(weight)
        more.append(zeros[group] * old + zero - bias)
    new = []
    for acc, piece in zip(accs, value.pieces, strict=True):
        codes = _spread(at.vectors(pool["codes"], piece.at, piece.width), piece, value, interpret)
        new.append(acc * old[None, :] + _dot(codes, weights[piece.group], (0, 0)))
    return tuple(new), tuple(more)


def _spread(codes: Array, piece: Piece, read: _Format, interpret: bool) -> Array:
    """A piece's codes as numbers; bfloat16 has a bias of 128 for codes of less than 8 bits.

    0x4300 is 128 in bfloat16, and its seven fraction bits count from 1: a code or-ed into them is 128 + code.
    Source: the trick with float16's 0x6400 in FasterTransformer's and BitDecoding's (arXiv 2503.18773) dequantisation.
    """
    if read.float8:
        return jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(read.dtype)
    if interpret or not read.biased:
        if read.bits < 8:
            codes = (codes >> jnp.uint8(piece.shift)) & jnp.uint8(piece.mask)
        return codes.astype(read.dtype) + jnp.asarray(BIAS if read.biased else 0, read.dtype)
    (numbers,) = plt.elementwise_inline_asm(
        assembly(piece),
        args=[codes],
        constraints="=r,=r,r",
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(codes.shape, jnp.bfloat16)],
    )
    return numbers


def assembly(piece: Piece) -> str:
    """PTX that turns four bytes, `$2`, into four biased bfloat16 numbers, `$0` and `$1`."""
    mask = piece.mask << 16 | piece.mask
    shift = f"shr.u32 x, $2, {piece.shift};" if piece.shift else "mov.b32 x, $2;"
    spread = lambda out, two: (
        f"prmt.b32 h, x, 0, {two}; lop3.b32 ${out}, h, {mask:#010x}, 0x43004300, 0xEA;"  # (h & mask) | 128
    )
    return f"{{ .reg .b32 x, h; {shift} {spread(0, '0x4140')} {spread(1, '0x4342')} }}"
