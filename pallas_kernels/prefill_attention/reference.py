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
    q: Float[Array, "B Q N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    length: Int[Array, " B"],
    *,
    scale: float | None = None,
    cap: float | None = None,
    window: int | None = None,
    visible_until: Int[Array, "B K T"] | None = None,
    behind: Int[Array, " B"] | None = None,
    block: int | None = None,
) -> tuple[Float[Array, "B Q N H"], Float[Array, "B N Q"]]:
    """Exact causal attention over prompts that are padded on the right.

    Args:
      q, k, v: rotated queries and keys, values.
      length: tokens of each prompt; padded keys are never attended, padded queries give finite garbage, zeros in blocks
        where no prompt has any.
      scale: factor on the logits; None = H ** -0.5.
      cap: bounds them, see `soft_cap`; None = it does not.
      window: sliding window [tokens].
      visible_until: the last position whose query sees a key; None = all see it.
      behind: how many queries of each prompt there are that follow it, from position `length` on, and see all its keys;
        None = the queries are the prompt's own.
      block: most tokens per block on both axes; blocks divide Q and T. None = `tokens_at_once`.

    Returns:
      The heads' outputs, and the log-sum-exp of each query's scaled logits in float32.

    Cost: T^2/2 products, in blocks with an online softmax (arXiv 2112.05682): memory grows with T, not with its square.
    """
    (b, queries, n, h), (_, t, heads, _) = q.shape, k.shape
    factor, most = h**-0.5 if scale is None else scale, block or tokens_at_once(t)
    block, keys = divisor(queries, most), divisor(t, most)
    count, start = (length, jnp.zeros_like(length[:1])) if behind is None else (behind, length)
    q, k, v = (jnp.moveaxis(x, 1, 2) for x in (q, k, v))
    cut = lambda x, i, size=keys, axis=-2: jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=axis)

    def row(i: Array, done: tuple[Array, Array]) -> tuple[Array, Array]:
        query = cut(q, i, block).reshape(b, heads, n // heads, block, h)
        pos = start[:, None] + i * block + jnp.arange(block)

        def column(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            o, total, top = carry
            key_pos = j * keys + jnp.arange(keys)
            distance = pos[..., None] - key_pos
            seen = (distance >= 0) & (key_pos < length[:, None, None])
            seen = seen if window is None else seen & (distance < window)
            s = jnp.einsum("bkgqh,bksh->bkgqs", query, cut(k, j), preferred_element_type=jnp.float32) * factor
            s = soft_cap(s, cap)
            seen = seen[:, None]
            if visible_until is not None:
                seen = seen & (pos[:, None, :, None] <= cut(visible_until[..., None, :], j, axis=-1))
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
        first = 0 if window is None else jnp.maximum((jnp.min(start) + i * block + 1 - window) // keys, 0)
        last = i + 1 if behind is None else (jnp.max(length) + keys - 1) // keys
        # A block whose keys all are out of the window is read rather than none: sums of nothing would be divided by 0.
        o, total, top = jax.lax.fori_loop(jnp.minimum(first, last - 1), last, column, empty)
        o, lse = (o / total[..., None]).astype(v.dtype), top + jnp.log(total)
        put = lambda whole, new: jax.lax.dynamic_update_slice_in_dim(whole, new, i * block, axis=2)
        return put(done[0], o.reshape(b, n, block, h)), put(done[1], lse.reshape(b, n, block))

    nothing = jnp.zeros(q.shape, v.dtype), jnp.zeros((b, n, queries), jnp.float32)
    o, lse = jax.lax.fori_loop(0, (jnp.max(count) + block - 1) // block, row, nothing)
    return jnp.moveaxis(o, 2, 1), lse
