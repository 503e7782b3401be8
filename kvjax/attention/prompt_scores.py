"""What prompts say of their tokens: the scores that methods learn from attention."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kvjax.attention.dispatch import kernel_or_xla
from kvjax.spec import Prompt
from pallas_kernels import prefill_scores
from pallas_kernels.soft_cap import soft_cap


def column_sums(prompt: Prompt) -> Float[Array, "B K T"]:
    """Attention that each prompt token received from all queries, averaged over the query heads of its row."""
    return _of_rows(prompt, query_column_sums(prompt))


def _of_rows(prompt: Prompt, sums: Float[Array, "B N T"]) -> Float[Array, "B K T"]:
    return sums.reshape(sums.shape[0], prompt.key.shape[2], -1, sums.shape[-1]).mean(axis=2)


def query_column_sums(prompt: Prompt) -> Float[Array, "B N T"]:
    """Attention that each prompt token received from all queries of each query head."""
    return _query_column_sums(prompt, recent=None)


def _query_column_sums(prompt: Prompt, recent: int | None) -> Float[Array, "B N T"]:
    return kernel_or_xla(
        "scores of a prompt",
        prefill_scores.column_sums,
        prompt.kernels,
        *(prompt.q, prompt.k, prompt.lse, prompt.length),
        scale=prompt.scale,
        cap=prompt.cap,
        window=prompt.window,
        recent=recent,
    )


def channel_balance(prompt: Prompt) -> Float[Array, "B K R"]:
    """What keys are multiplied by, and queries divided by, so that a channel's largest of both are equal.

        sqrt(max |q| / max |k|)

    over a prompt's tokens and the query heads of the group; 1 where a channel is zero, between 1e-4 and 1e4.

    Source: MiKV (arXiv 2402.18096), the channel balancer; SmoothQuant's (arXiv 2211.10438) with alpha = 1/2.
    """
    b, t, heads, h = prompt.k.shape
    real = (jnp.arange(t) < prompt.length[:, None])[..., None, None]
    largest = lambda x: jnp.where(real, jnp.abs(x.astype(jnp.float32)), 0.0).max(axis=1)
    q, k = largest(prompt.q).reshape(b, heads, -1, h).max(axis=2), largest(prompt.k)
    known = (q > 0) & (k > 0)
    return jnp.where(known, jnp.clip(jnp.sqrt(jnp.where(known, q / jnp.where(known, k, 1), 1)), 1e-4, 1e4), 1.0)


def window_sums(prompt: Prompt, size: int) -> Float[Array, "B K T"]:
    """Attention that each prompt token received from the last `size` queries, averaged over its row's query heads."""
    if prompt.kernels != "xla":
        return _of_rows(prompt, _query_column_sums(prompt, recent=size))
    b, t, n, h = prompt.q.shape
    heads, size = prompt.k.shape[2], min(size, t)
    pos = prompt.length[:, None] - size + jnp.arange(size)  # B w
    at = jnp.maximum(pos, 0)
    q = jnp.take_along_axis(prompt.q, at[..., None, None], axis=1).reshape(b, size, heads, n // heads, h)
    lse = jnp.take_along_axis(prompt.lse, at[:, None], axis=2).reshape(b, heads, n // heads, size)
    s = jnp.einsum("bwkgh,bskh->bkgws", q, prompt.k, preferred_element_type=jnp.float32) * prompt.scale
    s = soft_cap(s, prompt.cap)
    distance = pos[..., None] - jnp.arange(t)
    seen = (pos[..., None] >= 0) & (distance >= 0) & (distance < (prompt.window or t))
    p = jnp.where(seen[:, None, None], jnp.exp(s - lse[..., None]), 0.0)
    return _of_rows(prompt, p.sum(axis=3).reshape(b, n, t))
