"""What attention says of tokens, on GPUs: Pallas, lowered by Triton.

A program holds one block of rows, whose tokens get a number each, and reads the columns of one head that they need, a
block at a time. Rows and columns are those of a product, so a reduction over columns stays within a thread until the
end of a block. Of most blocks of columns all pairs count: only those at the edges of a scope are masked. Logarithms are
those of 2 inside.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Float, Int

from pallas_kernels.blocks import powers
from pallas_kernels.decode_attention.reference import EMPTY
from pallas_kernels.prefill_scores.scopes import Causal, Chunked, Scope
from pallas_kernels.product import dot
from pallas_kernels.soft_cap import soft_cap

LOG2E = math.log2(math.e)
NARROWEST = 16  # numbers of a piece of the head: the least inner width of a matrix product


class Reduction(NamedTuple):
    """What becomes of a row's logits, in logarithms of 2."""

    init: Callable[[int], Any]  # rows -> what a loop carries
    add: Callable[[Any, Array], Any]  # it, and logits [rows columns] -> it
    done: Callable[[Any], Array]  # it -> [rows]


def _add_exps(carry: tuple[Array, Array], s: Array) -> tuple[Array, Array]:
    largest, total = carry
    new = jnp.maximum(largest, s.max(axis=1))
    return new, total * jnp.exp2(largest - new) + jnp.exp2(s - new[:, None]).sum(axis=1)


_empty = lambda rows: jnp.full((rows,), EMPTY, jnp.float32)
_zeros = lambda rows: jnp.zeros((rows,), jnp.float32)
SUM = Reduction(_zeros, lambda total, s: total + jnp.exp2(s).sum(axis=1), lambda total: total)
MAX = Reduction(_empty, lambda best, s: jnp.maximum(best, s.max(axis=1)), lambda best: best / LOG2E)
LOG_SUM = Reduction(
    lambda rows: (_empty(rows), _zeros(rows)), _add_exps, lambda carry: carry[0] / LOG2E + jnp.log(carry[1])
)


def column_sums(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    lse: Float[Array, "B N T"],
    length: Int[Array, " B"],
    *,
    scale: float,
    cap: float | None = None,
    window: int | None = None,
    recent: int | None = None,
    block: int | None = None,
    queries: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B N T"]:
    """Attention that each token received: the contract of `reference.column_sums`.

    Args:
      block: tokens of a block of keys, a power of two, at least 16; None = by the width of numbers.
      queries: tokens of a block of queries, likewise; None = as many as fit beside the keys, at most `block`.
      interpret: run without a GPU, slowly.
    """
    scope = Causal(min(window or q.shape[1], q.shape[1]), recent)
    options = {"scale": scale, "cap": cap, "block": block, "across": queries, "interpret": interpret}
    return _reduce("column_sums", SUM, scope, k, q, lse, length, **options)


def column_max(
    q: Float[Array, "B Q N H"],
    k: Float[Array, "B T K H"],
    others: Float[Array, "B N Q"],
    gain: Float[Array, "B Q"],
    length: Int[Array, " B"],
    *,
    chunk: int,
    scale: float,
    cap: float | None = None,
    block: int | None = None,
    queries: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B N T"]:
    """The most attention that each token gets from its chunk: the contract of `reference.column_max`.

    Args:
      block, queries, interpret: as in `column_sums`; what queries attend to is added up by a kernel of its own before.
    """
    options = {"scale": scale, "cap": cap, "block": block, "across": queries, "interpret": interpret}
    own = _reduce("column_max_shares", LOG_SUM, Chunked(chunk), q, k, None, length, **options)
    paid = jnp.logaddexp(others, own) - gain[:, None]
    return _reduce("column_max", MAX, Chunked(chunk), k, q, paid, length, **options)


def _reduce(
    name: str, reduction: Reduction, scope: Scope, rows: Float[Array, "B R r H"], columns: Float[Array, "B C c H"],
    shift: Float[Array, "B N C"] | None, length: Int[Array, " B"], *, scale: float, cap: float | None,
    block: int | None, across: int | None, interpret: bool,
) -> Float[Array, "B N R"]:  # fmt: skip
    """The logits of rows and columns, less what columns are shifted by, reduced over the columns of a scope."""
    b, t, _, h = rows.shape
    n, single = max(rows.shape[2], columns.shape[2]), rows.dtype == jnp.float32
    block = block or (32 if single else 128)
    body = functools.partial(
        _kernel, pieces=_pieces(h, 32 if single else 128), rows=block, columns=across or min(block, 64), heads=n,
        scale=scale, cap=cap, scope=scope, reduction=reduction,
    )  # fmt: skip
    shifts = () if shift is None else (shift,)
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((b, n, t), jnp.float32),
        grid=(b * n, pl.cdiv(t, block)),  # the first keys, which most queries see, start first
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=4 if single else 8, num_stages=2),
        name=name,
    )(columns, rows, length, *shifts)


def _pieces(width: int, widest: int) -> list[pl.Slice]:
    """Parts of a head, powers of two up to `widest`; raises `NotImplementedError` where one is too narrow."""
    found = powers(width, widest)
    if (least := min(size for _, size in found)) < NARROWEST:
        raise NotImplementedError(f"heads of {width} numbers have a piece of {least}, less than {NARROWEST}")
    return [pl.Slice(start, size) for start, size in found]


def _kernel(column_ref: Any, row_ref: Any, length_ref: Any, *refs: Any, pieces: list[pl.Slice], rows: int, columns: int,
            heads: int, scale: float, cap: float | None, scope: Scope, reduction: Reduction) -> None:  # fmt: skip
    *shift_ref, out_ref = refs
    wide, tall = column_ref.shape[1], row_ref.shape[1]
    index, own = pl.program_id(0), pl.program_id(1)
    b, head = index // heads, index % heads
    length = length_ref[b]

    def vectors(ref: Any, pos: Array, first: Array, masked: bool) -> list[Array]:
        """A block of vectors in pieces, `[block width]` each."""
        size, t = pos.shape[0], ref.shape[1]
        at = [ref.at[b, pl.ds(first, size), head // (heads // ref.shape[2]), piece] for piece in pieces]
        if not masked or t % size == 0:
            return [x[...] for x in at]
        masks = (jnp.broadcast_to((pos < t)[:, None], (size, piece.size)) for piece in pieces)
        return [plt.load(x, mask=mask, other=0) for x, mask in zip(at, masks, strict=True)]

    row_pos = own * rows + jnp.arange(rows)
    row = vectors(row_ref, row_pos, own * rows, True)

    def step(masked: bool, i: Array, carry: Any) -> Any:
        pos = i * columns + jnp.arange(columns)
        column = vectors(column_ref, pos, i * columns, masked)
        s = functools.reduce(jnp.add, (dot(x, y, (1, 1)) for x, y in zip(row, column, strict=True)))
        s = s * (scale * LOG2E) if cap is None else soft_cap(s * scale, cap) * LOG2E
        for ref in shift_ref:
            at = ref.at[b, head, pl.ds(i * columns, columns)]
            shift = plt.load(at, mask=pos < wide, other=0) if masked and wide % columns else at[...]
            s = s - (shift * LOG2E)[None, :]
        if masked:
            s = jnp.where(scope.seen(row_pos[:, None], pos[None, :], length), s, jnp.full_like(s, EMPTY))
        return reduction.add(carry, s)

    found = scope.blocks(own, rows, columns, length)
    carry = reduction.init(rows)
    for masked, lower, upper in (
        (True, found.first, found.whole), (False, found.whole, found.edge), (True, found.edge, found.last),
    ):  # fmt: skip
        carry = jax.lax.fori_loop(lower, upper, functools.partial(step, masked), carry)
    mask = row_pos < tall if tall % rows else None
    plt.store(out_ref.at[b, head, pl.ds(own * rows, rows)], reduction.done(carry), mask=mask)
