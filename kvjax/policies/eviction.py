"""Eviction actions: what becomes of the tokens that must leave."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kvjax.cache import tier as tiers_
from kvjax.cache.layout import Tiers
from kvjax.cache.store import KVStore
from kvjax.cache.tier import Slots, Tier
from kvjax.errors import InputError
from kvjax.spec import PyTree, Token

BLOCK = 512  # tokens that are compared with others at once

Stores = tuple[KVStore, ...]


class Evicted(NamedTuple):
    """The tokens of a prompt that are kept, and all the others."""

    k: Float[Array, "B K T R"]  # of all tokens
    v: Float[Array, "B K T W"]
    pos: Int[Array, "B K T"]
    best: Int[Array, "B K n"]  # tokens in the order of their slots; T in empty ones
    filled: Int[Array, "B K"]  # slots that are filled
    count: Int[Array, "B K"]  # tokens; what follows them is none

    @property
    def gone(self) -> Bool[Array, "B K T"]:
        """Which tokens are not kept."""
        filled = jnp.arange(self.best.shape[-1]) < self.filled[..., None]
        stays = jnp.zeros(self.k.shape[:3], bool).at[(*_row(self.filled), self.best)].set(filled, mode="drop")
        return ~stays & (jnp.arange(self.k.shape[2]) < self.count[..., None])


class RowState(NamedTuple):
    """What `retain` remembers of each row of the first tier; () where a method has no need of it."""

    new: Int[Array, "*L B K"] | tuple = ()  # tokens that may follow the prompt
    decode_slots: Int[Array, "*L B K"] | tuple = ()  # that it may fill while decoding beside its prompt's
    share: Int[Array, "*L B K 2"] | tuple = ()  # of all tokens, numerator and denominator, where the budget grows
    action: PyTree = ()  # of the eviction action


class EvictionAction(NamedTuple):
    """What happens to tokens that are not kept.

    Attributes:
      step: `(tiers, lost slot [B K 1], rows that lose one, stores, token) -> tiers`, after the slot was removed from
        the first tier; the token was read last; None = it is forgotten.
      prompt: `(Evicted, kept slots before encoding, tiers, stores) -> (kept slots, tiers)` at prefill; None = they are
        dropped.
      init: `(L, B, K) -> state`, what the action remembers of each row, `RowState.action`; None = nothing.
      low: number format of a second tier, which takes what leaves the first; None = there is none.
    """

    step: Callable[[Tiers, Slots, Bool[Array, "B K"], Stores, Token], Tiers] | None = None
    prompt: Callable[[Evicted, Slots, Tiers, Stores], tuple[Slots, Tiers]] | None = None
    init: Callable[[tuple[int, int, int]], PyTree] | None = None
    low: KVStore | None = None


drop = EvictionAction()
"""What leaves is forgotten. Cost: nothing."""


@functools.cache
def demote(low: KVStore) -> EvictionAction:
    """A victim moves to a second tier in fewer bits; it is never lost and never returns.

    Source: MiKV (arXiv 2402.18096).
    Differs: nothing known.
    Cost: at prefill all tokens wait for their slots, in full; per step one slot is decoded, encoded and written.
    """
    if low.key.run > 1:
        raise InputError("tokens are demoted one by one: a store of runs, such as kivi, cannot take them")

    def prompt(found: Evicted, kept: Slots, tiers: Tiers, stores: Stores) -> tuple[Slots, Tiers]:
        high, tier = tiers
        gone = found.gone
        (k, v, at), count = tiers_.gather_masked(gone, found.k, found.v), jnp.sum(gone, axis=-1, dtype=jnp.int32)
        pos = jnp.take_along_axis(found.pos, at, axis=2)
        tier = tiers_.reserve(tier, count, gone.shape[-1])
        return kept, (high, tiers_.fill(tier, Slots(*low.encode(k, v, tier.balance), pos), count))

    def step(tiers: Tiers, lost: Slots, where: Bool[Array, "B K"], stores: Stores, token: Token) -> Tiers:
        high, tier = tiers
        both = stores[0].balanced and low.balanced  # by the same factors: keys stay multiplied
        source, target = ((), ()) if both else (high.balance, tier.balance)
        k, v = low.encode(*stores[0].decode(lost.k, lost.v, source), target)
        _, slot = tiers_.expired(tier, token.pos + 1, token.window)
        return high, tiers_.put(tier, slot[..., None], Slots(k, v, lost.pos), where[..., None])

    return EvictionAction(step, prompt, low=low)


@functools.cache
def merge(beta: float, weights: Literal["paper", "scatter_mean"]) -> EvictionAction:
    """A victim is merged into the kept token with the most similar key if it is similar enough, else dropped.

    With u the cosine of two cached keys and m the victim's largest, a victim merges if m reaches the row's threshold:
    the mean of m over the prompt's victims, then `beta m + (1 - beta) threshold` with every token. Keys and values of a
    target j and its victims i are averaged with the weights

        paper          e and exp(u_ij), normalised
        scatter_mean   1 and u_ij, divided by 1 + the number of victims: it shrinks what is merged

    Source: D2O (arXiv 2406.13035); `scatter_mean` as in the released code.
    Differs: one threshold per row and sequence (the released code has one per layer, which the next prompt inherits).
    Cost: at prefill evicted x kept cosines per row in blocks; per step a pass over the row's keys, one slot written.
    """
    if not 0 < beta < 1:
        raise InputError(f"beta={beta} is not between 0 and 1")
    if weights not in ("paper", "scatter_mean"):
        raise InputError(f"merge={weights!r} is not 'paper' or 'scatter_mean'")
    own, weigh = (jnp.e, jnp.exp) if weights == "paper" else (1.0, lambda u: u)

    def mean(kept: Array, added: Array, weight: Array, count: Array) -> Array:
        total = own + weight if weights == "paper" else own + count
        return ((own * kept.astype(jnp.float32) + added) / total[..., None]).astype(kept.dtype)

    def prompt(found: Evicted, kept: Slots, tiers: Tiers, stores: Stores) -> tuple[Slots, Tiers]:
        (tier,) = tiers
        gone, row = found.gone, _row(found.filled)
        similarity, target = _nearest(found.k, kept.k, jnp.arange(found.best.shape[-1]) < found.filled[..., None])
        threshold = jnp.mean(similarity, axis=-1, where=gone)  # nan where nothing is evicted
        merged = gone & (similarity >= threshold[..., None])
        weight = jnp.where(merged, weigh(similarity), 0.0)
        gather = lambda x: jnp.zeros((*kept.k.shape[:3], *x.shape[3:]), jnp.float32).at[(*row, target)].add(x)
        k, v = (gather(weight[..., None] * x.astype(jnp.float32)) for x in (found.k, found.v))
        weight, count = gather(weight), gather(merged.astype(jnp.float32))
        kept = kept._replace(k=mean(kept.k, k, weight, count), v=mean(kept.v, v, weight, count))
        return kept, (tier._replace(state=tier.state._replace(action=threshold)),)

    def step(tiers: Tiers, lost: Slots, where: Bool[Array, "B K"], stores: Stores, token: Token) -> Tiers:
        ((tier,), (store,)) = tiers, stores
        before, (lost_k, lost_v) = tier.state.action, store.decode(lost.k, lost.v, tier.balance)
        similarity, target = _nearest_slot(lost_k, tier, store)
        threshold = jnp.where(jnp.isnan(before), similarity[..., 0], beta * similarity[..., 0] + (1 - beta) * before)
        merged = where & (similarity[..., 0] >= threshold)
        weight, count = weigh(similarity), jnp.ones_like(similarity)
        into = tiers_.take(tier, target)
        kept = store.decode(into.k, into.v, tier.balance)
        k, v = (mean(x, weight[..., None] * y, weight, count) for x, y in zip(kept, (lost_k, lost_v), strict=True))
        k, v = store.encode(k, v, tier.balance)
        tier = tiers_.put(tier, target, into._replace(k=k, v=v), merged[..., None])
        return (tier._replace(state=tier.state._replace(action=jnp.where(where, threshold, before))),)

    return EvictionAction(step, prompt, lambda rows: jnp.full(rows, jnp.nan, jnp.float32))


def _nearest_slot(
    x: Float[Array, "B K one R"], tier: Tier, store: KVStore
) -> tuple[Float[Array, "B K one"], Int[Array, "B K one"]]:
    """The largest cosine with a cached key, and its slot; a block of pages at a time, since keys have to be decoded."""
    per_block = max(1, BLOCK // tier.page)
    size = per_block * tier.page

    def block(i: Array, best: tuple[Array, Array], keys: Callable[[Array], PyTree]) -> tuple[Array, Array]:
        filled = i * size + jnp.arange(size) < tier.length[..., None]
        cosine, at = _nearest(x, store.key.decode(keys(i), jnp.float32), filled)
        better = cosine > best[0]
        return jnp.where(better, cosine, best[0]), jnp.where(better, i * size + at, best[1])

    nothing = (jnp.full(x.shape[:3], -2.0), jnp.zeros(x.shape[:3], jnp.int32))
    blocks = (jnp.max(tier.length) + size - 1) // size
    search = lambda keys: jax.lax.fori_loop(0, blocks, functools.partial(block, keys=keys), nothing)
    return tiers_.reading_keys(tier, per_block, search)


def _row(rows: Array) -> tuple[Array, Array]:
    """Indices of the two axes of rows, to be followed by a third."""
    b, k = rows.shape
    return jnp.arange(b)[:, None, None], jnp.arange(k)[None, :, None]


def _nearest(
    x: Float[Array, "B K T R"], kept: Float[Array, "B K n R"], allowed: Bool[Array, "B K n"]
) -> tuple[Float[Array, "B K T"], Int[Array, "B K T"]]:
    """The largest cosine with a kept vector, and which one that is."""
    unit = lambda y: y / jnp.maximum(jnp.linalg.norm(y, axis=-1, keepdims=True), 1e-12)
    x, kept = unit(x.astype(jnp.float32)), unit(kept.astype(jnp.float32))

    def block(part: Float[Array, "B K t R"]) -> tuple[Array, Array]:
        cosine = jnp.where(allowed[:, :, None], jnp.einsum("bktr,bknr->bktn", part, kept), -2.0)
        return cosine.max(axis=-1), cosine.argmax(axis=-1)

    tokens = x.shape[2]
    parts = -(-tokens // BLOCK)
    if parts == 1:
        return block(x)
    padded = jnp.pad(x, ((0, 0), (0, 0), (0, parts * BLOCK - tokens), (0, 0)))
    blocks = jnp.moveaxis(padded.reshape(*x.shape[:2], parts, BLOCK, x.shape[-1]), 2, 0)
    joined = (jnp.moveaxis(y, 0, 2).reshape(*x.shape[:2], -1)[..., :tokens] for y in jax.lax.map(block, blocks))
    return tuple(joined)  # pyright: ignore[reportReturnType]: two
