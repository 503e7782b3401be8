"""Column sums of causal attention on TPUs: Pallas, lowered by Mosaic.

The grid is (query head, block of keys, block of queries that see it). Blocks of queries begin at the diagonal; those
behind the prompt's end or the window's name the last one again, which is not fetched twice. Keys are the rows of a
product and queries its columns: log-sum-exps are read as they lie, and sums over queries are sums over lanes, which are
left to the end of a block of keys.

A head's tokens are read as rows: where queries and keys do not lie heads first in memory, XLA copies them once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from pallas_kernels.blocks import LANES
from pallas_kernels.prefill_scores.reference import first_query, query_blocks
from pallas_kernels.product import dot
from pallas_kernels.soft_cap import soft_cap


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
    b, t, n, h = q.shape
    heads, reach = k.shape[2], min(window or t, t)
    block = pl.cdiv(min(block, t), LANES) * LANES
    columns = pl.cdiv(t, block)
    span = lambda queries: (queries + block - 2) // block + 1  # blocks that so many queries touch at most
    steps = min(columns, span(reach), span(t if recent is None else max(recent, 1)))  # `reach` queries see the last key

    def of_query(r: Array, j: Array, i: Array, length: Any) -> Array:
        first, last = query_blocks(j, block, block, length[r // n], reach, first_query(length[r // n], recent))
        return jnp.minimum(first + i, jnp.maximum(last - 1, 0))

    def of_key(r: Array, j: Array, i: Array, length: Any) -> tuple:
        return r // (n // heads), jnp.minimum(j, jnp.maximum(pl.cdiv(length[r // n], block) - 1, 0)), 0

    flat = lambda x: jnp.moveaxis(x, 1, 2).reshape(-1, t, h)
    sums = pl.pallas_call(
        functools.partial(_kernel, heads=n, block=block, scale=scale, cap=cap, reach=reach, recent=recent),
        out_shape=jax.ShapeDtypeStruct((b * n, 1, t), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b * n, columns, steps),
            in_specs=[
                pl.BlockSpec((1, block, h), lambda *at: (at[0], of_query(*at), 0)),
                pl.BlockSpec((1, block, h), of_key),
                pl.BlockSpec((1, 1, block), lambda *at: (at[0], 0, of_query(*at))),
            ],
            out_specs=pl.BlockSpec((1, 1, block), lambda r, j, i, _: (r, 0, j)),
            scratch_shapes=[pltpu.VMEM((block, LANES), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="column_sums",
    )(length, flat(q), flat(k), lse.reshape(b * n, 1, t))
    return sums.reshape(b, n, t)


def _kernel(length_ref: Any, q_ref: Any, k_ref: Any, lse_ref: Any, out_ref: Any, acc_ref: Any, *, heads: int,
            block: int, scale: float, cap: float | None, reach: int, recent: int | None) -> None:  # fmt: skip
    row, column, step = (pl.program_id(axis) for axis in range(3))
    length = length_ref[row // heads]
    start = first_query(length, recent)
    first, last = query_blocks(column, block, block, length, reach, start)
    i = first + step

    @pl.when(step == 0)
    def _() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def add(masked: bool) -> None:
        s = dot(k_ref[0], q_ref[0], (1, 1))
        p = jnp.exp(soft_cap(s * scale, cap) - lse_ref[0])
        if masked:
            pos = i * block + jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
            distance = pos - column * block - jax.lax.broadcasted_iota(jnp.int32, s.shape, 0)
            p = jnp.where((distance >= 0) & (distance < reach) & (pos >= start) & (pos < length), p, 0.0)
        acc_ref[...] += functools.reduce(jnp.add, (p[:, at : at + LANES] for at in range(0, block, LANES)))

    # Whether every query of the block counts and sees every key.
    whole = (i > column) & ((i - column + 1) * block <= reach) & (i * block >= start) & ((i + 1) * block <= length)
    pl.when(whole)(lambda: add(masked=False))
    pl.when((i < last) & ~whole)(lambda: add(masked=True))

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        out_ref[0] = acc_ref[...].T.sum(axis=0, keepdims=True)
