"""What prompts say of their tokens: the scores that methods learn from attention."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kvjax.attention.dispatch import kernel_or_xla
from kvjax.spec import Probe, Prompt
from pallas_kernels import prefill_scores
from pallas_kernels.blocks import divisor
from pallas_kernels.decode_attention.reference import EMPTY
from pallas_kernels.implementation import resolve
from pallas_kernels.soft_cap import soft_cap

BLOCK = 512  # products of so many queries and keys at once


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
    probe, (b, t, heads, h) = prompt.probe, prompt.k.shape
    assert isinstance(probe, Probe), "the recipe has no replay"
    tokens, n, chunk, sinks = probe.q.shape[1], prompt.q.shape[2], probe.chunk, min(sinks, t)
    block = divisor(chunk, max(1, BLOCK * BLOCK // (sinks + chunk)))
    q = jnp.moveaxis(probe.q.reshape(b, tokens, heads, n // heads, h), 1, 3)  # B K G Q H
    k = jnp.moveaxis(jnp.pad(prompt.k, ((0, 0), (0, tokens - t), (0, 0), (0, 0))), 1, 2)
    of_own = probe.lse.reshape(b, heads, n // heads, tokens)
    unit = -jnp.log(probe.size) if weighted else jnp.zeros_like(probe.size)
    length = prompt.length[:, None]

    def ask(i: Array, best: Array) -> Array:
        start = i * block // chunk * chunk
        cut = lambda x, axis, at=i * block, size=block: jax.lax.dynamic_slice_in_dim(x, at, size, axis)
        pos = jnp.concatenate([jnp.arange(sinks), start + jnp.arange(chunk)])
        inside = (pos >= start) & (pos < start + chunk)
        seen = (pos < length) & (inside != (jnp.arange(sinks + chunk) < sinks))  # a sink of the chunk counts once
        key = jnp.concatenate([k[:, :, :sinks], cut(k, 2, start, chunk)], axis=2)
        s = jnp.einsum("bkgqh,bksh->bkgqs", cut(q, 3), key, preferred_element_type=jnp.float32) * prompt.scale
        s = jnp.where(seen[:, None, None, None], soft_cap(s, prompt.cap), EMPTY)
        lse = jnp.logaddexp(jax.nn.logsumexp(s, axis=-1), cut(of_own, 3))
        asked = i * block + jnp.arange(block) < length
        weight = s[..., sinks:] + (cut(unit, 1)[:, None, None] - lse)[..., None]
        most = jnp.where(asked[:, None, None, :, None], weight, -jnp.inf).max(axis=3)
        return jax.lax.dynamic_update_slice_in_dim(best, jnp.maximum(cut(best, 3, start, chunk), most), start, 3)

    best = jnp.full((b, heads, n // heads, tokens), -jnp.inf, jnp.float32)
    best = jax.lax.fori_loop(0, (jnp.max(length) + block - 1) // block, ask, best)[..., :t].reshape(b, n, t)
    if weighted:
        best = best + jnp.log(reach(prompt))
    return jnp.exp(best).reshape(b, prompt.key.shape[2], -1, t).max(axis=2)


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
