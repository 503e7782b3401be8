"""Attention over prompts in plain jnp: the contract, and the XLA path on every platform."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.blocks import divisor
from pallas_kernels.decode_attention.reference import EMPTY
from pallas_kernels.soft_cap import soft_cap


def tokens_at_once(t: int) -> int:
    """Tokens of a block: fewer in short prompts, whose last block is a larger part of them.

    >>> tokens_at_once(2048), tokens_at_once(4096)
    (256, 512)
    """
    return 256 if t <= 2048 else 512


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    length: Int[Array, " B"],
    *,
    scale: float | None = None,
    cap: float | None = None,
    window: int | None = None,
    until: Int[Array, "B K T"] | None = None,
    block: int | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Exact causal attention over prompts that are padded on the right.

    Args:
      q, k, v: rotated queries and keys, values.
      length: tokens of each prompt; padded keys are never attended, padded queries give finite garbage, zeros in blocks
        where no prompt has any.
      scale: factor on the logits; None = H ** -0.5.
      cap: bounds them, see `soft_cap`; None = it does not.
      window: sliding window [tokens].
      until: the last position whose query sees a key; None = all see it.
      block: most tokens per block on both axes; blocks divide T. None = `tokens_at_once`.

    Returns:
      The heads' outputs, and the log-sum-exp of each query's scaled logits in float32.

    Cost: T^2/2 products, in blocks with an online softmax (arXiv 2112.05682): memory grows with T, not with its square.
    """
    b, t, n, h = q.shape
    heads, block, factor = k.shape[2], divisor(t, block or tokens_at_once(t)), h**-0.5 if scale is None else scale
    q, k, v = (jnp.moveaxis(x, 1, 2) for x in (q, k, v))
    cut = lambda x, i, axis=-2: jax.lax.dynamic_slice_in_dim(x, i * block, block, axis=axis)

    def row(i: Array, done: tuple[Array, Array]) -> tuple[Array, Array]:
        query, pos = cut(q, i).reshape(b, heads, n // heads, block, h), i * block + jnp.arange(block)

        def column(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            o, total, top = carry
            key_pos = j * block + jnp.arange(block)
            distance = pos[:, None] - key_pos
            seen = (distance >= 0) & (distance < (window or t)) & (key_pos < length[:, None, None])
            s = jnp.einsum("bkgqh,bksh->bkgqs", query, cut(k, j), preferred_element_type=jnp.float32) * factor
            s = soft_cap(s, cap)
            seen = seen[:, None]
            if until is not None:
                seen = seen & (pos[:, None] <= cut(until[..., None, :], j, axis=-1))
            s = jnp.where(seen[:, :, None], s, EMPTY)
            m = jnp.maximum(top, s.max(axis=-1))
            e, old = jnp.exp(s - m[..., None]), jnp.exp(top - m)
            more = jnp.einsum("bkgqs,bksh->bkgqh", e.astype(v.dtype), cut(v, j), preferred_element_type=jnp.float32)
            return o * old[..., None] + more, total * old + e.sum(axis=-1), m

        shape = query.shape[:-1]
        empty = (
            jnp.zeros(query.shape, jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.full(shape, EMPTY, jnp.float32),
        )
        first = 0 if window is None else jnp.maximum(i - 1 - window // block, 0)
        o, total, top = jax.lax.fori_loop(first, i + 1, column, empty)
        o, lse = (o / total[..., None]).astype(v.dtype), top + jnp.log(total)
        put = lambda whole, new: jax.lax.dynamic_update_slice_in_dim(whole, new, i * block, axis=2)
        return put(done[0], o.reshape(b, n, block, h)), put(done[1], lse.reshape(b, n, block))

    nothing = jnp.zeros(q.shape, v.dtype), jnp.zeros((b, n, t), jnp.float32)
    o, lse = jax.lax.fori_loop(0, (jnp.max(length) + block - 1) // block, row, nothing)
    return jnp.moveaxis(o, 2, 1), lse
