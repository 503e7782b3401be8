"""Attention: over a prompt, over the cache, and the scores that methods learn from it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kvjax.cache.store import KVStore
from kvjax.cache.tier import Tier
from kvjax.kernels import kernel_or_xla
from kvjax.spec import Prompt
from pallas_kernels import prefill_attention as prefill_kernel
from pallas_kernels import prefill_scores
from pallas_kernels.decode_attention import Expand, Part, Partial, decode_attention, merge, probabilities
from pallas_kernels.implementation import Implementation
from pallas_kernels.soft_cap import soft_cap


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


def spread(q: Float[Array, "B K G H"], heads: int) -> Float[Array, "B K G keys"]:
    """Queries against the keys of `heads` heads beside each other: each in its own key head's place, among zeros.

    Cost: `heads` times the products of the scores, which is little beside those that expand a latent to its keys.
    """
    if heads == 1:
        return q
    b, k, g, h = q.shape
    own = q.reshape(b, k, heads, g // heads, 1, h) * jnp.eye(heads, dtype=q.dtype)[:, None, :, None]
    return own.reshape(b, k, g, heads * h)


class Read(NamedTuple):
    """How attention reads a layer's tiers; the functions are those of `pallas_kernels.decode_attention`.

    Attributes:
      scale: of the products of queries and keys.
      cap: of those.
      after: of a sliding window.
      place: of slots.
      expand: of cached keys.
      select: which slots are attended, from the attention weights over all of them; None = all.
      kernels: which implementation; None = the platform's.
    """

    scale: float
    cap: float | None = None
    after: Int[Array, "B K"] | None = None
    place: Callable[[Int[Array, "B K s"]], Int[Array, "B K s"]] | None = None
    expand: Expand | None = None
    select: Callable[[tuple[Float[Array, "B K G S"], ...]], tuple[Bool[Array, "B K S"], ...]] | None = None
    kernels: Implementation | None = None


def decode(
    q: Float[Array, "B K G H"],
    tiers: Sequence[Tier],
    stores: Sequence[KVStore],
    read: Read,
    *,
    with_probabilities: bool,
) -> tuple[Float[Array, "B K G W"], tuple[Float[Array, "B K G S"], ...]]:
    """One query per row over all tiers, merged exactly.

    Args:
      q: rotated queries.
      tiers: one layer's views.
      stores: the number format of each.
      read: how they are read.
      with_probabilities: also return every slot's attention weight.
    """

    def attend(chosen: Sequence[Bool[Array, "B K S"] | None], logits: bool) -> Partial:
        parts = [_part(q, *each) for each in zip(tiers, stores, chosen, strict=True)]
        options = dict(scale=read.scale, cap=read.cap, after=read.after, place=read.place, expand=read.expand)
        return _attend(parts, read.kernels, with_logits=logits, **options)

    chosen = [None] * len(tiers)
    if read.select is not None:
        chosen = read.select(probabilities(attend(chosen, logits=True)))
    whole = attend(chosen, with_probabilities)
    return whole.o / whole.l[..., None], probabilities(whole) if with_probabilities else ()


def _part(q: Float[Array, "B K G H"], tier: Tier, store: KVStore, slots: Bool[Array, "B K S"] | None) -> Part:
    """A tier as the kernels read it."""
    pos = None if isinstance(tier.pos, tuple) else tier.pos
    query = store.query(q, tier.calib)
    return Part(query, tier.k, tier.v, tier.table, tier.length, pos, store.key.decode, store.value.decode, slots)


def _attend(parts: Sequence[Part], kernels: Implementation | None, **options: Any) -> Partial:
    """All parts in one launch; where a kernel cannot read one of them, each by itself and that one on XLA."""
    if len(parts) > 1:
        try:
            return decode_attention(parts, implementation=kernels, **options)
        except NotImplementedError:
            return merge([_attend([part], kernels, **options) for part in parts])
    return kernel_or_xla("decode attention", decode_attention, kernels, parts, **options)
