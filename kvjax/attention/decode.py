"""Attention over the cache."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kvjax.attention.dispatch import DECODE, kernel_or_xla
from kvjax.cache.store import KVStore
from kvjax.cache.tier import Tier
from pallas_kernels import decode_attention as kernel
from pallas_kernels.decode_attention import KeyExpansion, PagedKV, Partial, merge, probabilities
from pallas_kernels.implementation import Implementation


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
      probabilities: also return every slot's attention weight.
    """

    scale: float
    cap: float | None = None
    sink: Float[Array, "K G"] | None = None
    after: Int[Array, "B K"] | None = None
    place: Callable[[Int[Array, "B K s"]], Int[Array, "B K s"]] | None = None
    expand: KeyExpansion | None = None
    select: Callable[[tuple[Float[Array, "B K G S"], ...]], tuple[Bool[Array, "B K S"], ...]] | None = None
    probabilities: bool = False


def decode_attention(
    q: Float[Array, "B K G H"],
    tiers: Sequence[Tier],
    stores: Sequence[KVStore],
    options: ReadOptions,
    implementation: Implementation | None,
) -> tuple[Float[Array, "B K G W"], tuple[Float[Array, "B K G S"], ...]]:
    """One query per row over all tiers, merged exactly.

    Args:
      q: rotated queries.
      tiers: one layer's views; one of a single sequence is shared by all, and such come first.
      stores: the number format of each.
      options: how they are read.
      implementation: the kernel, which reads all tiers in one launch; where it cannot read one of them, each has a
        launch of its own, and that one is on XLA. None = the platform's.

    Returns:
      The means of values, and every tier's attention weights if they are asked for, else ().
    """
    chosen: Sequence[Bool[Array, "B K S"] | None] = [None] * len(tiers)
    if options.select is not None:
        every = options._replace(select=None, probabilities=True)
        chosen = options.select(decode_attention(q, tiers, stores, every, implementation)[1])
    if options.expand is not None and options.expand.up is not None:
        q = _beside_zeros(q, options.expand.up.shape[-1] // q.shape[-1])
    parts = [_paged(q, *each) for each in zip(tiers, stores, chosen, strict=True)]
    launches, shared = [parts], sum(tier.length.shape[0] < q.shape[0] for tier in tiers)
    of_sequences = options.select, options.after, options.place, options.expand
    if shared and not options.probabilities and all(x is None for x in of_sequences):
        # Queries of all sequences as one group: what they share is read once.
        launches = [[_as_one_sequence(part) for part in parts[:shared]], parts[shared:]]
    given = {name: getattr(options, name) for name in ("scale", "cap", "after", "place", "expand")}
    given["with_logits"] = options.probabilities
    found: list[Partial] = []
    for launch in launches:
        try:
            found.append(kernel.decode_attention(launch, implementation=implementation, **given))
        except NotImplementedError:
            for part in launch:
                run = kernel.decode_attention
                found.append(kernel_or_xla(DECODE, run, implementation, [part], **given))
    if len(launches) > 1:
        found = [_each_sequence(each, q.shape[0]) if each.o.shape[0] < q.shape[0] else each for each in found]
    if options.sink is not None:
        logit = jnp.broadcast_to(options.sink.astype(found[0].m.dtype), found[0].m.shape)
        found.append(Partial(jnp.zeros_like(found[0].o), jnp.ones_like(found[0].l), logit))
    whole = merge(found)
    return whole.o / whole.l[..., None], probabilities(whole) if options.probabilities else ()


def _beside_zeros(q: Float[Array, "B K G H"], heads: int) -> Float[Array, "B K G keys"]:
    """Queries against the keys of `heads` heads beside each other: each in its own key head's place, among zeros.

    Cost: `heads` times the products of the scores, which is little beside those that expand a latent to its keys.
    """
    if heads == 1:
        return q
    b, k, g, h = q.shape
    own = q.reshape(b, k, heads, g // heads, 1, h) * jnp.eye(heads, dtype=q.dtype)[:, None, :, None]
    return own.reshape(b, k, g, heads * h)


def _paged(q: Float[Array, "B K G H"], tier: Tier, store: KVStore, slots: Bool[Array, "B K S"] | None) -> PagedKV:
    """A tier as the kernels read it."""
    pos = None if isinstance(tier.pos, tuple) else tier.pos
    query = store.query(q, tier.balance)
    table, length = (jnp.broadcast_to(x, (q.shape[0], *x.shape[1:])) for x in (tier.table, tier.length))
    return PagedKV(query, tier.k, tier.v, table, length, pos, store.key.decode, store.value.decode, slots)


def _as_one_sequence(part: PagedKV) -> PagedKV:
    """What sequences share, with the queries of all as one group `[1 K (B G) ...]`."""
    q = jnp.moveaxis(part.q, 0, 1).reshape(1, part.q.shape[1], -1, part.q.shape[3])
    return part._replace(q=q, table=part.table[:1], length=part.length[:1])


def _each_sequence(whole: Partial, batch: int) -> Partial:
    """What queries of several sequences found as one group, `[1 K (B G) ...]`, sequence by sequence `[B K G ...]`."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[1], batch, -1, *x.shape[3:]), 1, 0), whole)
