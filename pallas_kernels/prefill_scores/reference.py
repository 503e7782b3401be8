"""Column sums of causal attention in plain jnp: the contract, and the XLA path on every platform."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.blocks import divisor
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
    block: int = 512,
) -> Float[Array, "B N T"]:
    """Attention that each token received from the queries of each query head.

    Args:
      q, k: rotated queries and keys, padded on the right.
      lse: log-sum-exp of each query's scaled logits, saved by the attention pass.
      length: tokens of each prompt; padded queries and keys count nothing.
      scale: factor on the logits.
      cap: logits become `cap tanh(logit / cap)` (Gemma 2); None = they stay.
      window: sliding window [tokens].
      recent: only the last so many queries of each prompt count (SnapKV's window); None = all do.
      block: most tokens per block on both axes; blocks divide T.

    Cost: one more pass of T^2/2 query-key products, recent x T with `recent`, in blocks: memory grows with T, not with
      its square.
    """
    b, t, n, h = q.shape
    heads = k.shape[2]
    block = divisor(t, block)
    reach, start = min(window or t, t), first_query(length, recent)
    q = jnp.moveaxis(q.reshape(b, t, heads, n // heads, h), 1, 3)  # B K G T H
    k = jnp.moveaxis(k, 1, 2)
    lse = lse.reshape(b, heads, n // heads, t)

    def column(j: Array) -> Float[Array, "B K G block"]:
        key = jax.lax.dynamic_slice_in_dim(k, j * block, block, axis=2)
        key_pos = j * block + jnp.arange(block)

        def row(i: Array, total: Array) -> Array:
            cut = lambda x: jax.lax.dynamic_slice_in_dim(x, i * block, block, axis=3)
            pos = i * block + jnp.arange(block)
            distance = pos[:, None] - key_pos
            seen = (distance >= 0) & (distance < reach)
            seen = seen & ((pos >= start[:, None]) & (pos < length[:, None]))[:, :, None]
            s = jnp.einsum("bkgqh,bksh->bkgqs", cut(q), key, preferred_element_type=jnp.float32) * scale
            s = soft_cap(s, cap)
            p = jnp.where(seen[:, None, None], jnp.exp(s - cut(lse)[..., None]), 0.0)
            return total + p.sum(axis=3)

        first, last = query_blocks(j, block, block, length, reach, start)
        nothing = jnp.zeros((b, heads, n // heads, block), jnp.float32)
        return jax.lax.fori_loop(first.min(), last.max(), row, nothing)

    sums = jax.lax.map(column, jnp.arange(t // block))  # T/block B K G block
    return jnp.moveaxis(sums, 0, 3).reshape(b, n, t)


def first_query(length: Int[Array, "*b"], recent: int | None) -> Int[Array, "*b"]:
    """The first query that counts."""
    return jnp.zeros_like(length) if recent is None else jnp.maximum(length - recent, 0)


def query_blocks(
    column: Array, keys: int, queries: int, length: Int[Array, "*b"], reach: int, start: Int[Array, "*b"]
) -> tuple[Int[Array, "*b"], Int[Array, "*b"]]:
    """The first block of queries that see a block of keys, and the one behind the last.

    Args:
      column: index of the block of keys.
      keys, queries: tokens of a block.
      length: tokens of the prompt.
      reach: keys that a query sees, its own the last of them.
      start: first query that counts.
    """
    first = jnp.maximum(column * keys, start) // queries
    behind = ((column + 1) * keys + reach - 2) // queries + 1  # the last key is seen by `reach - 1` later queries
    return first, jnp.minimum((length + queries - 1) // queries, behind)
