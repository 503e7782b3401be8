"""The policy of every method that selects tokens: keep those with the best scores."""

import functools
from fractions import Fraction
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
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
from kvjax.policies.base import CachePolicy, PoolHooks, PrefillOutput, PromptHooks, reserve_slot, write_token
from kvjax.policies.budgets.budget import Amounts, Budget, check, decode_slots, times, tokens_of
from kvjax.policies.eviction import Evicted, EvictionAction, RowState, drop
from kvjax.policies.rolling import rolling
from kvjax.policies.score import Score
from kvjax.spec import Lengths, ModelSpec, Prompt, Token, readable
from pallas_kernels.implementation import Implementation
from pallas_kernels.topk_retain import Kept, topk_retain

DENSE = KVStore()
NEAR = (4, 16)  # rungs of amounts that share their shapes, where these are made for a total length


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


class Selection(NamedTuple):
    """What `retain` was given: which tokens are kept, how many, in which format, and what becomes of the others."""

    score: Score
    budget: Budget
    store: KVStore
    evict: Literal["never", "before", "after"]
    action: EvictionAction
    by_place: bool
    bounded: bool

    @property
    def stores(self) -> tuple[KVStore, ...]:
        """Number format of each tier."""
        return (self.store,) if self.action.low is None else (self.store, self.action.low)

    @property
    def spare(self) -> int:
        """Slots of a row beside its budget: for the token that is seen before another is evicted."""
        return int(self.evict == "after")

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is selected: slots follow the order of arrival."""
        return self.score.prompt is None

    @property
    def apart(self) -> bool:
        """Whether heads that compete for slots have pools of their own, on devices of their own."""
        return self.budget.by_head and collectives.count(HEADS) > 1


@functools.cache
def retain(
    score: Score,
    budget: Budget,
    *,
    store: KVStore = DENSE,
    evict: Literal["never", "before", "after"],
    action: EvictionAction = drop,
    by_place: bool = False,
    bounded: bool = False,
) -> CachePolicy:
    """Keep the tokens with the best scores.

    Args:
      score: which tokens matter.
      budget: how many slots a row may keep.
      store: number format of what is kept.
      evict: during decoding, evict the worst token of a full row `before` the new one is inserted, `after` attention
        has seen the new one, or `never` (generated tokens are appended).
      action: what happens to tokens that are not kept.
      by_place: a sliding window counts places in the row, not positions: no token leaves it.
      bounded: `Amounts.decoding` is given: tokens are evicted while decoding too, and `evict="never"` means `after`, or
        `before` for a score that learns nothing from attention.

    Where the budget grows with the sequence, so do the rows. With a budget that is allocated after several layers, a
    layer's best candidates wait: as many as a row may ever be given, all where the action needs what is not kept.

    Cost: at prefill one top-k over T scores per row; per step 8 bytes per slot when a statistic is kept.
    """
    if bounded and evict == "never":
        evict = "before" if score.observe is None else "after"
    selection = Selection(score, budget, store, evict, action, by_place, bounded)
    _check(selection)
    part = lambda function: functools.partial(function, selection)
    by_row = not selection.keeps_all and budget.split is None and budget.allocate is None  # whatever others have
    return CachePolicy(
        selection.stores,
        part(_init),
        part(_prefill),
        part(_insert),
        None if score.observe is None else part(_observe),
        PromptHooks(write_selected=None if budget.allocate is None else part(_write_selected)),
        PoolHooks(
            part(_reserve),
            part(_shrink_pool) if budget.by_head else None,
            prune=part(_prune) if by_row and action.prompt is None else None,
        ),
        budget=budget,
        windowed=functools.partial(rolling, store) if selection.keeps_all or not score.windows else None,
    )


def _check(selection: Selection) -> None:
    """Raise `InputError` for choices that contradict each other."""
    budget, store, action = selection.budget, selection.store, selection.action
    if store.key.run > 1:
        raise InputError("kivi quantises keys that follow each other: it needs a method that keeps all tokens (full)")
    if action.prompt is not None and budget.update_interval is not None:
        raise InputError(
            "merging and demoting need one decision after the last layer: give the budget update_interval=0"
        )
    if selection.evict == "before" and action.step is not None:
        raise InputError("a token that leaves before attention is forgotten: merge or demote after it")
    if action.prompt is not None and selection.keeps_all:
        raise InputError("a score that selects nothing leaves nothing to merge or demote")
    if action.prompt is not None and action.low is None and store.balanced:
        raise InputError("keys are merged unscaled: the store must not be balanced")
    if selection.evict == "after" and selection.score.observe is None:
        raise InputError("this score does not learn from attention: it cannot evict while decoding")


class Sizes(NamedTuple):
    """Slots of a batch's rows in a group of layers `[l B]`; numpy, on the host."""

    given: Int[np.ndarray, "l B"]  # to the prompts
    max_slots: Int[np.ndarray, "l B"]  # that rows may fill, with new tokens
    left: Int[np.ndarray, "l B"]  # tokens beside those that were given slots, as a mean over rows


def sizes(selection: Selection, layers: Layers, amounts: Amounts, prompt: Int[np.ndarray, " B"], new: int) -> Sizes:
    """Slots for prompts of these lengths and `new` tokens after each."""
    seen, after = readable(prompt, layers.window), readable(prompt + new, layers.window)
    keep = amounts.keep or 0
    given = np.stack([selection.budget.slots(keep, i, layers.peers, seen) for i in layers.places])
    slots = np.maximum(given, tokens_of(keep, after)) if selection.budget.grows else given
    max_slots = _filled(selection, layers, slots + decode_slots(amounts, seen), seen, new)
    total = within(layers, prompt + new)
    # One more for the victim that takes the place of a token that leaves a window.
    return Sizes(given, max_slots, np.maximum(total - slots, 1) + (layers.window is not None))


def within(layers: Layers, slots: Int[np.ndarray, "*b"]) -> Int[np.ndarray, "*b"]:
    """Slots, no more than a sliding window reads."""
    return slots if layers.window is None else np.asarray(np.minimum(slots, layers.window))


def _filled(
    selection: Selection, layers: Layers, slots: np.ndarray, length: np.ndarray | int, new: int
) -> Int[np.ndarray, "l b"]:
    """Slots that rows may fill: with generated tokens, or with the one that is seen before another is evicted."""
    full = np.isin(layers.places, selection.budget.full(layers.peers))[:, None]  # layers that keep every token
    append, replace = np.minimum(slots, length) + new, np.minimum(slots + selection.spare, np.add(length, new))
    return within(layers, np.where(full | (selection.evict == "never"), append, replace))


def near(amounts: Amounts, total: int | None) -> tuple[Amounts, Amounts]:
    """The least and the largest of the amounts that have the same shapes as these, for sequences of a total length."""
    if total is None or amounts.keep is None:
        return amounts, amounts
    rung = lambda keep: min(pages.ladder(int(tokens_of(keep, total)), *NEAR), total)
    (steps, smallest), largest = NEAR, rung(amounts.keep if amounts.most is None else amounts.most)
    more = Amounts(largest, None if amounts.decoding is None else rung(amounts.decoding))
    return Amounts(max(largest - max(largest // steps, smallest), 1)), more


class PoolShape(NamedTuple):
    """What lengths and amounts decide of a tier: arguments of `tier.init`."""

    row: int
    page: int
    slots: int


def pool_shapes(
    selection: Selection, layers: Layers, lengths: Lengths, amounts: Amounts, heads: int
) -> tuple[PoolShape, ...]:
    """The pool of each tier for `heads` rows of each sequence; numpy, on the host."""
    budget, every_head = selection.budget, heads * collectives.count(HEADS)
    less, more = near(amounts, lengths.total)
    found = [sizes(selection, layers, more, *each) for each in lengths.extremes()]
    rows = np.max([each.max_slots for each in found], axis=0)
    page = pages.page_size(pages.ladder(int(rows.max()), *budget.ladder), lengths.platform)
    longest = rows  # only the width of the tables depends on it: no new shape for every prompt length
    if budget.max_slots is not None:
        padded, new = readable(lengths.padded, layers.window), max(new for _, new in lengths.extremes())
        max_slots = budget.max_slots(more.keep, layers.peers, every_head, padded)
        longest = _filled(selection, layers, np.asarray(max_slots + decode_slots(more, padded)), padded, new)
    row = int(within(layers, np.asarray(pages.ladder(int(longest.max()), *budget.ladder))))

    def pool(rows: np.ndarray, page: int, longest: np.ndarray | int) -> int:
        """Slots for all rows; rows that share theirs may each have a page that holds one slot only."""
        needed = -(-rows // page) * page if budget.max_slots is None else rows + page - 1
        if selection.apart:  # until `_shrink_pool`, for whichever heads are given most
            needed = np.minimum(rows * (every_head // heads), longest) + page - 1
        return pages.ladder(heads * lengths.fullest_part(needed) // page * page, *budget.ladder)

    kept = PoolShape(row, page, pool(rows, page, longest))
    if selection.action.low is None:
        return (kept,)
    # Of a row, as a mean over layers and heads; where rows share, one may be given nothing that others want.
    left = np.max([sizes(selection, layers, less, *each).left for each in lengths.extremes()], axis=0)
    page = pages.page_size(pages.ladder(int(left.max()), *budget.ladder), lengths.platform)
    total = max(int(within(layers, np.asarray(prompt) + new).max()) for prompt, new in lengths.extremes())
    row = pages.ladder(int(left.max()) if budget.max_slots is None else total, *budget.ladder)
    return kept, PoolShape(row, page, pool(left, page, row))


def _init(
    selection: Selection, spec: ModelSpec, layers: Layers, lengths: Lengths, dtype: DTypeLike, amounts: Amounts
) -> Tiers:
    budget, prompt = selection.budget, np.asarray(lengths.prompt)
    seen = readable(prompt, layers.window)
    for length in np.unique(seen).tolist():
        check(budget, amounts, layers.peers, length)
    shape = (len(layers.index), len(prompt), spec.num_rows)
    spread = lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.int32), shape)
    of = np.asarray((amounts.keep if isinstance(amounts.keep, Fraction) else Fraction(0)).as_integer_ratio(), np.int32)
    state = RowState(
        new=spread(lengths.new) if selection.apart else (),
        decode_slots=spread(decode_slots(amounts, seen)[:, None]) if selection.bounded else (),
        share=jnp.asarray(np.broadcast_to(of, (*shape, 2))) if budget.grows else (),
        action=() if selection.action.init is None else selection.action.init(shape),
    )
    kept, *low = pool_shapes(selection, layers, lengths, amounts, spec.num_rows)
    sized = functools.partial(
        tiers_.init, layers=shape[0], batch=shape[1], heads=shape[2], widths=layers.widths, dtype=dtype
    )
    tier = sized(
        **kept._asdict(),
        store=selection.store,
        positions=not selection.keeps_all,
        scores=selection.score.observe is not None,
        state=state,
    )
    if budget.rows is None:
        given = sizes(selection, layers, amounts, prompt, lengths.new).given[..., None]
    else:
        given = collectives.own(jnp.asarray(budget.rows(amounts.keep, spec, layers, seen)), axis=2)
    tier = tier._replace(budget=spread(given))
    return (tier, *(sized(**each._asdict(), store=s) for each, s in zip(low, selection.stores[1:], strict=True)))


def _prefill(selection: Selection, tiers: Tiers, prompt: Prompt) -> tuple[Tiers, PrefillOutput]:
    score, budget = selection.score, selection.budget
    if any(store.balanced for store in selection.stores):
        balance = channel_balance(prompt)
        tiers = tuple(
            tier._replace(balance=balance) if store.balanced else tier
            for tier, store in zip(tiers, selection.stores, strict=True)
        )
    rows = tiers[0].budget
    rows = rows if prompt.window is None else jnp.minimum(rows, prompt.window)
    slots = rows[:, 0]  # of every row, where those are not known yet
    if score.prompt is None:
        return (_fill_in_order(tiers[0], prompt, slots, selection.store),), PrefillOutput()
    found = _candidates(prompt, score.prompt(prompt))
    if prompt.window is not None:
        seen = readable(found.length, prompt.window)
        found = found._replace(seen=seen) if selection.by_place else _newest(found, prompt.window)
    protected = score.protect(found.pos, found.length[..., None], rows[..., None])
    open_ = jnp.where((found.pos >= 0) & ~protected, found.stat, -1.0)  # of tokens that may be chosen or not
    if budget.allocate is None:
        if budget.split is not None:
            rows = budget.split(open_, slots, readable(prompt.length, prompt.window))
        return _write_selected(selection, tiers, found, rows, prompt.kernels), PrefillOutput()
    info = open_ if budget.measure is None else budget.measure(prompt, open_)
    if selection.action.prompt is None and budget.max_slots is not None:
        found = _shortlist(score, found, tiers[0].capacity, prompt.kernels)
    return tiers, PrefillOutput(info, found)


def _write_selected(
    selection: Selection, tiers: Tiers, found: Candidates, rows: Int[Array, "B K"], kernels: Implementation | None
) -> Tiers:
    (tier, *_) = tiers
    n = min(found.pos.shape[-1], tier.capacity)
    filled = jnp.minimum(rows, found.count)
    best = _best(selection.score, found, rows, filled, n, kernels)
    kept = Slots(best.k, best.v, best.pos, best.stat)
    if selection.action.prompt is not None:
        evicted = Evicted(found.k, found.v, found.pos, best.index, filled, found.count)
        kept, tiers = selection.action.prompt(evicted, kept, tiers, selection.stores)
    (tier, *rest) = tiers
    k, v = selection.store.encode(kept.k, kept.v, tier.balance)
    kept = kept._replace(k=k, v=v)
    budget = rows + tier.state.decode_slots if selection.bounded else rows
    tier = tiers_.reserve(tier._replace(budget=budget), filled, n)
    return (tiers_.fill(tier, kept, filled), *rest)


def _reserve(selection: Selection, tiers: Tiers, active: Bool[Array, " B"]) -> Tiers:
    (tier, *rest) = tiers
    slots = tier.length + 1 if selection.evict != "before" else jnp.minimum(tier.length + 1, tier.budget)
    return (tiers_.reserve(tier, jnp.where(active[:, None], slots, 0), 1), *reserve_slot(tuple(rest), active))


def _shrink_pool(
    selection: Selection, tiers: Tiers, length: Int[Array, " B"], amounts: Amounts
) -> tuple[Tiers, tuple[int, ...]]:
    """Pools for the device whose heads were given most."""
    new = tiers[0].state.new
    if isinstance(new, tuple):  # one device has the heads, and their slots add up
        return tiers, tuple(tier.free.shape[0] for tier in tiers)
    new, pools = mesh.read(new), []
    for i, tier in enumerate(tiers):
        longest = np.minimum(mesh.read(tier.length) + new, tier.capacity)
        if i == 0 and selection.evict != "never" and not selection.budget.grows:
            longest = np.minimum(longest, mesh.read(tier.budget) + selection.spare)
        slots = sharding.fullest(tier, -(-longest // tier.page)) * tier.page
        pools.append(pages.ladder(slots, *selection.budget.ladder) // tier.page)
    return tiers, tuple(pools)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _prune(selection: Selection, tiers: Tiers, fresh: Tiers, length: Int[Array, " B"], window: int | None) -> Tiers:
    ((tier,), (new,)) = tiers, fresh

    def one(i: Array, new: Tier) -> Tier:
        before = tiers_.layer(new, i)
        return tiers_.with_layer(new, i, before, _fewer(selection, tiers_.layer(tier, i), before, length, window))

    return (jax.lax.fori_loop(0, tier.length.shape[0], one, new),)


def _fewer(selection: Selection, tier: Tier, new: Tier, length: Int[Array, " B"], window: int | None) -> Tier:
    """An empty layer's view with the best slots of another one, which has a larger budget.

    A statistic that is not stored is in the order of the slots, but for those that were protected: what of these is not
    any more was so for a budget that is nothing else but protected, and comes last.
    """
    score, pos, now = selection.score, tiers_.positions(tier), length[:, None, None]
    rows = new.budget if window is None else jnp.minimum(new.budget, window)
    more = lambda tier: tier.state.decode_slots if selection.bounded else 0
    if score.observe is None:
        earlier = score.protect(pos, now, (tier.budget - more(tier))[..., None])
        slots = pos.shape[-1]
        stat = jnp.where(earlier, -slots, -jnp.arange(slots)).astype(jnp.float32)
    else:
        stat = tiers_.scores(tier)
    stat = jnp.where(pos < 0, -jnp.inf, jnp.where(score.protect(pos, now, rows[..., None]), jnp.inf, stat))
    n, filled = min(tier.capacity, new.capacity), jnp.minimum(rows, tier.length)
    kept = tiers_.take(tier, jnp.lexsort((pos, -stat))[..., :n])  # ties go to the first token
    new = new._replace(budget=rows + more(new), balance=tier.balance)
    return tiers_.fill(tiers_.reserve(new, filled, n), kept, filled)


def _insert(selection: Selection, tiers: Tiers, token: Token) -> Tiers:
    (tier, *rest) = tiers
    window = None if selection.evict == "after" or selection.by_place else token.window
    gone, slot = tiers_.expired(tier, token.pos, window)
    if selection.evict == "before":
        limit = tier.budget if token.window is None else jnp.minimum(tier.budget, token.window)
        slot = jnp.where(~gone & (tier.length >= limit), _worst(selection.score, tier, token.pos), slot)
    return (write_token(tier, selection.store, token, slot), *rest)


def _observe(selection: Selection, tiers: Tiers, token: Token, probs: tuple[Array, ...]) -> Tiers:
    (tier, *rest), score, action = tiers, selection.score, selection.action
    assert score.observe is not None
    active, stat = token.active[:, None], tiers_.scores(tier)
    tier = tiers_.with_scores(tier, jnp.where(active[..., None], score.observe(stat, probs[0]), stat))
    if selection.budget.grows:
        of, seen = tier.state.share, readable(token.pos + 1, token.window)[:, None]
        grown = jnp.maximum(tier.budget, times(seen, of[..., 0], of[..., 1]))
        tier = tier._replace(budget=jnp.where(active, grown, tier.budget))
    over = active & (tier.length > tier.budget)
    victim = _worst(score, tier, token.pos + 1)
    removed = over
    if token.window is not None and not selection.by_place:
        # One that nobody can read again leaves first, and is forgotten.
        gone, slot = tiers_.expired(tier, token.pos + 1, token.window)
        victim, removed, over = jnp.where(gone, slot, victim), over | (active & gone), over & ~gone
    tier, lost = tiers_.remove(tier, victim, removed)
    return (tier, *rest) if action.step is None else action.step((tier, *rest), lost, over, selection.stores, token)


def _fill_in_order(tier: Tier, prompt: Prompt, slots: Int[Array, " B"], store: KVStore) -> Tier:
    """The first tokens of the prompt, in order."""
    rows = tier.length.shape
    n = min(prompt.key.shape[1], tier.capacity)
    k, v = (jnp.moveaxis(x[:, :n], 2, 1) for x in (prompt.key, prompt.value))
    k, v = store.encode(k, v, tier.balance)
    filled = jnp.broadcast_to(jnp.minimum(slots, prompt.length)[:, None], rows)
    tier = tier._replace(budget=jnp.broadcast_to(slots[:, None], rows))
    return tiers_.fill(tiers_.reserve(tier, filled, n), Slots(k, v), filled)


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


def _shortlist(score: Score, found: Candidates, max_slots: int, kernels: Implementation | None) -> Candidates:
    """The candidates that rows of up to `max_slots` slots can keep."""
    slots = jnp.minimum(max_slots, found.length)
    best = _best(score, found, slots, found.count, min(max_slots, found.stat.shape[2]), kernels)
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
