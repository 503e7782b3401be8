"""Running means of segments on TPUs: Pallas, lowered by Mosaic.

A row's tokens are read once, in order, 128 at a time. Sums of `window` terms are made of sums of 1, 2, 4, ... terms,

    sum of a + b terms at t = sum of a at t + coefficient of a at t * sum of b at t - a

where the coefficient of `a` is the product of that many decisions: 4 shifted additions for 12 terms. What a shift
needs of the tokens before is kept in vector memory. A row that remembers everything ends with a shift of all 128
tokens, of the result itself. The gradient runs the other way, from the last token to the first.

A head's tokens are read as rows: where they do not lie heads first in memory, XLA copies them once.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Float

from pallas_kernels.product import dot
from pallas_kernels.segment_merge import gradient
from pallas_kernels.segment_merge.reference import earlier

TOKENS = 128  # that are held in registers
SUBLANES = 8


def pool(
    x: Float[Array, "B T K n"],
    merge: Float[Array, "B T K"],
    weight: Float[Array, "B T K"],
    *,
    window: int,
    block: int = 2048,
    interpret: Any = False,
) -> Float[Array, "B T K n"]:
    """Running means: the contract of `reference.pool`.

    Args:
      block: tokens that are fetched at once, rounded up to a multiple of 128.
      interpret: run without a TPU, slowly: True, or `pltpu.InterpretParams`.
    """
    if window > TOKENS:
        raise NotImplementedError(f"a window of {window} tokens is more than {TOKENS}")
    if x.dtype.itemsize > 4:
        raise NotImplementedError(f"numbers are {x.dtype}")
    block = pl.cdiv(min(block, x.shape[1]), TOKENS) * TOKENS
    run = (functools.partial(kernel, block=block, interpret=interpret) for kernel in (sums, dots))
    return gradient.pool(x, merge, weight, window, gradient.Kernels(*run))


def sums(
    x: Float[Array, "B T K n"],
    link: Float[Array, "B T K"],
    before: Float[Array, "B T K"],
    after: Float[Array, "B T K"],
    *,
    window: int,
    reverse: bool,
    dtype: DTypeLike,
    block: int,
    interpret: Any,
) -> Float[Array, "B T K n"]:
    """Weighted sums over segments: see `gradient.Kernels`."""
    b, t, heads, n = x.shape
    blocks, tokens = pl.cdiv(t, block), block * pl.cdiv(t, block)
    factors = _factors(link, before, after, window, reverse)
    rows = pl.cdiv(factors.shape[0], SUBLANES) * SUBLANES
    factors = jnp.pad(factors, ((0, rows - factors.shape[0]), (0, 0), (0, 0), (0, tokens - t)))
    factors = jnp.moveaxis(factors, 0, 2).reshape(b * heads, rows, tokens)
    at = lambda j: blocks - 1 - j if reverse else j
    vectors = pl.BlockSpec((1, block, n), lambda r, j: (r, at(j), 0))
    out = pl.pallas_call(
        functools.partial(_sum, window=window, reverse=reverse, length=t),
        out_shape=jax.ShapeDtypeStruct((b * heads, t, n), dtype),
        grid=(b * heads, blocks),
        in_specs=[vectors, pl.BlockSpec((1, rows, block), lambda r, j: (r, 0, at(j)))],
        out_specs=vectors,
        scratch_shapes=[pltpu.VMEM((max(by, SUBLANES), n), jnp.float32) for by in _shifts(window)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="segment_merge_sums",
    )(_flat(x), factors)
    return jnp.moveaxis(out.reshape(b, heads, t, n), 1, 2)


def _flat(x: Float[Array, "B T K n"]) -> Float[Array, "rows T n"]:
    return jnp.moveaxis(x, 1, 2).reshape(-1, x.shape[1], x.shape[3])


def _powers(window: int) -> list[int]:
    """Numbers of terms that sums are made of."""
    return [1 << i for i in range((window or TOKENS).bit_length())]


def _shifts(window: int) -> list[int]:
    """By how many tokens `_sum` shifts, in its order."""
    found: list[int] = []

    def shift(y: int, by: int) -> int:
        found.append(by)
        return y

    _combine(0, [0] * len(_powers(window)), window, shift)
    return found if window else [*found, TOKENS]


def _combine(terms: Any, factors: list[Any], window: int, shift: Callable[[Any, int], Any]) -> Any:
    """Sums of `window` terms; `factors` are the products of as many decisions as `_powers` says."""
    total, *powers = None, *_powers(window)
    for by, factor in zip(powers, factors, strict=True):
        if window & by:
            total = terms if total is None else terms + factor * shift(total, by)
        if 2 * by <= (window or TOKENS):
            terms = terms + factor * shift(terms, by)
    return terms if total is None else total


def _factors(link: Array, before: Array, after: Array, window: int, reverse: bool) -> Float[Array, "f B K T"]:
    """What a kernel multiplies with: `before`, `after` and the products of 1, 2, 4, ... decisions."""
    order = lambda y: jnp.flip(y, 1) if reverse else y
    products = [order(link)]
    for by in _powers(window)[:-1]:
        products.append(products[-1] * earlier(products[-1], by))
    return jnp.moveaxis(jnp.stack([before, after, *map(order, products)]), 2, 3)


def _sum(x_ref: Any, factors_ref: Any, out_ref: Any, *kept_refs: Any, window: int, reverse: bool, length: int) -> None:
    parts, step = x_ref.shape[1] // TOKENS, pl.program_id(1)
    block = pl.num_programs(1) - 1 - step if reverse else step

    @pl.when(step == 0)
    def _() -> None:
        for ref in kept_refs:
            ref[...] = jnp.zeros_like(ref)

    def part(i: Array, _: Any) -> None:
        i = parts - 1 - i if reverse else i
        rows, unused = pl.ds(pl.multiple_of(i * TOKENS, TOKENS), TOKENS), iter(kept_refs)

        def shift(y: Array, by: int) -> Array:
            """`y` of the token `by` places before, or after in reverse."""
            ref = next(unused)
            size, kept = ref.shape[0], ref[...]
            ref[...] = y[:size] if reverse else y[-size:]
            joined = jnp.concatenate([y, kept] if reverse else [kept, y], axis=0)
            if by < SUBLANES:
                joined = pltpu.roll(joined, joined.shape[0] - by if reverse else by, 0)
                return joined[:TOKENS] if reverse else joined[size:]
            return joined[by:] if reverse else joined[:TOKENS]

        factors = factors_ref[0, :, rows].T
        before, after, *products = (factors[:, f : f + 1] for f in range(2 + len(_powers(window))))
        x = _real(x_ref, rows, block * parts + i, length).astype(jnp.float32)
        total = _combine(x * before, products, window, shift)
        if window == 0:
            ref = next(unused)
            total = total + products[-1] * ref[...]
            ref[...] = total
        out_ref[0, rows] = (total * after).astype(out_ref.dtype)

    jax.lax.fori_loop(0, parts, part, None)


def _real(ref: Any, rows: Any, part: Array, length: int) -> Array:
    """Vectors of a part of a block: 0 behind the last token, where anything may lie."""
    y = ref[0, rows]
    if length % ref.shape[1] == 0:
        return y
    left = length - part * TOKENS
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, y.shape, 0) < left, y, jnp.zeros_like(y))


def dots(
    g: Float[Array, "B T K n"], x: Float[Array, "B T K n"], *, window: int, block: int, interpret: Any
) -> Float[Array, "w B T K"]:
    """Products of each vector with those of the newest tokens: see `gradient.Kernels`."""
    b, t, heads, n = x.shape
    vectors = pl.BlockSpec((1, block, n), lambda r, j: (r, j, 0))
    out = pl.pallas_call(
        functools.partial(_dot, length=t),
        out_shape=jax.ShapeDtypeStruct((b * heads, window, t), jnp.float32),
        grid=(b * heads, pl.cdiv(t, block)),
        in_specs=[vectors, vectors],
        out_specs=pl.BlockSpec((1, window, block), lambda r, j: (r, 0, j)),
        scratch_shapes=[pltpu.VMEM((TOKENS, n), x.dtype)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="segment_merge_dots",
    )(_flat(g), _flat(x))
    return jnp.transpose(out.reshape(b, heads, window, t), (2, 0, 3, 1))


def _dot(g_ref: Any, x_ref: Any, out_ref: Any, kept_ref: Any, *, length: int) -> None:
    parts, block = x_ref.shape[1] // TOKENS, pl.program_id(1)

    @pl.when(block == 0)
    def _() -> None:
        kept_ref[...] = jnp.zeros_like(kept_ref)

    def part(i: Array, _: Any) -> None:
        rows = pl.ds(pl.multiple_of(i * TOKENS, TOKENS), TOKENS)
        x = _real(x_ref, rows, block * parts + i, length)
        row, column = (jax.lax.broadcasted_iota(jnp.int32, (TOKENS, TOKENS), axis) for axis in (0, 1))
        newest_first = dot((row + column == TOKENS - 1).astype(x.dtype), x, (1, 0)).astype(x.dtype)
        products = dot(g_ref[0, rows], jnp.concatenate([newest_first, kept_ref[...]], axis=0), (1, 1))
        kept_ref[...] = newest_first
        # Row r has its own token in column TOKENS - 1 - r, those before it behind: turned by r, they begin in column 0.
        products = pltpu.roll(products, TOKENS + 1, 1)
        turn = jax.lax.broadcasted_iota(jnp.int32, products.shape, 0)
        for by in _powers(TOKENS - 1):  # TPU v4 has no rotation that differs from row to row
            products = jnp.where((turn & by) != 0, pltpu.roll(products, by, 1), products)
        out_ref[0, :, rows] = products[:, :TOKENS].T[: out_ref.shape[1]]

    jax.lax.fori_loop(0, parts, part, None)
