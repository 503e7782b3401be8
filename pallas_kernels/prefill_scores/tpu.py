"""What attention says of tokens, on TPUs: Pallas, lowered by Mosaic.

The grid is (query head, block of rows, block of columns that they need). Rows are tokens that get a number each; blocks
of columns begin where a scope does, at the diagonal for one; those behind its end name the last one again, which is not
fetched twice. What is subtracted from the logits of columns is read as it lies, and reductions over columns are those
over lanes, which are left to the end of a block of rows.

A head's tokens are read as rows: where queries and keys do not lie heads first in memory, XLA copies them once.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from pallas_kernels.blocks import LANES
from pallas_kernels.decode_attention.reference import EMPTY
from pallas_kernels.prefill_scores.scopes import Causal, Chunked, Scope
from pallas_kernels.product import dot
from pallas_kernels.soft_cap import soft_cap


class Reduction(NamedTuple):
    """What becomes of a row's logits; numbers of each lane are kept apart until the end."""

    init: tuple[float, ...]  # of the numbers that are carried, `[rows lanes]` each
    add: Callable[[Sequence[Array], Sequence[Array]], Sequence[Array]]  # them, and logits of all lanes -> them
    done: Callable[..., Array]  # each of them, transposed -> [1 rows]


def _add_exps(carried: Sequence[Array], parts: Sequence[Array]) -> Sequence[Array]:
    largest, total = carried
    new = functools.reduce(jnp.maximum, parts, largest)
    return new, functools.reduce(jnp.add, (jnp.exp(part - new) for part in parts), total * jnp.exp(largest - new))


def _log_sum(largest: Array, total: Array) -> Array:
    most = _largest(largest)
    return most + jnp.log((total * jnp.exp(largest - most)).sum(axis=0, keepdims=True))


_largest = lambda x: x.max(axis=0, keepdims=True)
SUM = Reduction(
    (0.0,),
    lambda carried, parts: [functools.reduce(jnp.add, map(jnp.exp, parts), *carried)],
    lambda x: x.sum(axis=0, keepdims=True),
)
MAX = Reduction((EMPTY,), lambda carried, parts: [functools.reduce(jnp.maximum, parts, *carried)], _largest)
LOG_SUM = Reduction((EMPTY, 0.0), _add_exps, _log_sum)


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
    block: int = 1024,
    interpret: Any = False,
) -> Float[Array, "B N T"]:
    """Attention that each token received: the contract of `reference.column_sums`.

    Args:
      block: tokens per block on both axes, rounded up to a multiple of 128.
      interpret: run without a TPU, slowly: True, or `pltpu.InterpretParams`.
    """
    scope = Causal(min(window or q.shape[1], q.shape[1]), recent)
    options = {"scale": scale, "cap": cap, "block": block, "interpret": interpret}
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
    block: int = 1024,
    interpret: Any = False,
) -> Float[Array, "B N T"]:
    """The most attention that each token gets from its chunk: the contract of `reference.column_max`.

    Args:
      block, interpret: as in `column_sums`; what queries attend to is added up by a kernel of its own before.
    """
    options = {"scale": scale, "cap": cap, "block": block, "interpret": interpret}
    own = _reduce("column_max_shares", LOG_SUM, Chunked(chunk), q, k, None, length, **options)
    paid = jnp.logaddexp(others, own) - gain[:, None]
    return _reduce("column_max", MAX, Chunked(chunk), k, q, paid, length, **options)


def _reduce(
    name: str, reduction: Reduction, scope: Scope, rows: Float[Array, "B R r H"], columns: Float[Array, "B C c H"],
    shift: Float[Array, "B N C"] | None, length: Int[Array, " B"], *, scale: float, cap: float | None, block: int,
    interpret: Any,
) -> Float[Array, "B N R"]:  # fmt: skip
    """The logits of rows and columns, less what columns are shifted by, reduced over the columns of a scope."""
    (b, t, _, h), (_, wide, _, _) = rows.shape, columns.shape
    n = max(rows.shape[2], columns.shape[2])
    block = pl.cdiv(min(block, max(t, wide)), LANES) * LANES

    def of_column(r: Array, j: Array, i: Array, length: Any) -> Array:
        found = scope.blocks(j, block, block, length[r // n])
        return jnp.minimum(found.first + i, jnp.maximum(found.last - 1, 0))

    def of_row(r: Array, j: Array, i: Array, length: Any) -> Array:
        return jnp.minimum(j, jnp.maximum(pl.cdiv(length[r // n], block) - 1, 0))

    of = lambda x, place: pl.BlockSpec((1, block, h), lambda *at: (at[0] // (n // x.shape[2]), place(*at), 0))
    shifts = () if shift is None else (shift.reshape(b * n, 1, wide),)
    in_specs = [of(columns, of_column), of(rows, of_row)]
    in_specs += [pl.BlockSpec((1, 1, block), lambda *at: (at[0], 0, of_column(*at))) for _ in shifts]
    flat = lambda x: jnp.moveaxis(x, 1, 2).reshape(-1, x.shape[1], h)
    body = functools.partial(
        _kernel, heads=n, block=block, shifted=len(shifts), scale=scale, cap=cap, scope=scope, reduction=reduction
    )
    found = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((b * n, 1, t), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b * n, pl.cdiv(t, block), scope.most(block, wide)),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((1, 1, block), lambda r, j, i, _: (r, 0, j)),
            scratch_shapes=[pltpu.VMEM((block, LANES), jnp.float32) for _ in reduction.init],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name=name,
    )(length, flat(columns), flat(rows), *shifts)
    return found.reshape(b, n, t)


def _kernel(length_ref: Any, column_ref: Any, row_ref: Any, *refs: Any, heads: int, block: int, shifted: int,
            scale: float, cap: float | None, scope: Scope, reduction: Reduction) -> None:  # fmt: skip
    shift_ref, out_ref, carried = refs[:shifted], refs[shifted], refs[shifted + 1 :]
    row, own, step = (pl.program_id(axis) for axis in range(3))
    length = length_ref[row // heads]
    found = scope.blocks(own, block, block, length)
    i = found.first + step

    @pl.when(step == 0)
    def _() -> None:
        for ref, value in zip(carried, reduction.init, strict=True):
            ref[...] = jnp.full(ref.shape, value, ref.dtype)

    def add(masked: bool) -> None:
        s = soft_cap(dot(row_ref[0], column_ref[0], (1, 1)) * scale, cap)
        for ref in shift_ref:
            s = s - ref[0]
        if masked:
            iota = lambda of, axis: of * block + jax.lax.broadcasted_iota(jnp.int32, s.shape, axis)
            s = jnp.where(scope.seen(iota(own, 0), iota(i, 1), length), s, EMPTY)
        parts = [s[:, at : at + LANES] for at in range(0, block, LANES)]
        for ref, new in zip(carried, reduction.add([ref[...] for ref in carried], parts), strict=True):
            ref[...] = new

    whole = (i >= found.whole) & (i < found.edge)
    pl.when(whole)(lambda: add(masked=False))
    pl.when((i < found.last) & ~whole)(lambda: add(masked=True))

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        out_ref[0] = reduction.done(*(ref[...].T for ref in carried))
