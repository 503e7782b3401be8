"""Attention over prompts."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kvjax.attention.dispatch import kernel_or_xla
from pallas_kernels import prefill_attention as prefill_kernel
from pallas_kernels.implementation import Implementation


def prefill_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    length: Int[Array, " B"],
    *,
    scale: float | None = None,
    cap: float | None = None,
    window: int | None = None,
    until: Int[Array, "B K T"] | None = None,
    sink: Float[Array, " N"] | None = None,
    kernels: Implementation | None = "xla",
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Exact causal attention over prompts, and its log-sum-exps: `pallas_kernels.prefill_attention`.

    A sink is one more logit of each head in the sum, whose value is 0: it makes outputs and weights smaller.
    """
    options = {"scale": scale, "cap": cap, "window": window, "until": until}
    heads, lse = kernel_or_xla("attention over a prompt", prefill_kernel.attention, kernels, q, k, v, length, **options)
    if sink is None:
        return heads, lse
    whole = jnp.logaddexp(lse, sink.astype(lse.dtype)[:, None])
    return heads * jnp.moveaxis(jnp.exp(lse - whole), 1, 2)[..., None].astype(heads.dtype), whole
