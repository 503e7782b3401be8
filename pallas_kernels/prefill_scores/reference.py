"""What attention says of tokens, in plain jnp: the contract, and the XLA path on every platform."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.blocks import divisor
from pallas_kernels.decode_attention.reference import EMPTY
from pallas_kernels.prefill_scores.scopes import Causal
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
    scope = Causal(min(window or t, t), recent)
    q = jnp.moveaxis(q.reshape(b, t, heads, n // heads, h), 1, 3)  # B K G T H
    k = jnp.moveaxis(k, 1, 2)
    lse = lse.reshape(b, heads, n // heads, t)

    def column(j: Array) -> Float[Array, "B K G block"]:
        key = jax.lax.dynamic_slice_in_dim(k, j * block, block, axis=2)
        key_pos = j * block + jnp.arange(block)

        def row(i: Array, total: Array) -> Array:
            cut = lambda x: jax.lax.dynamic_slice_in_dim(x, i * block, block, axis=3)
            pos = i * block + jnp.arange(block)
            seen = scope.seen(key_pos, pos[:, None], length[:, None, None])
            s = jnp.einsum("bkgqh,bksh->bkgqs", cut(q), key, preferred_element_type=jnp.float32) * scale
            s = soft_cap(s, cap)
            p = jnp.where(seen[:, None, None], jnp.exp(s - cut(lse)[..., None]), 0.0)
            return total + p.sum(axis=3)

        found = scope.blocks(j, block, block, length)
        nothing = jnp.zeros((b, heads, n // heads, block), jnp.float32)
        return jax.lax.fori_loop(found.first.min(), found.last.max(), row, nothing)

    sums = jax.lax.map(column, jnp.arange(t // block))  # T/block B K G block
    return jnp.moveaxis(sums, 0, 3).reshape(b, n, t)


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
    block: int = 2**18,
) -> Float[Array, "B N T"]:
    """The logarithm of the most attention that each token gets from the queries of its chunk.

        max over p of   gain[p] + s[p, j] - log(exp(others[p]) + sum over i of exp(s[p, i]))

    p are the chunk's queries, i its keys.

    Args:
      q: rotated queries, a whole number of chunks.
      k: rotated keys.
      others: log-sum-exp of what a query attends to beside its chunk's keys.
      gain: is added to the logarithm of what a query pays.
      length: tokens of each prompt; padded queries and keys count nothing.
      chunk: tokens that see each other; it divides Q.
      scale, cap: as in `column_sums`.
      block: products of so many queries and keys at once.

    Returns:
      `EMPTY` or less where no query of the chunk counts; of padding anything.

    Cost: Q chunk query-key products, in blocks.
    """
    b, tokens, n, h = q.shape
    t, heads = k.shape[1:3]
    size = divisor(chunk, max(1, block // chunk))
    q = jnp.moveaxis(q.reshape(b, tokens, heads, n // heads, h), 1, 3)  # B K G Q H
    k = jnp.moveaxis(jnp.pad(k, ((0, 0), (0, tokens - t), (0, 0), (0, 0))), 1, 2)
    others = others.reshape(b, heads, n // heads, tokens)

    def ask(i: Array, best: Array) -> Array:
        start = i * size // chunk * chunk
        cut = lambda x, axis, at=i * size, size=size: jax.lax.dynamic_slice_in_dim(x, at, size, axis)
        counts = lambda at, size: (at + jnp.arange(size) < length[:, None])[:, None, None]
        key = cut(k, 2, start, chunk)
        s = jnp.einsum("bkgqh,bksh->bkgqs", cut(q, 3), key, preferred_element_type=jnp.float32) * scale
        s = jnp.where(counts(start, chunk)[..., None, :], soft_cap(s, cap), EMPTY)
        lse = jnp.logaddexp(jax.nn.logsumexp(s, axis=-1), cut(others, 3))
        weight = s + (cut(gain, 1)[:, None, None] - lse)[..., None]
        most = jnp.where(counts(i * size, size)[..., None], weight, EMPTY).max(axis=3)
        return jax.lax.dynamic_update_slice_in_dim(best, jnp.maximum(cut(best, 3, start, chunk), most), start, 3)

    best = jnp.full((b, heads, n // heads, tokens), EMPTY, jnp.float32)
    best = jax.lax.fori_loop(0, (jnp.max(length) + size - 1) // size, ask, best)
    return best[..., :t].reshape(b, n, t)
