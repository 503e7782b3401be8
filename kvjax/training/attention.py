"""Attention for training: exact, differentiable, without a `T x T` matrix that is kept for the gradient."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from pallas_kernels.soft_cap import soft_cap

Attend = Literal["blocks", "cudnn"]


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    bias: Float[Array, "B K T"] | None = None,
    free: int = 0,
    scale: float | None = None,
    cap: float | None = None,
    window: int | None = None,
    how: Attend = "blocks",
) -> Float[Array, "B T N H"]:
    """Causal attention over sequences of equal length.

    Args:
      q, k, v: rotated queries and keys, values.
      bias: added to the logits of a key for queries that are more than `free` tokens behind it.
      free: tokens.
      scale: factor on the logits; None = H ** -0.5.
      cap: bounds them before the bias is added, see `soft_cap`.
      window: sliding window [tokens].
      how: `blocks`: at most 256 queries with the keys up to their end, computed again for the gradient, a little over
        half of the products of the full matrix. `cudnn`: the fused kernel of NVIDIA GPUs, for bfloat16 and no bias.
    """
    if how == "cudnn":
        assert bias is None and window is None and cap is None
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, scale=scale, implementation="cudnn")
    b, t, n, h = q.shape
    factor = h**-0.5 if scale is None else scale
    heads, size = k.shape[2], min(256, max(128, t // 8))
    q = jnp.moveaxis(q.reshape(b, t, heads, n // heads, h), 1, 3)  # B K G T H
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)

    wide = np.promote_types(q.dtype, jnp.float32)

    @jax.checkpoint
    def block(q: Array, k: Array, v: Array, bias: Array | None) -> Array:
        rows, seen = q.shape[3], k.shape[2]
        score = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=wide) * factor
        score = soft_cap(score, cap)
        distance = jnp.arange(seen - rows, seen)[:, None] - jnp.arange(seen)
        if bias is not None:
            score = score + jnp.where(distance > free, bias[:, :, None, None], 0.0)
        visible = (distance >= 0) & (distance < (window or t))
        prob = jax.nn.softmax(jnp.where(visible, score, -jnp.inf), axis=-1).astype(v.dtype)
        return jnp.einsum("bkgts,bksh->bkgth", prob, v)

    starts = range(0, t, size)
    out = [
        block(
            q[..., s : s + size, :],
            k[:, :, : s + size],
            v[:, :, : s + size],
            bias if bias is None else bias[..., : s + size],
        )
        for s in starts
    ]
    return jnp.moveaxis(jnp.concatenate(out, axis=3), 3, 1).reshape(b, t, n, h)
