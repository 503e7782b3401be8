"""Fates: what becomes of the tokens that must leave."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kvjax.cache import tier as tiers_
from kvjax.cache.store import Store
from kvjax.cache.tier import Slots, Tier
from kvjax.errors import InputError
from kvjax.spec import PyTree

BLOCK = 512  # evicted tokens that are compared with the kept ones at once


class Losers(NamedTuple):
    """The tokens of a prompt that are kept, and all the others."""

    k: Float[Array, "B K T R"]  # of all candidates
    v: Float[Array, "B K T R"]
    best: Int[Array, "B K n"]  # candidates in the order of their slots
    filled: Int[Array, "B K"]  # slots that are filled
    length: Int[Array, " B"]


class Fate(NamedTuple):
    """What happens to tokens that are not kept.

    Attributes:
      step: `((tier,), victim slot of each row, rows that lose one, store) -> (tier,)`; the caller reuses the slot.
      prompt: `(Losers, kept slots before encoding, calib) -> (kept slots, calib)` at prefill; None = they are dropped.
      init: `(L, B, K) -> calib`, what the fate remembers of each row.
    """

    step: Callable[[tuple[Tier, ...], Int[Array, "B K"], Bool[Array, "B K"], Store], tuple[Tier, ...]]
    prompt: Callable[[Losers, Slots, PyTree], tuple[Slots, PyTree]] | None = None
    init: Callable[[tuple[int, int, int]], PyTree] = lambda rows: ()


def _forget(
    tiers: tuple[Tier, ...], victim: Int[Array, "B K"], where: Bool[Array, "B K"], store: Store
) -> tuple[Tier, ...]:
    del victim, where, store
    return tiers


drop = Fate(_forget)
"""The victim is forgotten. Cost: nothing."""


def merge(beta: float, weights: Literal["paper", "scatter_mean"]) -> Fate:
    """A victim is merged into the kept token with the most similar key if it is similar enough, else dropped.

    With u the cosine of two cached keys and m the victim's largest, a victim merges if m reaches the row's threshold:
    the mean of m over the prompt's victims, then `beta m + (1 - beta) threshold` with every token. Keys and values of a
    target j and its victims i are averaged with the weights

        paper          e and exp(u_ij), normalised
        scatter_mean   1 and u_ij, divided by 1 + the number of victims: it shrinks what is merged

    Source: D2O (arXiv 2406.13035); `scatter_mean` as in the released code.
    Differs: one threshold per row and sequence (the released code has one per layer, which the next prompt inherits).
    Cost: at prefill evicted x kept products per row in blocks; per step a pass over the row's keys, one slot written.
    """
    if not 0 < beta < 1:
        raise InputError(f"beta={beta} is not between 0 and 1")
    own, weigh = (jnp.e, jnp.exp) if weights == "paper" else (1.0, lambda u: u)

    def mean(kept: Array, added: Array, weight: Array, count: Array) -> Array:
        total = own + weight if weights == "paper" else own + count
        return ((own * kept.astype(jnp.float32) + added) / total[..., None]).astype(kept.dtype)

    def prompt(found: Losers, kept: Slots, calib: PyTree) -> tuple[Slots, PyTree]:
        n, tokens = found.best.shape[-1], found.k.shape[2]
        slot, row = jnp.arange(n), _row(found.filled)
        filled = slot < found.filled[..., None]
        stays = jnp.zeros(found.k.shape[:3], bool).at[(*row, found.best)].set(filled)
        gone = ~stays & (jnp.arange(tokens) < found.length[:, None, None])
        similarity, target = _nearest(found.k, kept.k, filled)
        threshold = jnp.mean(similarity, axis=-1, where=gone)  # nan where nothing is evicted
        merged = gone & (similarity >= threshold[..., None])
        weight = jnp.where(merged, weigh(similarity), 0.0)
        gather = lambda x: jnp.zeros((*kept.k.shape[:3], *x.shape[3:]), jnp.float32).at[(*row, target)].add(x)
        k, v = (gather(weight[..., None] * x.astype(jnp.float32)) for x in (found.k, found.v))
        weight, count = gather(weight), gather(merged.astype(jnp.float32))
        kept = kept._replace(k=mean(kept.k, k, weight, count), v=mean(kept.v, v, weight, count))
        return kept, {"threshold": threshold}

    def step(
        tiers: tuple[Tier, ...], victim: Int[Array, "B K"], where: Bool[Array, "B K"], store: Store
    ) -> tuple[Tier, ...]:
        (tier,) = tiers
        one, before = tiers_.take(tier, victim[..., None]), tier.calib["threshold"]
        lost_k, lost_v = store.decode(one.k), store.decode(one.v)
        slot = jnp.arange(tier.capacity)
        others = (slot < tier.length[..., None]) & (slot != victim[..., None])
        similarity, target = _nearest(lost_k, store.decode(tiers_.keys(tier)), others)
        threshold = jnp.where(jnp.isnan(before), similarity[..., 0], beta * similarity[..., 0] + (1 - beta) * before)
        merged = where & (similarity[..., 0] >= threshold)
        weight, count = weigh(similarity), jnp.ones_like(similarity)
        into = tiers_.take(tier, target)
        k, v = (
            mean(store.decode(kept), weight[..., None] * lost.astype(jnp.float32), weight, count)
            for kept, lost in ((into.k, lost_k), (into.v, lost_v))
        )
        into = into._replace(k=store.encode(k, k.dtype), v=store.encode(v, v.dtype))
        tier = tiers_.put(tier, target, into, merged[..., None])
        return (tier._replace(calib={"threshold": jnp.where(where, threshold, before)}),)

    return Fate(step, prompt, lambda rows: {"threshold": jnp.full(rows, jnp.nan, jnp.float32)})


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
