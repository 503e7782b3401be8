"""Running means of segments on GPUs: Pallas, lowered by Triton.

A program is a warp that walks over a few tokens of a row with its sums in registers, so that each token is read once.
A window is summed in two parts, without subtraction: a run of `window` tokens at a time, the part of the window that
lies in the run before it is one of that run's `window - 1` sums over its newest tokens, which are carried from run to
run. That makes three additions per token for any window.

A row that remembers everything needs what the tokens before a piece add up to: a first launch sums the pieces, XLA
scans those sums, and a second launch begins each piece with what precedes it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Float

from pallas_kernels.segment_merge import gradient
from pallas_kernels.segment_merge.reference import segment_sums

TOKENS = 128  # that a program walks over, about
TOGETHER = 8  # of them, where there is no window: their loads are on their way at once
WIDEST = 128  # numbers of a piece of a vector
LARGEST = 32  # window: its sums stay in registers


def pool(
    x: Float[Array, "B T K n"],
    merge: Float[Array, "B T K"],
    weight: Float[Array, "B T K"],
    *,
    window: int,
    interpret: bool = False,
) -> Float[Array, "B T K n"]:
    """Running means: the contract of `reference.pool`.

    Args:
      interpret: run without a GPU, slowly.
    """
    if window > LARGEST:
        raise NotImplementedError(f"a window of {window} tokens is more than {LARGEST}")
    run = (functools.partial(kernel, interpret=interpret) for kernel in (sums, dots))
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
    interpret: bool,
) -> Float[Array, "B T K n"]:
    """Weighted sums over segments: see `gradient.Kernels`."""
    b, t, heads, n = x.shape
    size = _piece(n)
    run = window or TOGETHER
    tokens = pl.cdiv(TOKENS, run) * run
    grid = (pl.cdiv(t, tokens), b * heads, n // size)
    call = functools.partial(
        pl.pallas_call, grid=grid, interpret=interpret, compiler_params=plt.CompilerParams(num_warps=1, num_stages=1)
    )
    options = {"run": run, "runs": tokens // run, "size": size, "reverse": reverse}
    out = jax.ShapeDtypeStruct(x.shape, dtype)
    if window:
        return call(functools.partial(_windowed, **options), out_shape=out, name="segment_merge_sums")(
            x, link, before, after
        )
    pieces = jax.ShapeDtypeStruct((b, grid[0], heads, n), link.dtype)
    totals = call(functools.partial(_totals, **options), out_shape=pieces, name="segment_merge_totals")(x, link, before)
    carried = jnp.flip(link, 1) if reverse else link
    carried = jnp.pad(carried, ((0, 0), (0, grid[0] * tokens - t), (0, 0))).reshape(b, grid[0], tokens, heads)
    ahead = segment_sums(totals, carried.prod(axis=2), window=0)
    first = jnp.pad(ahead[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
    walk = call(functools.partial(_unlimited, **options), out_shape=out, name="segment_merge_sums")
    return walk(x, link, before, after, first)


def _piece(n: int) -> int:
    """Numbers of a vector that a program holds: a power of two that divides them."""
    return min(WIDEST, n & -n)


class _Row:
    """Where a program reads and writes."""

    def __init__(self, x_ref: Any, size: int, reverse: bool):
        _, self._t, heads, _ = x_ref.shape
        row = pl.program_id(1)
        self._row, self._reverse = (row // heads, row % heads), reverse
        self.numbers, self.piece = pl.ds(pl.program_id(2) * size, size), pl.program_id(0)
        self._size = size

    def _at(self, u: Array) -> tuple[Array, Array]:
        """Position of the u-th token on the way, and whether there is one."""
        pos = jnp.clip(u, 0, self._t - 1)
        return self._t - 1 - pos if self._reverse else pos, (u >= 0) & (u < self._t)

    def vector(self, ref: Any, u: Array) -> Array:
        """Numbers of a token, 0 where there is none."""
        (b, head), (pos, real) = self._row, self._at(u)
        return plt.load(ref.at[b, pos, head, self.numbers], mask=jnp.broadcast_to(real, (self._size,)), other=0)

    def factor(self, ref: Any, u: Array) -> Array:
        """A number of a token, 0 where there is none."""
        (b, head), (pos, real) = self._row, self._at(u)
        return plt.load(ref.at[b, pos, head], mask=real, other=0)

    def write(self, ref: Any, u: Array, y: Array, where: Array) -> None:
        """Write a token's numbers, where there is one."""
        (b, head), (pos, real) = self._row, self._at(u)
        mask = jnp.broadcast_to(real & where, (self._size,))
        plt.store(ref.at[b, pos, head, self.numbers], y.astype(ref.dtype), mask=mask)

    def of_piece(self, ref: Any) -> Any:
        """What belongs to the program's tokens as a whole."""
        b, head = self._row
        return ref.at[b, self.piece, head, self.numbers]


def _windowed(x_ref: Any, link_ref: Any, before_ref: Any, after_ref: Any, out_ref: Any, *, run: int, runs: int,
              size: int, reverse: bool) -> None:  # fmt: skip
    row, wide = _Row(x_ref, size, reverse), link_ref.dtype
    begin = row.piece * runs

    def walk(index: Array, suffixes: tuple[Array, ...]) -> tuple[Array, ...]:
        """One run; `suffixes[i]` is the sum over the tokens behind the i-th of the run before."""
        tokens, links = [], []
        total, through = jnp.zeros((size,), wide), jnp.ones((), wide)
        for i in range(run):
            u = index * run + i
            tokens.append(row.factor(before_ref, u) * row.vector(x_ref, u).astype(wide))
            links.append(row.factor(link_ref, u))
            total = links[i] * total + tokens[i] if i else tokens[i]
            through = through * links[i]
            whole = total + through * suffixes[i] if i < run - 1 else total
            row.write(out_ref, u, whole * row.factor(after_ref, u), index >= begin)
        found, through = [tokens[-1]], links[-1]
        for i in range(run - 2, 0, -1):
            found.append(found[-1] + through * tokens[i])
            through = through * links[i]
        return tuple(reversed(found))[: run - 1]

    nothing = (jnp.zeros((size,), wide),) * (run - 1)
    jax.lax.fori_loop(begin - int(run > 1), begin + runs, walk, nothing)


def _scan(row: _Row, x_ref: Any, link_ref: Any, before_ref: Any, first: Array, run: int, runs: int,
          emit: Callable[[Array, Array], None]) -> Array:  # fmt: skip
    """Sums over all tokens so far, from `first`; the last of them."""

    def walk(index: Array, total: Array) -> Array:
        for i in range(run):
            u = index * run + i
            x = row.vector(x_ref, u).astype(total.dtype)
            total = row.factor(link_ref, u) * total + row.factor(before_ref, u) * x
            emit(u, total)
        return total

    return jax.lax.fori_loop(row.piece * runs, (row.piece + 1) * runs, walk, first)


def _totals(x_ref: Any, link_ref: Any, before_ref: Any, out_ref: Any, *, run: int, runs: int, size: int,
            reverse: bool) -> None:  # fmt: skip
    row, nothing = _Row(x_ref, size, reverse), jnp.zeros((size,), link_ref.dtype)
    row.of_piece(out_ref)[...] = _scan(row, x_ref, link_ref, before_ref, nothing, run, runs, lambda u, total: None)


def _unlimited(x_ref: Any, link_ref: Any, before_ref: Any, after_ref: Any, first_ref: Any, out_ref: Any, *, run: int,
               runs: int, size: int, reverse: bool) -> None:  # fmt: skip
    row = _Row(x_ref, size, reverse)

    def emit(u: Array, total: Array) -> None:
        row.write(out_ref, u, total * row.factor(after_ref, u), jnp.bool_(True))

    _scan(row, x_ref, link_ref, before_ref, row.of_piece(first_ref)[...], run, runs, emit)


def dots(g: Float[Array, "B T K n"], x: Float[Array, "B T K n"], *, window: int, interpret: bool) -> Array:
    """Products of each vector with those of the newest tokens: see `gradient.Kernels`."""
    b, t, heads, n = x.shape
    tokens = 32
    out = pl.pallas_call(
        functools.partial(_dots, size=_piece(n), tokens=tokens),
        out_shape=jax.ShapeDtypeStruct((b, heads, window, t), np.promote_types(x.dtype, jnp.float32)),
        grid=(pl.cdiv(t, tokens), b * heads),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        name="segment_merge_dots",
    )(g, x)
    return jnp.transpose(out, (2, 0, 3, 1))


def _dots(g_ref: Any, x_ref: Any, out_ref: Any, *, size: int, tokens: int) -> None:
    _, t, heads, n = x_ref.shape
    b, head = pl.program_id(1) // heads, pl.program_id(1) % heads
    begin = pl.program_id(0) * tokens
    pos = begin + jnp.arange(tokens, dtype=jnp.int32)

    def vectors(ref: Any, by: int) -> list[Array]:
        at = pos - by
        mask = jnp.broadcast_to(((at >= 0) & (at < t))[:, None], (tokens, size))
        places = jnp.clip(at, 0, t - 1)[:, None] + jnp.zeros((tokens, size), jnp.int32)
        numbers = lambda first: jnp.broadcast_to((first + jnp.arange(size, dtype=jnp.int32))[None, :], (tokens, size))
        loaded = (plt.load(ref.at[b, places, head, numbers(i)], mask=mask, other=0) for i in range(0, n, size))
        return [y.astype(out_ref.dtype) for y in loaded]

    g = vectors(g_ref, 0)
    for by in range(out_ref.shape[2]):
        products = (jnp.sum(y * z, axis=1) for y, z in zip(g, vectors(x_ref, by), strict=True))
        total = functools.reduce(jnp.add, products)
        plt.store(out_ref.at[b, head, jnp.int32(by), pl.ds(begin, tokens)], total, mask=pos < t)
