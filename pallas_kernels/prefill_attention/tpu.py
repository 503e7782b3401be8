"""Attention over prompts on TPUs: splash attention, which JAX ships."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Float, Int

from pallas_kernels.blocks import LANES


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    length: Int[Array, " B"],
    *,
    scale: float | None = None,
    cap: float | None = None,
    window: int | None = None,
    block: int = 1024,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Causal attention: the contract of `reference.attention`.

    Prompts are padded on the right, so that no query of a prompt looks at padding and `length` is not needed; rows of
    other than a multiple of 128 tokens, and heads of other than a multiple of 128 numbers, are padded for the call.

    Args:
      block: most tokens per block on both axes; a multiple of 128.
      interpret: run without a TPU, slowly.

    Source: `jax.experimental.pallas.ops.tpu.splash_attention`.
    """
    del length
    b, t, n, h = q.shape
    heads, padded, width = k.shape[2], pl.cdiv(t, LANES) * LANES, pl.cdiv(h, LANES) * LANES
    fill = lambda x: jnp.pad(x, ((0, 0), (0, padded - t), (0, 0), (0, width - h)))
    of_heads = lambda x: jnp.moveaxis(fill(x), 1, 2)  # B N T H
    run = _kernel(padded, n // heads, cap, window, block, interpret)
    query = of_heads(q * jnp.asarray(h**-0.5 if scale is None else scale, q.dtype)).reshape(
        b, heads, n // heads, padded, width
    )
    out, (lse,) = jax.vmap(jax.vmap(run))(query, of_heads(k), of_heads(v))
    out = jnp.moveaxis(out.reshape(b, n, padded, width), 1, 2)
    return out[:, :t, :, :h], lse.reshape(b, n, padded)[..., :t]


def _kernel(tokens: int, heads: int, cap: float | None, window: int | None, block: int, interpret: bool) -> Any:
    """For the query heads of one key/value head; returns the heads' outputs and, in a tuple, log-sum-exps."""
    shape = (tokens, tokens)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    size = next(d for d in range(min(block, tokens) // LANES * LANES, 0, -LANES) if tokens % d == 0)
    return splash.make_splash_mqa_single_device(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(block_q=size, block_kv=size),
        attn_logits_soft_cap=cap,
        save_residuals=True,
        interpret=interpret,
    )
