"""Attention over prompts."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kvjax.attention.dispatch import kernel_or_xla
from pallas_kernels import prefill_attention as prefill_kernel
from pallas_kernels.implementation import Implementation


def prefill_attention(
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
    sink: Float[Array, " N"] | None = None,
    kernels: Implementation | None = "xla",
) -> tuple[Float[Array, "B Q N H"], Float[Array, "B N Q"]]:
    """Exact causal attention over prompts, and its log-sum-exps: `pallas_kernels.prefill_attention`.

    A sink is one more logit of each head in the sum, whose value is 0: it makes outputs and weights smaller.
    """
    options = {"scale": scale, "cap": cap, "window": window, "visible_until": visible_until, "behind": behind}
    heads, lse = kernel_or_xla("attention over a prompt", prefill_kernel.attention, kernels, q, k, v, length, **options)
    if sink is None:
        return heads, lse
    whole = jnp.logaddexp(lse, sink.astype(lse.dtype)[:, None])
    return heads * jnp.moveaxis(jnp.exp(lse - whole), 1, 2)[..., None].astype(heads.dtype), whole


def replay_attention(
    q: Float[Array, "B Q N H"],
    prompt: tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]],
    own: tuple[Float[Array, "B Q K H"], Float[Array, "B Q K H"]],
    length: Int[Array, " B"],
    *,
    chunk: int,
    sink: Float[Array, " N"] | None,
    **options: Any,
) -> tuple[Float[Array, "B Q N H"], Float[Array, "B N Q"]]:
    """Attention of a prompt that is read again behind its end, see `kvjax.spec.Probe`: to the prompt and to its chunk.

    Args:
      q: rotated queries.
      prompt: rotated keys and values of the prompt.
      own: those of what is read again.
      length: tokens of each prompt, and of each that are read again.
      chunk: tokens that see each other; it divides Q.
      sink, options: as in `prefill_attention`.

    Returns:
      The heads' outputs, and log-sum-exps over the chunk's own keys (and the sink) alone.
    """

    def read(c: Array, done: tuple[Array, Array]) -> tuple[Array, Array]:
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, c * chunk, chunk, axis=1)
        query, count = cut(q), jnp.clip(length - c * chunk, 0, chunk)
        o, lse = prefill_attention(query, cut(own[0]), cut(own[1]), count, sink=sink, **options)
        seen, of_prompt = prefill_attention(query, prompt[0], prompt[1], length, behind=count, **options)
        share = jnp.moveaxis(jax.nn.sigmoid(of_prompt - lse), 1, 2)[..., None].astype(o.dtype)
        put = lambda whole, new, axis: jax.lax.dynamic_update_slice_in_dim(whole, new, c * chunk, axis)
        return put(done[0], o + (seen - o) * share, 1), put(done[1], lse, 2)

    b, tokens, n, _ = q.shape
    nothing = jnp.zeros(q.shape, own[1].dtype), jnp.zeros((b, n, tokens), jnp.float32)
    return jax.lax.fori_loop(0, (jnp.max(length) + chunk - 1) // chunk, read, nothing)
