"""Attention over the cache."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kvjax.attention.dispatch import kernel_or_xla
from kvjax.cache.store import KVStore
from kvjax.cache.tier import Tier
from pallas_kernels import decode_attention as kernel
from pallas_kernels.decode_attention import KeyExpansion, PagedKV, Partial, merge, probabilities
from pallas_kernels.implementation import Implementation


def spread(q: Float[Array, "B K G H"], heads: int) -> Float[Array, "B K G keys"]:
    """Queries against the keys of `heads` heads beside each other: each in its own key head's place, among zeros.

    Cost: `heads` times the products of the scores, which is little beside those that expand a latent to its keys.
    """
    if heads == 1:
        return q
    b, k, g, h = q.shape
    own = q.reshape(b, k, heads, g // heads, 1, h) * jnp.eye(heads, dtype=q.dtype)[:, None, :, None]
    return own.reshape(b, k, g, heads * h)


class ReadOptions(NamedTuple):
    """How attention reads a layer's tiers; the functions are those of `pallas_kernels.decode_attention`.

    Attributes:
      scale: of the products of queries and keys.
      cap: of those.
      sink: one more logit of each query head, of no slot; see `kvjax.attention.prompt`.
      after: of a sliding window.
      place: of slots.
      expand: of cached keys.
      select: which slots are attended, from the attention weights over all of them; None = all.
      kernels: which implementation; None = the platform's.
    """

    scale: float
    cap: float | None = None
    sink: Float[Array, "K G"] | None = None
    after: Int[Array, "B K"] | None = None
    place: Callable[[Int[Array, "B K s"]], Int[Array, "B K s"]] | None = None
    expand: KeyExpansion | None = None
    select: Callable[[tuple[Float[Array, "B K G S"], ...]], tuple[Bool[Array, "B K S"], ...]] | None = None
    kernels: Implementation | None = None


def decode_attention(
    q: Float[Array, "B K G H"],
    tiers: Sequence[Tier],
    stores: Sequence[KVStore],
    read: ReadOptions,
    *,
    with_probabilities: bool,
) -> tuple[Float[Array, "B K G W"], tuple[Float[Array, "B K G S"], ...]]:
    """One query per row over all tiers, merged exactly.

    Args:
      q: rotated queries.
      tiers: one layer's views; one of a single sequence is shared by all.
      stores: the number format of each.
      read: how they are read.
      with_probabilities: also return every slot's attention weight.
    """

    def attend(chosen: Sequence[Bool[Array, "B K S"] | None], logits: bool, q: Array = q, only: slice = slice(None)):
        parts = [_part(q, *each) for each in zip(tiers[only], stores[only], chosen[only], strict=True)]
        options = dict(scale=read.scale, cap=read.cap, after=read.after, place=read.place, expand=read.expand)
        return _attend(parts, read.kernels, with_logits=logits, **options)

    chosen = [None] * len(tiers)
    if read.select is not None:
        chosen = read.select(probabilities(_with_sink(attend(chosen, logits=True), read.sink)))
    shared = sum(tier.length.shape[0] < q.shape[0] for tier in tiers)  # they come first
    apart = with_probabilities or any(x is not None for x in (read.select, read.after, read.place, read.expand))
    if shared and not apart:
        # Queries of all sequences as one group: what they share is read once.
        beside = attend(chosen, False, jnp.moveaxis(q, 0, 1).reshape(1, q.shape[1], -1, q.shape[3]), slice(shared))
        whole = merge([_each_sequence(beside, q.shape[0]), attend(chosen, False, only=slice(shared, None))])
    else:
        whole = attend(chosen, with_probabilities)
    whole = _with_sink(whole, read.sink)
    return whole.o / whole.l[..., None], probabilities(whole) if with_probabilities else ()


def _with_sink(found: Partial, sink: Float[Array, "K G"] | None) -> Partial:
    """With one more logit of each query head, whose value is zero."""
    if sink is None:
        return found
    logit = jnp.broadcast_to(sink.astype(found.m.dtype), found.m.shape)
    return merge([found, Partial(jnp.zeros_like(found.o), jnp.ones_like(found.l), logit)])


def _each_sequence(whole: Partial, batch: int) -> Partial:
    """What queries of several sequences found as one group, `[1 K (B G) ...]`, sequence by sequence `[B K G ...]`."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[1], batch, -1, *x.shape[3:]), 1, 0), whole)


def _part(q: Float[Array, "B K G H"], tier: Tier, store: KVStore, slots: Bool[Array, "B K S"] | None) -> PagedKV:
    """A tier as the kernels read it."""
    pos = None if isinstance(tier.pos, tuple) else tier.pos
    query = store.query(q, tier.balance)
    table, length = (jnp.broadcast_to(x, (q.shape[0], *x.shape[1:])) for x in (tier.table, tier.length))
    return PagedKV(query, tier.k, tier.v, table, length, pos, store.key.decode, store.value.decode, slots)


def _attend(parts: Sequence[PagedKV], kernels: Implementation | None, **options: Any) -> Partial:
    """All parts in one launch; where a kernel cannot read one of them, each by itself and that one on XLA."""
    if len(parts) > 1:
        try:
            return kernel.decode_attention(parts, implementation=kernels, **options)
        except NotImplementedError:
            return merge([_attend([part], kernels, **options) for part in parts])
    return kernel_or_xla("decode attention", kernel.decode_attention, kernels, parts, **options)
