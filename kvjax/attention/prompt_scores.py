"""What prompts say of their tokens: the scores that methods learn from attention."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kvjax.attention.dispatch import kernel_or_xla
from kvjax.spec import Probe, Prompt
from pallas_kernels import prefill_scores
from pallas_kernels.decode_attention.reference import EMPTY
from pallas_kernels.implementation import resolve
from pallas_kernels.soft_cap import soft_cap


def column_sums(prompt: Prompt) -> Float[Array, "B K T"]:
    """Attention that each prompt token received from all queries, averaged over the query heads of its row."""
    return _of_rows(prompt, query_column_sums(prompt))


def _of_rows(prompt: Prompt, sums: Float[Array, "B N T"]) -> Float[Array, "B K T"]:
    return sums.reshape(sums.shape[0], prompt.key.shape[2], -1, sums.shape[-1]).mean(axis=2)


def query_column_sums(prompt: Prompt, recent: int | None = None) -> Float[Array, "B N T"]:
    """Attention that each prompt token received from each query head: from all queries, or the `recent` last ones."""
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
    if resolve(prompt.kernels) != "xla":
        return _of_rows(prompt, query_column_sums(prompt, size))
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


def replay_maxima(prompt: Prompt, sinks: int, *, weighted: bool) -> Float[Array, "B K T"]:
    """The most attention that a token gets when its chunk of the prompt is read again behind it: `Prompt.probe`.

        max over n, p of   a[n, p, j] = exp(s[n, p, j]) / sum over i of exp(s[n, p, i])

    n is a query head of the row, p and j are tokens of one chunk; i are the first `sinks` tokens, the chunk's, and what
    has been read again of it, up to p. So numbers of different chunks compare.

    Args:
      prompt: with a probe.
      sinks: tokens.
      weighted: of `a[n, p, j] |W_n v_j| / |x_p|`: what the token adds to the residual stream, beside p's own vector.

    Cost: T (chunk + sinks) products for each query head, in blocks; weighted, T N H^2 more.
    """
    probe, (b, t, _, _) = prompt.probe, prompt.k.shape
    assert isinstance(probe, Probe), "the recipe has no replay"
    gain = -jnp.log(probe.size) if weighted else jnp.zeros_like(probe.size)
    best = kernel_or_xla(
        "scores of a prompt",
        prefill_scores.column_max,
        prompt.kernels,
        *(probe.q, prompt.k, _beside(prompt, probe, min(sinks, t)), gain, prompt.length),
        chunk=probe.chunk,
        scale=prompt.scale,
        cap=prompt.cap,
    )
    if weighted:
        best = best + jnp.log(reach(prompt))
    return jnp.exp(best).reshape(b, prompt.key.shape[2], -1, t).max(axis=2)


def _beside(prompt: Prompt, probe: Probe, sinks: int) -> Float[Array, "B N Q"]:
    """Log-sum-exp of what a query attends to beside its chunk of the prompt: what was read again, and the sinks."""
    b, tokens, n, h = probe.q.shape
    heads, chunk = prompt.k.shape[2], jnp.arange(tokens)[:, None] // probe.chunk
    q, k = probe.q.reshape(b, tokens, heads, n // heads, h), prompt.k[:, :sinks]
    s = soft_cap(jnp.einsum("bqkgh,bskh->bkgqs", q, k, preferred_element_type=jnp.float32) * prompt.scale, prompt.cap)
    pos = jnp.arange(sinks)
    seen = (pos < prompt.length[:, None, None]) & (pos // probe.chunk != chunk)  # those of its chunk count once
    s = jnp.where(seen[:, None, None], s, EMPTY).reshape(b, n, tokens, sinks)
    return jax.nn.logsumexp(jnp.concatenate([s, probe.lse[..., None]], axis=-1), axis=-1)


def reach(prompt: Prompt) -> Float[Array, "B N T"]:
    """L2 norms of what each query head adds to the residual stream where it attends to one token alone.

    Cost: T N H^2 products; the model's width is only in the products of the output projection with itself.
    """
    assert callable(prompt.out)
    out, v = prompt.out(), prompt.v.astype(jnp.float32)
    grouped = jnp.moveaxis(out.reshape(v.shape[2], -1, *out.shape[1:]), 1, 0)  # G K H D

    def of_one(kernel: Float[Array, "K H D"]) -> Float[Array, "B K T"]:
        gram = jnp.einsum("khd,kid->khi", kernel, kernel)
        return jnp.einsum("btkh,khi,btki->bkt", v, gram, v)

    square = jnp.moveaxis(jax.lax.map(of_one, grouped), 0, 2)
    return jnp.sqrt(jnp.maximum(square, 0.0)).reshape(v.shape[0], -1, v.shape[1])
