"""The policy of models that evict a token some time after it was read.

The gate of a token speaks about the token before it. One that is to be evicted stays for a window of `w` more tokens;
then the token that is read takes its slot. `Delayed` says what becomes of the newest `w + 1` tokens.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Int

from kvjax.cache import tier as tiers_
from kvjax.cache.layout import Layers, Tiers
from kvjax.cache.pages import LARGEST
from kvjax.cache.store import KVStore
from kvjax.cache.tier import Slots
from kvjax.policies import gate_capacity
from kvjax.policies.base import CachePolicy, PrefillOutput, RewrittenPrompt, write_token
from kvjax.policies.budgets.budget import Amounts
from kvjax.policies.ring import latest
from kvjax.spec import Gate, Lengths, ModelSpec, Prompt, Token, readable
from pallas_kernels.implementation import Implementation


class Delayed(NamedTuple):
    """What a row remembers of the newest tokens, by position."""

    slot: Int[Array, "*L B K size"]  # where the token is
    evict: Bool[Array, "*L B K size"]  # whether the gate said so


class Evictions(NamedTuple):
    """What becomes of a layer's prompt."""

    evict: Bool[Array, "B T K"]  # sooner or later; at tokens of the prompt only
    forced: Int[Array, "B K"]


@functools.cache
def delay(store: KVStore) -> CachePolicy:
    """Evict the tokens that the gate names, `window` tokens after the gate has spoken.

    Args:
      store: number format of the slots.

    `Amounts.keep` is the capacity, slots for which there is room, as in `gate_capacity.sequence_slots`. When there is
    none, the token that would leave the window and stay is evicted.

    Source: DMS (arXiv 2506.05345); Model-Optimizer `experimental/dms/dms/cache_paged.py`.
    Differs: eviction for want of room (the released cache is as large as it needs to be); `window` may be 0.
    Cost: 5 bytes per row and token of the window.
    """
    gate_capacity.check_store("dms", store)
    part = lambda function: functools.partial(function, store)
    return gate_capacity.policy((store,), part(_init), _rewrite, part(_prefill), part(_insert))


def _init(
    store: KVStore, spec: ModelSpec, layers: Layers, lengths: Lengths, dtype: DTypeLike, amounts: Amounts
) -> Tiers:
    gate = gate_capacity.gate_of(spec, "dms")
    size = gate.window + 1
    shape = (len(layers.index), len(lengths.prompt), spec.num_rows, size)
    own = Delayed(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))
    tier = gate_capacity.init(
        spec, layers, lengths, dtype, gate=gate, amounts=amounts, min_slots=size, store=store, own=own
    )
    return (tier,)


def _rewrite(
    tiers: Tiers,
    k: Array,
    v: Array,
    gate: Gate,
    length: Int[Array, " B"],
    window: int | None,
    kernels: Implementation | None,
) -> RewrittenPrompt:
    ((tier,), pos), end = (tiers, jnp.arange(k.shape[1])[:, None]), length[:, None, None]
    size = tier.state.own.slot.shape[-1]
    said = jnp.pad(gate.logit[:, 1:], ((0, 0), (0, 1), (0, 0)))  # about each token
    evict = (said > 0) & (pos < end - 1)
    asks = ~evict & (pos < end - size)  # to stay when it has left the window
    taken = jnp.broadcast_to(jnp.minimum(readable(length, window), size)[:, None], tier.length.shape)
    forced = gate_capacity.refuse(tier, said, asks, taken, length, window)
    evict |= forced
    visible_until = jnp.where(evict, pos + size - 1, LARGEST)
    evictions = Evictions(evict, forced.sum(axis=1, dtype=jnp.int32))
    return RewrittenPrompt(k, v, jnp.moveaxis(visible_until, 1, 2), evictions)


def _prefill(store: KVStore, tiers: Tiers, prompt: Prompt) -> tuple[Tiers, PrefillOutput]:
    (tier,), (evict, forced) = tiers, prompt.rewritten
    evict, size, end = jnp.moveaxis(evict, 1, 2), tier.state.own.slot.shape[-1], prompt.length[:, None, None]
    k, v = (jnp.moveaxis(x, 2, 1) for x in (prompt.key, prompt.value))
    pos = jnp.arange(k.shape[2])
    kept = prompt.alive()[:, None] & (~evict | (pos >= end - size))
    slot, filled = jnp.cumsum(kept, axis=-1) - 1, kept.sum(axis=-1, dtype=jnp.int32)
    at = jnp.broadcast_to(jnp.maximum(latest(end, size), 0), (*filled.shape, size))
    own = Delayed(*(jnp.take_along_axis(x, at, axis=-1) for x in (slot, evict)))
    found = gate_capacity.found(tier, filled)
    tier = tier._replace(budget=filled, state=tier.state._replace(forced=forced, own=own))
    tier = tiers_.reserve(tier, filled, k.shape[2])
    k, v, pos = tiers_.gather_masked(kept, k, v)
    return (tiers_.fill(tier, Slots(*store.encode(k, v, tier.balance), pos), filled),), found


def _insert(store: KVStore, tiers: Tiers, token: Token) -> Tiers:
    (tier,), gate = tiers, token.gate
    assert isinstance(gate, Gate)
    before = tier.state.own
    size, active = before.slot.shape[-1], jnp.broadcast_to(token.active[:, None], tier.length.shape)
    pos, place = token.pos[:, None, None], jnp.arange(size)
    here = place == pos % size  # where the token that leaves the window is noted, and then the new one
    evict = jnp.where(place == (pos - 1) % size, (gate.logit > 0)[..., None], before.evict)
    leaves = token.pos[:, None] >= size
    goes, (gone, free) = leaves & jnp.any(evict & here, axis=-1), tiers_.expired(tier, token.pos, token.window)
    if token.window is not None:
        goes &= size < token.window  # else it left that window before, and its slot was given away
    forced = leaves & ~goes & ~gone & (tier.length >= tier.budget)
    slot = jnp.where(goes | forced, jnp.sum(jnp.where(here, before.slot, 0), axis=-1), free)
    own = Delayed(
        jnp.where(active[..., None] & here, slot[..., None], before.slot),
        jnp.where(active[..., None], evict & ~here, before.evict),
    )
    forced = jnp.where(forced & active, tier.state.forced + 1, tier.state.forced)
    tier = tier._replace(state=tier.state._replace(forced=forced, own=own))
    return (write_token(tier, store, token, slot),)
