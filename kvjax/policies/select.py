"""The policy of every method that selects tokens: keep those with the best scores."""

import functools
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float, Int

from kvjax.attention.dispatch import kernel_or_xla
from kvjax.attention.prompt_scores import channel_balance
from kvjax.cache import pages, sharding
from kvjax.cache import tier as tiers_
from kvjax.cache.layout import Layers, Tiers
from kvjax.cache.store import KVStore
from kvjax.cache.tier import Slots, Tier
from kvjax.errors import InputError
from kvjax.parallel import collectives, mesh
from kvjax.parallel.collectives import HEADS
from kvjax.policies.base import CachePolicy, Found, append_room
from kvjax.policies.budgets.budget import Budget
from kvjax.policies.eviction import Fate, Losers, drop
from kvjax.policies.rolling import rolling
from kvjax.policies.score import Score
from kvjax.spec import Lengths, ModelSpec, Prompt, Token, readable
from pallas_kernels.implementation import Implementation
from pallas_kernels.topk_retain import Kept, topk_retain

DENSE = KVStore()


class Candidates(NamedTuple):
    """Prompt tokens of a layer of which some will be kept."""

    k: Float[Array, "B K n R"]
    v: Float[Array, "B K n W"]
    pos: Int[Array, "B K n"]  # -1 = none
    stat: Float[Array, "B K n"]
    length: Int[Array, "B K"]  # tokens of each prompt
    seen: Int[Array, "B K"]  # of them, those that the next one can read: budgets are for these

    @property
    def count(self) -> Int[Array, "B K"]:
        """How many there are."""
        return jnp.sum(self.pos >= 0, axis=-1, dtype=jnp.int32)


def retain(
    score: Score,
    budget: Budget,
    *,
    store: KVStore = DENSE,
    evict: Literal["never", "before", "after"],
    fate: Fate = drop,
    by_place: bool = False,
) -> CachePolicy:
    """Keep the tokens with the best scores.

    Args:
      score: which tokens matter.
      budget: how many slots a row may keep.
      store: number format of what is kept.
      evict: during decoding, evict the worst token of a full row `before` the new one is inserted, `after` attention
        has seen the new one, or `never` (generated tokens are appended).
      fate: what happens to tokens that are not kept.
      by_place: a sliding window counts places in the row, not positions: no token leaves it.

    With a budget that has `room`, tokens are evicted while decoding too: `evict="never"` then means `after`. Where the
    budget grows with the sequence, so do the rows.

    With a budget that is allocated after several layers, a layer's best candidates wait: as many as a row may ever be
    given, all of them where the fate needs what is not kept.

    Cost: at prefill one top-k over T scores per row; per step 8 bytes per slot when a statistic is kept.
    """
    if store.key.run > 1:
        raise InputError("kivi quantises keys that follow each other: it needs a method that keeps all tokens (full)")
    if fate.prompt is not None and budget.every is not None:
        raise InputError("merging and demoting need one decision after the last layer: give the budget every=0")
    if evict == "before" and fate.step is not None:
        raise InputError("a token that leaves before attention is forgotten: merge or demote after it")
    if fate.prompt is not None and score.prompt is None:
        raise InputError("a score that selects nothing leaves nothing to merge or demote")
    if fate.prompt is not None and fate.low is None and store.balanced:
        raise InputError("keys are merged as they are: the store must not be balanced")
    stores = (store,) if fate.low is None else (store, fate.low)
    if budget.room is not None and evict == "never":
        evict = "after"
    if evict == "after" and score.observe is None:
        raise InputError("this score does not learn from attention: it cannot evict while decoding")
    beyond, spare = budget.room or jnp.zeros_like, int(evict == "after")
    keeps_all = score.prompt is None
    apart = lambda: budget.by_head and collectives.count(HEADS) > 1  # heads that compete have pools of their own

    def room(slots: ArrayLike, length: ArrayLike, new: int, full: ArrayLike) -> np.ndarray:
        """Slots that rows may fill: with generated tokens, or with the one that is seen before another is evicted."""
        append, replace = np.minimum(slots, length) + new, np.minimum(np.add(slots, spare), np.add(length, new))
        return np.where(np.logical_or(full, evict == "never"), append, replace)

    def init(spec: ModelSpec, layers: Layers, lengths: Lengths, dtype: DTypeLike) -> Tiers:
        window, heads, prompt = layers.window, spec.num_rows, np.asarray(lengths.prompt)
        within = lambda slots: slots if window is None else np.asarray(np.minimum(slots, window))
        some, which = np.unique(prompt, return_inverse=True)  # no new programs for every batch size
        seen, padded = readable(some, window), readable(lengths.padded, window)
        every_head = heads * collectives.count(HEADS)
        with collectives.on_the_host():  # so that `eval_shape` can plan a cache without allocating it
            for length in seen.tolist():
                budget.check(layers.peers, length)
            extra = np.asarray(beyond(seen))[which]
            given = np.stack([np.asarray(budget.slots(i, layers.peers, seen))[which] for i in layers.places])  # L B
            grown = 0 if budget.grow is None else np.asarray(budget.grow(readable(some + lengths.new, window)))[which]
            most = None if budget.most is None else np.asarray(budget.most(layers.peers, every_head, padded))
        full = np.isin(layers.places, budget.full(layers.peers))[:, None]
        rows = within(room(np.maximum(given + extra, grown), readable(prompt, window), lengths.new, full))
        page = pages.page_size(pages.ladder(int(rows.max()), *budget.ladder), lengths.platform)
        # Only the width of the tables depends on the longest row: no new shape for every prompt length.
        longest = rows if most is None else within(room(most + extra.max(), padded, lengths.new, full.any()))
        row = int(within(pages.ladder(int(longest.max()), *budget.ladder)))

        def pool(rows: np.ndarray, page: int, longest: np.ndarray | int) -> int:
            """Slots for all rows; rows that share theirs may each have a page that holds one slot only."""
            needed = -(-rows // page) * page if most is None else rows + page - 1
            if apart():  # until `fit`, for whichever heads are given most
                needed = np.minimum(rows * (every_head // heads), longest) + page - 1
            return pages.ladder(heads * lengths.most(needed) // page * page, *budget.ladder)

        shape = (len(layers.index), len(prompt), heads)
        later = {"new": jnp.full(shape, lengths.new, jnp.int32)} if apart() else {}
        balance = lambda store: {"balance": jnp.ones((*shape, layers.widths[0]))} if store.balanced else {}
        sized = functools.partial(
            tiers_.init, layers=shape[0], batch=shape[1], heads=heads, widths=layers.widths, dtype=dtype
        )
        tier = sized(
            row=row,
            page=page,
            slots=pool(rows, page, longest),
            store=store,
            positions=not keeps_all,
            scores=score.observe is not None,
            calib=fate.init(shape) | balance(store) | later,
        )
        if fate.low is None:
            return (tier,)
        # Of a row, as a mean over layers and heads; where rows share, one may be given nothing that others want.
        total = within(prompt + lengths.new)
        spare_low = int(window is not None)  # for the victim that takes the place of one that leaves
        left = np.maximum(total - np.maximum(given, grown), 1) + spare_low
        page = pages.page_size(pages.ladder(int(left.max()), *budget.ladder), lengths.platform)
        row = pages.ladder(int((left if most is None else total).max()), *budget.ladder)
        return tier, sized(row=row, page=page, slots=pool(left, page, row), store=fate.low, calib=balance(fate.low))

    def prefill(tiers: Tiers, prompt: Prompt) -> tuple[Tiers, Found]:
        if any(store.balanced for store in stores):
            balance = channel_balance(prompt)
            tiers = tuple(
                tier._replace(calib=tier.calib | {"balance": balance}) if store.balanced else tier
                for tier, store in zip(tiers, stores, strict=True)
            )
        length = readable(prompt.length, prompt.window)
        slots = budget.slots(prompt.layer, prompt.num_layers, length)
        slots = slots if prompt.window is None else jnp.minimum(slots, prompt.window)
        if score.prompt is None:
            return (_fill_in_order(tiers[0], prompt, slots, store),), Found()
        found = _candidates(prompt, score.prompt(prompt))
        if prompt.window is not None:
            found = (
                found._replace(seen=readable(found.length, prompt.window))
                if by_place
                else _newest(found, prompt.window)
            )
        stat = found.stat
        open_ = _open(score, found, slots)
        if budget.allocate is None:
            rows = jnp.broadcast_to(slots[:, None], stat.shape[:2])
            if budget.split is not None:
                rows = budget.split(open_, slots, length)
            return settle(tiers, found, rows, prompt.kernels), Found()
        info = open_ if budget.measure is None else budget.measure(prompt, open_)
        if fate.prompt is None and budget.most is not None:
            every_head = stat.shape[1] * collectives.count(HEADS)
            with collectives.on_the_host():
                width = int(budget.most(prompt.num_layers, every_head, np.asarray(stat.shape[-1])))
            most = budget.most(prompt.num_layers, every_head, length)
            found = _shortlist(score, found, most, width, prompt.kernels)
        return tiers, Found(info, found)

    def settle(tiers: Tiers, found: Candidates, rows: Int[Array, "B K"], kernels: Implementation | None) -> Tiers:
        (tier, *_) = tiers
        n = min(found.pos.shape[-1], tier.capacity)
        filled = jnp.minimum(rows, found.count)
        best = _best(score, found, rows, filled, n, kernels)
        kept = Slots(best.k, best.v, best.pos, best.stat)
        if fate.prompt is not None:
            losers = Losers(found.k, found.v, found.pos, best.index, filled, found.count)
            kept, tiers = fate.prompt(losers, kept, tiers, stores)
        (tier, *rest) = tiers
        k, v = store.encode(kept.k, kept.v, tier.calib)
        kept = kept._replace(k=k, v=v)
        tier = tiers_.reserve(tier._replace(budget=rows + beyond(found.seen)), filled, n)
        return (tiers_.fill(tier, kept, filled), *rest)

    def reserve(tiers: Tiers, active: Bool[Array, " B"]) -> Tiers:
        (tier, *rest) = tiers
        room = tier.length + 1 if evict != "before" else jnp.minimum(tier.length + 1, tier.budget)
        return (tiers_.reserve(tier, jnp.where(active[:, None], room, 0), 1), *append_room(tuple(rest), active))

    def fit(tiers: Tiers, length: Int[Array, " B"]) -> tuple[Tiers, tuple[int, ...]]:
        """Pools for the device whose heads were given most."""
        if "new" not in tiers[0].calib:  # one device has the heads, and their slots add up
            return tiers, tuple(tier.free.shape[0] for tier in tiers)
        new, sizes = mesh.read(tiers[0].calib["new"]), []
        for i, tier in enumerate(tiers):
            longest = np.minimum(mesh.read(tier.length) + new, tier.capacity)
            if i == 0 and evict != "never" and budget.grow is None:
                longest = np.minimum(longest, mesh.read(tier.budget) + spare)
            slots = sharding.fullest(tier, -(-longest // tier.page)) * tier.page
            sizes.append(pages.ladder(slots, *budget.ladder) // tier.page)
        return tiers, tuple(sizes)

    def insert(tiers: Tiers, token: Token) -> Tiers:
        (tier, *rest) = tiers
        active = jnp.broadcast_to(token.active[:, None], tier.length.shape)
        slot = tier.length
        if evict == "before":
            most = tier.budget if token.window is None else jnp.minimum(tier.budget, token.window)
            full = active & (tier.length >= most)
            victim = _worst(score, tier, token.pos)
            slot = jnp.where(full, victim, slot)
        if token.window is not None and evict != "after" and not by_place:
            gone, place = tiers_.expired(tier, token.pos, token.window)
            slot = jnp.where(gone, place, slot)
        k, v = store.encode(token.key[:, :, None], token.value[:, :, None], tier.calib)
        pos = jnp.broadcast_to(token.pos[:, None, None], (*slot.shape, 1))
        slots = Slots(k, v, pos, jnp.zeros(pos.shape, jnp.float32))
        return (tiers_.put(tier, slot[..., None], slots, active[..., None]), *rest)

    def observe(tiers: Tiers, token: Token, probs: tuple[Array, ...]) -> Tiers:
        assert score.observe is not None
        (tier, *rest) = tiers
        active, stat = token.active[:, None], tiers_.scores(tier)
        tier = tiers_.with_scores(tier, jnp.where(active[..., None], score.observe(stat, probs[0]), stat))
        if budget.grow is not None:
            grown = jnp.maximum(tier.budget, budget.grow(readable(token.pos + 1, token.window))[:, None])
            tier = tier._replace(budget=jnp.where(active, grown, tier.budget))
        over = active & (tier.length > tier.budget)
        victim = _worst(score, tier, token.pos + 1)
        removed = over
        if token.window is not None and not by_place:  # one that nobody can read again leaves first, and is forgotten
            gone, slot = tiers_.expired(tier, token.pos + 1, token.window)
            victim, removed, over = jnp.where(gone, slot, victim), over | (active & gone), over & ~gone
        tier, lost = tiers_.remove(tier, victim, removed)
        return (tier, *rest) if fate.step is None else fate.step((tier, *rest), lost, over, stores, token)

    return CachePolicy(
        stores,
        init,
        prefill,
        insert,
        observe if score.observe is not None else None,
        reserve,
        settle if budget.allocate is not None else None,
        fit if budget.by_head else None,
        budget=budget,
        windowed=functools.partial(rolling, store) if keeps_all else None,
    )


def _fill_in_order(tier: Tier, prompt: Prompt, slots: Int[Array, " B"], store: KVStore) -> Tier:
    """The first tokens of the prompt, in order."""
    rows = tier.length.shape
    n = min(prompt.key.shape[1], tier.capacity)
    k, v = (jnp.moveaxis(x[:, :n], 2, 1) for x in (prompt.key, prompt.value))
    k, v = store.encode(k, v, tier.calib)
    filled = jnp.broadcast_to(jnp.minimum(slots, prompt.length)[:, None], rows)
    tier = tier._replace(budget=jnp.broadcast_to(slots[:, None], rows))
    return tiers_.fill(tiers_.reserve(tier, filled, n), Slots(k, v), filled)


def _open(score: Score, found: Candidates, slots: Int[Array, " B"]) -> Float[Array, "B K n"]:
    """The statistic of tokens that may be chosen or not; -1 for protected ones and places without one."""
    protected = score.protect(found.pos, found.length[..., None], slots[:, None, None])
    return jnp.where((found.pos >= 0) & ~protected, found.stat, -1.0)


def _candidates(prompt: Prompt, stat: Float[Array, "B K T"]) -> Candidates:
    """All tokens of a prompt."""
    k, v = (jnp.moveaxis(x, 2, 1) for x in (prompt.key, prompt.value))
    length, pos = jnp.broadcast_to(prompt.length[:, None], stat.shape[:2]), jnp.arange(stat.shape[-1])
    pos = jnp.where(pos < length[..., None], pos, -1)
    return Candidates(k, v, pos, stat, length, length)


def _newest(found: Candidates, window: int) -> Candidates:
    """The candidates that the next token can read through a sliding window, in order."""
    count = readable(found.length, window)
    at = (found.length - count)[..., None] + jnp.arange(min(max(window - 1, 1), found.stat.shape[-1]))
    take = lambda x: jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 3)), axis=2, mode="clip")
    pos = jnp.where(at < found.length[..., None], at, -1)
    return found._replace(k=take(found.k), v=take(found.v), pos=pos, stat=take(found.stat), seen=count)


def _shortlist(
    score: Score, found: Candidates, most: Int[Array, " B"], width: int, kernels: Implementation | None
) -> Candidates:
    """The candidates that rows of up to `most` slots can keep, at most `width` of them."""
    most = jnp.broadcast_to(most[:, None], found.length.shape)
    best = _best(score, found, most, found.count, min(width, found.stat.shape[2]), kernels)
    return found._replace(k=best.k, v=best.v, pos=best.pos, stat=best.stat)


def _best(
    score: Score,
    found: Candidates,
    rows: Int[Array, "B K"],
    count: Int[Array, "B K"],
    n: int,
    kernels: Implementation | None,
) -> Kept:
    """The `count` best candidates of rows with so many slots, at most n, best first; ties go to the first candidate."""
    protected = score.protect(found.pos, found.length[..., None], rows[..., None])
    priority = jnp.where(found.pos >= 0, jnp.where(protected, jnp.inf, found.stat), -jnp.inf)
    vectors = found.k, found.v, found.pos, found.stat
    return kernel_or_xla("selection", topk_retain, kernels, priority, count, *vectors, n=n)


def _worst(score: Score, tier: Tier, now: Int[Array, " B"]) -> Int[Array, "B K"]:
    """The slot with the lowest score that is not protected; ties go to the lowest slot."""
    pos = tiers_.positions(tier)
    stat = pos.astype(jnp.float32) if score.observe is None else tiers_.scores(tier)
    protected = score.protect(pos, now[:, None, None], tier.budget[..., None])
    return jnp.argmin(jnp.where(protected | (pos < 0), jnp.inf, stat), axis=-1)
