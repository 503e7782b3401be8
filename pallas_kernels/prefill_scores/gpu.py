"""Column sums of causal attention on GPUs: Pallas, lowered by Triton.

A program holds one block of keys and reads the queries of one head that see it, a block at a time. Keys are the rows of
a product and queries its columns, so sums over queries stay within a thread until the end of a block. Most blocks of
queries see every key of the block: only those at the diagonal, at the window's edge and at the prompt's end are masked.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Float, Int

from pallas_kernels.blocks import powers
from pallas_kernels.prefill_scores.reference import first_query, query_blocks
from pallas_kernels.product import dot
from pallas_kernels.soft_cap import soft_cap

LOG2E = math.log2(math.e)
NARROWEST = 16  # numbers of a piece of the head: the least inner width of a matrix product


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
    b, t, n, h = q.shape
    single = q.dtype == jnp.float32
    block = block or (32 if single else 128)
    body = functools.partial(
        _kernel, pieces=_pieces(h, 32 if single else 128), keys=block, queries=queries or min(block, 64), scale=scale,
        cap=cap, reach=min(window or t, t), recent=recent,
    )  # fmt: skip
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((b, n, t), jnp.float32),
        grid=(b * n, pl.cdiv(t, block)),  # the first keys, which most queries see, start first
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=4 if single else 8, num_stages=2),
        name="column_sums",
    )(q, k, lse, length)


def _pieces(width: int, widest: int) -> list[pl.Slice]:
    """Parts of a head, powers of two up to `widest`; raises `NotImplementedError` where one is too narrow."""
    found = powers(width, widest)
    if (least := min(size for _, size in found)) < NARROWEST:
        raise NotImplementedError(f"heads of {width} numbers have a piece of {least}, less than {NARROWEST}")
    return [pl.Slice(start, size) for start, size in found]


def _kernel(q_ref: Any, k_ref: Any, lse_ref: Any, length_ref: Any, out_ref: Any, *, pieces: list[pl.Slice], keys: int,
            queries: int, scale: float, cap: float | None, reach: int, recent: int | None) -> None:  # fmt: skip
    t, n = q_ref.shape[1:3]
    row, column = pl.program_id(0), pl.program_id(1)
    b, head = row // n, row % n
    length = length_ref[b]
    start = first_query(length, recent)

    def vectors(ref: Any, head: Array, pos: Array, first: Array, masked: bool) -> list[Array]:
        """A block of vectors in pieces, `[block width]` each."""
        size = pos.shape[0]
        at = [ref.at[b, pl.ds(first, size), head, piece] for piece in pieces]
        if not masked or t % size == 0:
            return [x[...] for x in at]
        masks = (jnp.broadcast_to((pos < t)[:, None], (size, piece.size)) for piece in pieces)
        return [plt.load(x, mask=mask, other=0) for x, mask in zip(at, masks, strict=True)]

    key_pos = column * keys + jnp.arange(keys)
    key = vectors(k_ref, head // (n // k_ref.shape[2]), key_pos, column * keys, True)

    def step(masked: bool, i: Array, total: Array) -> Array:
        pos = i * queries + jnp.arange(queries)
        query = vectors(q_ref, head, pos, i * queries, masked)
        at = lse_ref.at[b, head, pl.ds(i * queries, queries)]
        lse = plt.load(at, mask=pos < t, other=0) if masked and t % queries else at[...]
        s = functools.reduce(jnp.add, (dot(x, y, (1, 1)) for x, y in zip(key, query, strict=True)))
        s = s * (scale * LOG2E) if cap is None else soft_cap(s * scale, cap) * LOG2E
        p = jnp.exp2(s - (lse * LOG2E)[None, :])
        if masked:
            distance = pos[None, :] - key_pos[:, None]
            seen = (distance >= 0) & (distance < reach) & ((pos >= start) & (pos < length))[None, :]
            p = jnp.where(seen, p, jnp.zeros_like(p))
        return total + p.sum(axis=1)

    first, last = query_blocks(column, keys, queries, length, reach, start)
    # Every query from block `whole` up to block `edge` counts and sees every key.
    whole = pl.cdiv(jnp.maximum((column + 1) * keys - 1, start), queries)
    edge = jnp.minimum(column * keys + reach, length) // queries
    whole = jnp.clip(whole, first, jnp.maximum(first, last))
    edge = jnp.clip(edge, whole, jnp.maximum(whole, last))
    total = jnp.zeros((keys,), jnp.float32)
    for masked, lower, upper in ((True, first, whole), (False, whole, edge), (True, edge, last)):
        total = jax.lax.fori_loop(lower, upper, functools.partial(step, masked), total)
    plt.store(out_ref.at[b, head, pl.ds(column * keys, keys)], total, mask=key_pos < t if t % keys else None)
