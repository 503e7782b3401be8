"""Decode attention on TPUs: Pallas, lowered by Mosaic.

The grid is (row, step). A step reads a few pages, which the row's table, prefetched as scalars, names to the pipeline
that fetches them; pages behind a row's end name its last one again, which is not fetched twice. Codes become numbers in
vector memory, piece by piece (`pallas_kernels.codes.pieces`), since a piece needs no shuffle of lanes. They are not
scaled: with number = code x scale + zero,

    q . key      = scale (q . codes) + zero (sum of q)                  once per slot and group
    sum p value  = sum (p scale) codes + sum p zero                     once per slot and group

A TPU's memory has rows of 128 lanes. XLA lays a pool's narrow vectors across its slots instead of padding them, so here
such pages are seen with slots on the lanes, `[R page]`; the transposition costs nothing.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from pallas_kernels.codes import DENSE, Affine, Dense, Float8, Piece, assemble, groups_of, pieces, whole, width_of
from pallas_kernels.decode_attention.reference import EMPTY, Partial
from pallas_kernels.soft_cap import soft_cap

LANES = 128
SLOTS = 2048  # of a step, which costs about 300 bundles whatever it does
PAGES = 32  # of a step at most: each is an operand
VMEM = 64 << 20  # bytes that a kernel may use
SMEM = 768 << 10  # bytes that tables may use


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
    block: int = SLOTS,
    interpret: Any = False,
) -> Partial:
    """Attention of one query per row: the contract of `reference.decode_attention`.

    Args:
      block: slots of a step, rounded to whole pages.
      interpret: run without a TPU, slowly: True, or `pltpu.InterpretParams`.
    """
    b, heads, g = q.shape[:3]
    size, page = jax.tree.leaves(k)[0].shape[:2]
    rows, width = b * heads, table.shape[-1]
    each = max(1, min(block // page, width, PAGES))
    steps = pl.cdiv(width, each)
    key, value = _format("keys", decode_key, k, q.dtype), _format("values", decode_value, v, q.dtype)
    flat = lambda x: x.reshape(rows, *x.shape[2:])
    after_ = jnp.full((rows,), -1, jnp.int32) if after is None else flat(after)
    if 4 * rows * width > SMEM:
        raise NotImplementedError(f"page tables of {4 * rows * width} bytes exceed scalar memory: use larger pages")
    # An entry behind a row's end may name no page; an empty row names the first.
    scalars = jnp.clip(flat(table), 0, size - 1), flat(length), after_
    pools = [jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2) if _lies_across(x) else x, pool) for pool in (k, v)]
    across = [_lies_across(pool["codes"] if isinstance(pool, dict) else pool) for pool in (k, v)]
    leaves, tree = jax.tree.flatten((*pools, None if pos is None or after is None else pos[:, None]))

    def of_page(j: int, x: Array) -> pl.BlockSpec:
        def index(r: Array, i: Array, table: Any, length: Any, after: Any) -> tuple:
            last = jnp.maximum(pl.cdiv(length[r], page) - 1, 0)
            return table[r, jnp.minimum(i * each + j, last)], *[0] * (x.ndim - 1)

        return pl.BlockSpec((1, *x.shape[1:]), index)

    of_row = lambda *shape: pl.BlockSpec((1, *shape), lambda r, i, *_: (r, *[0] * len(shape)))
    queries = [flat(q)[..., p.start : p.start + p.width] for p in key.pieces]
    kept = [(g, p.width) for p in value.pieces] + [(g, LANES)] * (value.groups + 2)
    outs = [(shape, of_row(*shape)) for shape in kept]
    if with_logits:
        outs.append(((g, steps * each * page), pl.BlockSpec((1, g, each * page), lambda r, i, *_: (r, 0, i))))
    body = functools.partial(
        _kernel, tree=tree, key=key, value=value, across=across, each=each, page=page, scale=scale, cap=cap,
        windowed=after is not None, logits=with_logits,
    )  # fmt: skip
    found = pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct((rows, *shape), jnp.float32) for shape, _ in outs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(rows, steps),
            in_specs=[of_row(g, p.width) for p in key.pieces] + [of_page(j, x) for j in range(each) for x in leaves],
            out_specs=[spec for _, spec in outs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in kept],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM),
        interpret=interpret,
        name="decode_attention",
    )(*scalars, *queries, *leaves * each)
    parts, (*zeros, l, m) = found[: len(value.pieces)], found[len(value.pieces) : len(kept)]
    o = assemble(value.pieces, parts)
    if zeros:
        zero = jnp.stack([x[..., 0] for x in zeros], axis=-1)
        o = o + jnp.repeat(zero, o.shape[-1] // len(zeros), axis=-1)
    split = lambda x: x.reshape(b, heads, *x.shape[1:])
    logits = split(found[-1][..., : width * page]) if with_logits else None
    return Partial(split(o), split(l[..., 0]), split(m[..., 0]), logits)


def _lies_across(pool: Array) -> bool:
    """Whether XLA lays a pool `[P page width]` with slots on the lanes."""
    _, page, width = pool.shape
    return page % LANES == 0 and width % LANES > 0


class _Format(NamedTuple):
    """How a kernel reads one of the two pools; hashable."""

    pieces: tuple[Piece, ...]
    dtype: Any  # of the numbers that are multiplied
    groups: int = 0  # with a scale each; 0 = no scales
    offset: int | None = None  # of all codes, instead of zero points
    float8: bool = False


def _format(name: str, decode: Any, codes: Any, dtype: DTypeLike) -> _Format:
    """How a pool is read; raises `NotImplementedError` for what this kernel cannot read."""
    width = width_of(decode, codes)
    if isinstance(decode, Dense):
        return _Format((Piece(0, width, 0, 0, 0, 1, 0),), codes.dtype)
    if isinstance(decode, Affine):
        groups = groups_of(decode, codes)
        offset = -decode.middle if decode.symmetric else None
        return _Format(pieces(decode.bits, width, groups), jnp.dtype(dtype), groups, offset)
    if isinstance(decode, Float8):
        return _Format(pieces(8, width, 1), jnp.dtype(dtype), 1, offset=0, float8=True)
    raise NotImplementedError(f"{name} in the format {decode} are for xla only")


def _kernel(
    table_ref: Any, length_ref: Any, after_ref: Any, *refs: Any, tree: Any, key: _Format, value: _Format,
    across: Sequence[bool], each: int, page: int, scale: float, cap: float | None, windowed: bool, logits: bool,
) -> None:  # fmt: skip
    kept = len(value.pieces) + value.groups + 2
    queries, refs = refs[: len(key.pieces)], refs[len(key.pieces) :]
    pages, refs = refs[: each * tree.num_leaves], refs[each * tree.num_leaves :]
    outs, scratch = refs[:kept], refs[-kept:]
    accs, (*zeros, l_ref, m_ref) = scratch[: len(value.pieces)], scratch[len(value.pieces) :]
    row, step = pl.program_id(0), pl.program_id(1)
    length, first = length_ref[row], step * each * page

    @pl.when(step == 0)
    def _() -> None:
        for ref in (*accs, *zeros, l_ref):
            ref[...] = jnp.zeros_like(ref)
        m_ref[...] = jnp.full_like(m_ref, EMPTY)

    if logits:
        refs[kept][...] = jnp.full_like(refs[kept], EMPTY)

    @pl.when(first < length)
    def _() -> None:
        query = [ref[0].astype(key.dtype) for ref in queries]
        for j in range(each):
            k, v, pos = jax.tree.unflatten(tree, pages[j * tree.num_leaves : (j + 1) * tree.num_leaves])
            s = _scores(_Page(k, across[0], key), query) * scale
            s = soft_cap(s, cap)
            slot = first + j * page + jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
            seen = slot < length
            if windowed:
                seen &= (slot if pos is None else pos[0]) > after_ref[row]
            s = jnp.where(seen, s, EMPTY)
            if logits:
                refs[kept][0, :, j * page : (j + 1) * page] = s
            m = jnp.maximum(m_ref[...], s.max(axis=1, keepdims=True))
            old, p = jnp.exp(m_ref[...] - m), jnp.where(seen, jnp.exp(s - m[:, :1]), 0.0)
            l_ref[...] = l_ref[...] * old + p.sum(axis=1, keepdims=True)
            m_ref[...] = m
            _add_values(_Page(v, across[1], value), p, old, accs, zeros)

    @pl.when(step == pl.num_programs(1) - 1)
    def _() -> None:
        for out, ref in zip(outs, scratch, strict=True):
            out[0] = ref[...]


class _Page:
    """A page of one of the pools in vector memory."""

    def __init__(self, pool: Any, across: bool, read: _Format):
        self._pool, self._across, self.read = pool, across, read
        self._codes = pool["codes"] if read.groups else pool

    def numbers(self, piece: Piece) -> Array:
        """A piece's codes as numbers, `[width page]` if slots are on the lanes, else `[page width]`."""
        part = pl.ds(piece.at, piece.width)
        codes = self._codes[0, part, :] if self._across else self._codes[0, :, part]
        if not self.read.groups:
            return codes
        if self.read.float8:
            return pltpu.bitcast(codes, jnp.float8_e4m3fn).astype(self.read.dtype)
        found = (codes.astype(jnp.int32) >> piece.shift) & piece.mask  # bytes cannot be shifted
        return found.astype(jnp.float32).astype(self.read.dtype)

    def scale(self, group: int) -> Float[Array, "1 page"]:
        """Of a group."""
        return self._line("scale", group)

    def zero(self, group: int) -> Float[Array, "1 page"]:
        """Of a group."""
        return self._line("zero", group) if self.read.offset is None else self.read.offset * self.scale(group)

    def _line(self, name: str, group: int) -> Array:
        pool = self._pool[name]
        if pool.shape[-1] % LANES == 0:  # slots on the lanes
            return whole(pool[0, pl.ds(group, 1), :])
        return whole(pool[0]).T[group : group + 1]

    @property
    def axis(self) -> int:
        """Of the slots."""
        return 1 if self._across else 0


def _scores(page: _Page, query: list[Array]) -> Float[Array, "G page"]:
    """Before the scale of logits."""
    read, total = page.read, None
    for group in range(max(read.groups, 1)):
        own = [(p, x) for p, x in zip(read.pieces, query, strict=True) if p.group == group]
        part = functools.reduce(jnp.add, (_dot(x, page.numbers(p), (1, 1 - page.axis)) * p.weight for p, x in own))
        if read.groups:
            low = (x.astype(jnp.float32) for p, x in own if p.weight == 1)
            sums = functools.reduce(jnp.add, (x.sum(axis=1, keepdims=True) for x in low))
            part = page.scale(group) * part + page.zero(group) * sums
        total = part if total is None else total + part
    return total  # pyright: ignore[reportReturnType]


def _add_values(page: _Page, p: Array, old: Array, accs: Sequence[Any], zeros: Sequence[Any]) -> None:
    """Values and zero terms of a page, added to the sums."""
    read = page.read
    weights = [p * page.scale(group) for group in range(read.groups)] or [p]
    for group, ref in enumerate(zeros):
        ref[...] = ref[...] * old + (p * page.zero(group)).sum(axis=1, keepdims=True)
    for piece, acc in zip(read.pieces, accs, strict=True):
        weight = (weights[piece.group] * piece.weight).astype(read.dtype)
        acc[...] = acc[...] * old[:, :1] + _dot(weight, page.numbers(piece), (1, page.axis))


def _dot(a: Array, b: Array, over: tuple[int, int]) -> Array:
    precision = jax.lax.Precision.HIGHEST if b.dtype == jnp.float32 else None
    dims = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
