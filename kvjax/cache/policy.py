"""The theory: what a cache policy is, what a recipe is, and the policy that most methods are.

    init     allocate tiers for a batch                         once, on the host
    prefill  keep the best of a prompt, one layer at a time
    insert   give one new token a slot; runs before attention
    observe  learn from attention, evict; runs after attention  (None: kernels need not return probabilities)

All but `init` are pure functions of one layer's view of the tiers. They run inside `jit`; nothing that depends on a
prompt becomes a shape. Before the layers of a step, `reserve` takes pages for all of them at once. A method is a
factory that returns a `Recipe`.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from kvjax.cache import pages
from kvjax.cache import tier as tiers_
from kvjax.cache.budget import Budget, parse_keep
from kvjax.cache.fate import Fate, drop
from kvjax.cache.fold import Fold, identity
from kvjax.cache.score import Score
from kvjax.cache.store import Store, dense
from kvjax.cache.tier import Slots, Tier
from kvjax.spec import Lengths, ModelSpec, Prompt, PyTree, Token

Tiers = tuple[Tier, ...]  # one per number format
Positions = Callable[[Int[Array, "B K S"], Int[Array, " B"], Int[Array, "B K"]], Int[Array, "B K S"]]


class Layers(NamedTuple):
    """Layers that share their tiers because their cached vectors have equal widths; hashable."""

    index: tuple[int, ...]
    widths: tuple[int, int]  # of cached keys and values


def append_room(tiers: Tiers, active: Bool[Array, " B"]) -> Tiers:
    """Room for one more slot in every row of every active sequence."""
    return tuple(tiers_.reserve(t, jnp.where(active[:, None], t.length + 1, 0), 1) for t in tiers)


class CachePolicy(NamedTuple):
    """Four pure functions over a layer's tiers, and one over all layers.

    Attributes:
      init: `(spec, layers, lengths, dtype) -> tiers` with the `L` axis; on the host.
      prefill: `(tiers, prompt) -> (tiers, info)`; `info` is handed to `Budget.allocate`.
      insert: `(tiers, token) -> tiers`.
      observe: `(tiers, token, probabilities) -> tiers`, one `[B K G S]` per tier, 0 where empty; or None.
      reserve: `(tiers with the L axis, active [B]) -> tiers`, takes pages for what the step may append to each row.
    """

    init: Callable[[ModelSpec, Layers, Lengths, DTypeLike], Tiers]
    prefill: Callable[[Tiers, Prompt], tuple[Tiers, PyTree]]
    insert: Callable[[Tiers, Token], Tiers]
    observe: Callable[[Tiers, Token, tuple[Float[Array, "B K G S"], ...]], Tiers] | None = None
    reserve: Callable[[Tiers, Bool[Array, " B"]], Tiers] = append_room


class Recipe(NamedTuple):
    """A method: what generation needs to know about a cache. Made by the factories in `kvjax.methods`.

    Attributes:
      name: the method's name.
      policy: its four functions.
      stores: number format of each tier.
      budget: slots per row; its `allocate` redistributes them after the prompt.
      fold: which vector is cached per token.
      rotate: cached keys are rotated when written, or when read.
      positions: with `rotate="read"`: `(pos, now, length) -> pos`, where a slot stands; None = at its own position.
    """

    name: str
    policy: CachePolicy
    stores: tuple[Store, ...]
    budget: Budget | None = None
    fold: Fold = identity()
    rotate: Literal["write", "read"] = "write"
    positions: Positions | None = None


def cached(factory: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """A factory whose equal arguments give the same recipe, hence the same compiled programs."""
    remembered, signature = functools.cache(factory), inspect.signature(factory)

    @functools.wraps(factory)
    def make(*args: object, **kwargs: object) -> Recipe:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        if "budget" in given.arguments:
            given.arguments["budget"] = parse_keep(given.arguments["budget"])
        return remembered(**given.arguments)

    return make


def retain(
    score: Score,
    budget: Budget,
    *,
    store: Store | None = None,
    evict: Literal["never", "before", "after"],
    fate: Fate = drop,
) -> CachePolicy:
    """Keep the tokens with the best scores: the policy of every method that selects tokens.

    Args:
      score: which tokens matter.
      budget: how many slots a row may keep.
      store: number format.
      evict: during decoding, evict the worst token of a full row `before` the new one is inserted, `after` attention
        has seen the new one, or `never` (generated tokens are appended).
      fate: what happens to the victim before its slot is reused.

    Cost: at prefill one top-k over T scores per row; per step 8 bytes per slot when a statistic is kept.
    """
    store = store or dense()

    def init(spec: ModelSpec, layers: Layers, lengths: Lengths, dtype: DTypeLike) -> Tiers:
        prompt = np.asarray(lengths.prompt)
        with jax.ensure_compile_time_eval():  # so that `eval_shape` can plan a cache without allocating it
            most = np.stack([np.asarray(budget.slots(i, spec.num_layers, prompt)) for i in layers.index])  # L B
        if evict == "never":
            rows = np.minimum(most, prompt) + lengths.new
        else:
            rows = np.minimum(most + (evict == "after"), prompt + lengths.new)
        row = pages.ladder(int(rows.max()), *budget.ladder)
        slots = spec.num_kv_heads * int(np.sum(-(-rows // pages.page_size(row)))) * pages.page_size(row)
        tier = tiers_.init(
            layers=len(layers.index),
            batch=len(prompt),
            heads=spec.num_kv_heads,
            row=row,
            slots=pages.ladder(slots, *budget.ladder),
            widths=layers.widths,
            store=store,
            dtype=dtype,
            positions=score.prompt is not None,
            scores=score.observe is not None,
        )
        return (tier,)

    def prefill(tiers: Tiers, prompt: Prompt) -> tuple[Tiers, PyTree]:
        (tier,) = tiers
        rows = tier.length.shape
        kept = budget.slots(prompt.layer, prompt.num_layers, prompt.length)[:, None]  # B 1
        tier = tier._replace(budget=jnp.broadcast_to(kept, rows))
        n = min(prompt.key.shape[1], tier.capacity)
        slot = jnp.broadcast_to(jnp.arange(n), (*rows, n))
        pos, stat = (slot, ()) if score.prompt is None else _best(score, score.prompt(prompt), prompt, kept, n)
        pick = lambda x: jnp.take_along_axis(jnp.moveaxis(x, 2, 1), pos[..., None], axis=2)
        k, v = (store.encode(pick(x), x.dtype) for x in (prompt.key, prompt.value))
        filled = jnp.broadcast_to(jnp.minimum(kept, prompt.length[:, None]), rows)
        tier = tiers_.reserve(tier, filled, n)
        return (tiers_.put(tier, slot, Slots(k, v, pos, stat), slot < filled[..., None]),), ()

    def reserve(tiers: Tiers, active: Bool[Array, " B"]) -> Tiers:
        (tier,) = tiers
        room = tier.length + 1 if evict != "before" else jnp.minimum(tier.length + 1, tier.budget)
        return (tiers_.reserve(tier, jnp.where(active[:, None], room, 0), 1),)

    def insert(tiers: Tiers, token: Token) -> Tiers:
        (tier,) = tiers
        active = jnp.broadcast_to(token.active[:, None], tier.length.shape)
        slot = tier.length
        if evict == "before":
            full = active & (tier.length >= tier.budget)
            victim = _worst(score, tier, token.pos)
            (tier,) = fate((tier,), victim, full)
            slot = jnp.where(full, victim, slot)
        k, v = (store.encode(x[:, :, None], x.dtype) for x in (token.key, token.value))
        pos = jnp.broadcast_to(token.pos[:, None, None], (*slot.shape, 1))
        slots = Slots(k, v, pos, jnp.zeros(pos.shape, jnp.float32))
        return (tiers_.put(tier, slot[..., None], slots, active[..., None]),)

    def observe(tiers: Tiers, token: Token, probs: tuple[Array, ...]) -> Tiers:
        assert score.observe is not None
        (tier,) = tiers
        active, stat = token.active[:, None], tiers_.scores(tier)
        tier = tiers_.with_scores(tier, jnp.where(active[..., None], score.observe(stat, probs[0]), stat))
        over = active & (tier.length > tier.budget)
        victim = _worst(score, tier, token.pos + 1)
        (tier,) = fate((tier,), victim, over)
        return (tiers_.remove(tier, victim, over),)

    return CachePolicy(init, prefill, insert, observe if score.observe is not None else None, reserve)


def _best(
    score: Score, stat: Float[Array, "B K T"], prompt: Prompt, kept: Int[Array, "B 1"], n: int
) -> tuple[Int[Array, "B K n"], Float[Array, "B K n"]]:
    """Position and statistic of the n best prompt tokens, best first; ties go to the earlier position."""
    pos = jnp.arange(stat.shape[-1])
    length = prompt.length[:, None, None]
    protected = score.protect(pos, length, kept[..., None])
    priority = jnp.where(protected, jnp.inf, stat)
    _, chosen = jax.lax.top_k(jnp.where(pos < length, priority, -jnp.inf), n)
    return chosen, jnp.take_along_axis(stat, chosen, axis=-1)


def _worst(score: Score, tier: Tier, now: Int[Array, " B"]) -> Int[Array, "B K"]:
    """The slot with the lowest score that is not protected; ties go to the lowest slot."""
    pos = tiers_.positions(tier)
    stat = pos.astype(jnp.float32) if score.observe is None else tiers_.scores(tier)
    protected = score.protect(pos, now[:, None, None], tier.budget[..., None])
    return jnp.argmin(jnp.where(protected | (pos < 0), jnp.inf, stat), axis=-1)
