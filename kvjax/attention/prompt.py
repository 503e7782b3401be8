"""Attention over prompts."""

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
    kernels: Implementation | None = "xla",
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Exact causal attention over prompts, and its log-sum-exps: `pallas_kernels.prefill_attention`."""
    options = {"scale": scale, "cap": cap, "window": window, "until": until}
    return kernel_or_xla("attention over a prompt", prefill_kernel.attention, kernels, q, k, v, length, **options)
