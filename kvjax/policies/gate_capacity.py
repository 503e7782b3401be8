"""Slots that the model itself asks for, token by token: the room for them, and what happens when it is used up.

A gate says of each token whether it takes a slot. How many will is known in the mean only, from the rate that the model
was trained for, and rows differ widely. So all rows of a sequence share one room, whatever its batch mates do. Once it
is used up, tokens that ask for a slot are refused one: they are forced to do what the policy does with those that do
not ask. With fewer slots left than rows, the lowest layers are offered them.

A layer's `tier.budget` is, until its prompt has been read, the slots that its rows may fill together; afterwards, per
row, those that it may fill in the next step. The first tier's `state` is a `CapacityState`.
"""

import functools
from collections.abc import Callable
from fractions import Fraction
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from kvjax.cache import pages, sharding
from kvjax.cache import tier as tiers_
from kvjax.cache.layout import Layers, Tiers
from kvjax.cache.pages import LARGEST
from kvjax.cache.store import KVStore
from kvjax.cache.tier import Tier
from kvjax.errors import InputError
from kvjax.parallel import mesh
from kvjax.parallel.collectives import HEADS
from kvjax.policies.base import CachePolicy, PoolHooks, PrefillOutput, PromptHooks, Rewrite
from kvjax.policies.budgets.apportion import choose_best
from kvjax.policies.budgets.budget import Amounts, Budget, Keep, everything, parse_keep, share
from kvjax.spec import GateSpec, Lengths, ModelSpec, Prompt, PyTree, Token, readable

LADDER = (32, 8)  # of the pool: what a rung adds is no room for any sequence
PROMPT = 2  # times the slots that the trained rate needs, while a prompt is read
LATER = 1.5  # times the slots that new tokens need at the prompt's own rate

Capacity = int | Fraction | None


class CapacityState(NamedTuple):
    """What rows that share their sequence's room remember; the same numbers in all of them but for the last two."""

    max_slots: Int[Array, "*L B K"]  # that the rows of the sequence may fill, all layers together
    layer_slots: Int[Array, "*L B K"]  # of these, what every layer of the prompt may fill at least
    new: Int[Array, "*L B K"]  # tokens that may follow the prompt and be read together
    forced: Int[Array, "*L B K"]  # tokens of a row that asked for a slot in vain
    own: PyTree  # of the policy


def gate_of(spec: ModelSpec, method: Literal["dmc", "dms"]) -> GateSpec:
    """The gate of a model that was retrofitted for this method."""
    if spec.gate is None:
        raise InputError(f"{method} needs a checkpoint made by python -m kvjax.retrofit: this model has no gate")
    if spec.gate.objective != method:
        raise InputError(
            f"{method} needs a checkpoint made by python -m kvjax.retrofit: this model's gate is for"
            f" {spec.gate.objective}"
        )
    return spec.gate


def amounts(capacity: Keep) -> Amounts:
    """A method's argument: tokens, a share, or "" where the model's own rate decides."""
    return Amounts() if capacity == "" else Amounts(parse_keep(capacity, "capacity"))


def check_store(method: Literal["dmc", "dms"], store: KVStore) -> None:
    """Raise `InputError` for a store that needs to see runs of tokens, or all of a prompt."""
    if store.key.run > 1:
        raise InputError(
            f"{method}: kivi quantises keys that follow each other: it needs a method that keeps all tokens"
        )
    if store.balanced:
        raise InputError(f"{method}: the balance of a store is made from all keys of a prompt: it must not be balanced")


def sequence_slots(
    gate: GateSpec, capacity: Capacity, lengths: Lengths, rows: int, min_slots: int, window: int | None = None
) -> Int[np.ndarray, " B"]:
    """Slots for the rows of each sequence together.

    Args:
      gate: the trained rate.
      capacity: slots per row, or a fraction of all tokens; None = `PROMPT` times what the rate needs.
      lengths: of the prompts, and how many tokens follow.
      rows: of a sequence, over all layers.
      min_slots: slots that a row cannot do without, where it has so many tokens.
      window: sliding window of the layers [tokens].
    """
    total = np.asarray(lengths.prompt, np.int64) + lengths.new
    total = total if window is None else np.minimum(total, window)
    if capacity is None:
        # A token that will be evicted waits for it.
        wanted = np.ceil(rows * (PROMPT * total / gate.rate + (min_slots - 1) * (1 - 1 / gate.rate)))
    else:
        wanted = share(rows * total, capacity) if isinstance(capacity, Fraction) else total * 0 + rows * capacity
    return np.clip(wanted, rows * np.minimum(min_slots, total), np.minimum(rows * total, LARGEST - 1)).astype(np.int64)


def init(
    spec: ModelSpec,
    layers: Layers,
    lengths: Lengths,
    dtype: DTypeLike,
    *,
    gate: GateSpec,
    amounts: Amounts,
    min_slots: int,
    store: KVStore,
    elsewhere: int = 0,
    own: PyTree,
) -> Tier:
    """An empty tier for rows that share their sequence's room.

    Args:
      spec, layers, lengths, dtype: as in `CachePolicy.init`.
      gate, min_slots: as in `sequence_slots`.
      amounts: `keep` is the capacity.
      store: number format of the slots.
      elsewhere: slots of each row that are counted but lie in another tier.
      own: the policy's own state, every leaf `[L B K ...]`.

    The pool is for the prompt; `shrink_pool` makes it smaller. A sequence's prompt leaves the new tokens half of the
    slots that would be theirs if all tokens had as many; a layer leaves every later one half of an even share.
    """
    shape = (len(layers.index), len(lengths.prompt), spec.num_rows)
    prompt, rows = readable(np.asarray(lengths.prompt, np.int64), layers.window), shape[0] * shape[2]
    new = np.minimum(np.asarray(lengths.prompt) + lengths.new, layers.window or LARGEST) - prompt
    room = lambda lengths: sequence_slots(gate, amounts.keep, lengths, rows, min_slots, layers.window)
    max_slots = room(lengths)
    # What shapes are made for.
    total = np.minimum(lengths.totals(), layers.window or LARGEST)
    longest = max_slots if lengths.total is None else room(lengths.longest())
    needed = np.minimum(min_slots, prompt)
    first = np.maximum(max_slots - max_slots * new // (2 * (prompt + new)), rows * needed)
    floor = np.maximum(first // (2 * shape[0]), shape[2] * needed)
    budget = np.repeat(floor[None], shape[0], axis=0)
    budget[0] = first - (shape[0] - 1) * floor
    row = np.minimum(-(-longest // rows), np.ceil(total / gate.rate)).max()
    page = pages.page_size(pages.ladder(int(row), *LADDER), lengths.platform)
    # Each row may have a page that holds nothing yet, taken for a token that was merged after all.
    slots = lengths.fullest_part(longest + rows * (page - elsewhere))
    spread = lambda x: jnp.asarray(np.broadcast_to(x[..., None], shape), jnp.int32)
    after = jnp.full(shape, min(lengths.new, layers.window or LARGEST), jnp.int32)
    return tiers_.init(
        layers=shape[0],
        batch=shape[1],
        heads=shape[2],
        row=min(pages.ladder(int(total.max()), *LADDER), layers.window or LARGEST),
        page=page,
        slots=pages.ladder(slots, *LADDER),
        widths=layers.widths,
        store=store,
        dtype=dtype,
        state=CapacityState(spread(max_slots), spread(floor), after, jnp.zeros(shape, jnp.int32), own),
    )._replace(budget=spread(budget))


def refuse(
    tier: Tier,
    logit: Float[Array, "B T K"],
    asks: Bool[Array, "B T K"],
    taken: Int[Array, "B K"],
    length: Int[Array, " B"],
    window: int | None,
) -> Bool[Array, "B T K"]:
    """Which tokens of a layer's prompt are refused a slot for want of room: those that ask for it least.

    Args:
      tier: the layer's view.
      logit: of the gate, at most 0 where a token asks for a slot; the larger the less.
      asks: which tokens do.
      taken: slots of each row that are not up for choice.
      length: tokens of each prompt.
      window: sliding window of the layer; what has left it takes no slot, and is refused none.

    Ties go to the first head, in a head to the first token.
    """
    if window is not None:
        asks &= (jnp.arange(asks.shape[1]) >= (length - readable(length, window))[:, None])[..., None]
    scores = jnp.moveaxis(jnp.where(asks, jnp.abs(logit), -1.0), 2, 0)
    granted = choose_best(scores, tier.budget[:, 0] - taken.sum(axis=-1))
    return asks & ~jnp.moveaxis(granted, 0, 2)


def found(tier: Tier, filled: Int[Array, "B K"]) -> PrefillOutput:
    """What a layer's prompt leaves to the next layer, when its rows have filled so many slots."""
    left = tier.budget[:, :1] - filled.sum(axis=-1, keepdims=True)
    return PrefillOutput(jnp.broadcast_to(left + tier.state.layer_slots, filled.shape))


def hand_on(
    infos: list[Int[Array, "B K"]],
    seen: Int[Array, ""],
    length: Int[Array, " B"],
    held: Int[Array, "L B K"],
    slots: Int[Array, " B"],
) -> Int[Array, "L B K"]:
    """What the next layer of a prompt may fill; layers that have been read keep what they have."""
    following = jnp.stack(infos)[seen - 1]
    return jnp.where((jnp.arange(len(infos)) >= seen)[:, None, None], following, LARGEST)


def shrink_pool(tiers: Tiers, length: Int[Array, " B"], amounts: Amounts) -> tuple[Tiers, tuple[int, ...]]:
    """The room that sequences need once their prompts have been read, and the pages for it: `PoolHooks.shrink`.

    Args:
      tiers: of all layers; where there is a second one, it holds one slot per row.
      length: tokens of each prompt.
      amounts: with a capacity all that is left of it; without, new tokens may need `LATER` times as many slots as the
        prompt's.
    """
    tier, *rest = tiers
    layers, batch, heads = tier.length.shape
    devices = mesh.shape_of(tier)[HEADS]
    own, tokens = heads // devices, np.minimum(mesh.read(length).astype(np.int64), tier.capacity)[:, None]
    rows = layers * own
    used = np.sum([mesh.read(each.length).astype(np.int64) for each in tiers], axis=0)
    used = used.reshape(layers, batch, devices, own).sum(axis=(0, 3))
    new, max_slots = (mesh.read(x).astype(np.int64)[0, :, ::own] for x in (tier.state.new, tier.state.max_slots))
    more = np.minimum(rows * new, max_slots - used)
    if amounts.keep is None:
        more = np.minimum(more, np.ceil(LATER * new * used / tokens).astype(np.int64) + rows)
    max_slots = used + more
    slots = sharding.fullest(tier, (max_slots + rows * (tier.page - len(rest)))[None])
    spread = np.broadcast_to(np.repeat(max_slots, own, axis=1), tier.length.shape).astype(np.int32)
    size = -(-pages.ladder(slots, *LADDER) // tier.page)
    state = tier.state._replace(max_slots=mesh.place(mesh.of(tier), mesh.LAYERS, spread))
    return (tier._replace(state=state), *rest), (size, *(t.free.shape[0] // t.num_free.shape[0] for t in rest))


def extend(tiers: Tiers, length: int, new: int) -> Tiers:
    """Room for more tokens than were expected, as for those that were: `PoolHooks.extend`."""
    tier, *rest = tiers
    layers, _, heads = tier.length.shape
    rows, used = layers * heads, np.sum([mesh.read(each.length) for each in tiers], axis=(0, 1, 3))
    more = np.minimum(rows * new, np.ceil(LATER * new * used / length).astype(np.int32) + rows)
    free = (int(tier.num_free[0]) - rows) * tier.page  # each row may have a page that holds one slot
    more = jnp.asarray(np.clip(more, 0, free), jnp.int32)[:, None]
    state = tier.state._replace(max_slots=tier.state.max_slots + more)
    return (tier._replace(state=state), *rest)


def policy(
    stores: tuple[KVStore, ...],
    init: Callable[[ModelSpec, Layers, Lengths, DTypeLike, Amounts], Tiers],
    rewrite: Rewrite,
    prefill: Callable[[Tiers, Prompt], tuple[Tiers, PrefillOutput]],
    insert: Callable[[Tiers, Token], Tiers],
) -> CachePolicy:
    """A policy of a gate: at most all slots, which a prompt's layers share one after the other."""
    return CachePolicy(
        stores,
        init,
        prefill,
        insert,
        prompt_hooks=PromptHooks(rewrite),
        pool_hooks=PoolHooks(grant, shrink_pool, extend),
        budget=Budget(everything().slots, allocate=hand_on, update_interval=1),
    )


def grant(tiers: Tiers, active: Bool[Array, " B"]) -> Tiers:
    """One more slot for each row of the first tier, in the order of layers and heads while there is room."""
    tier, *rest = tiers
    used = functools.reduce(jnp.add, (each.length for each in tiers)).sum(axis=(0, 2))
    layers, _, heads = tier.length.shape
    order = jnp.arange(layers)[:, None, None] * heads + jnp.arange(heads)
    free = (tier.state.max_slots[0, :, 0] - used)[:, None]
    granted = active[:, None] & (order < free) & (tier.length < tier.capacity)
    limit = jnp.where(granted, tier.length + 1, tier.length)
    tier = tier._replace(budget=jnp.where(active[:, None], limit, tier.budget))
    return (tiers_.reserve(tier, jnp.where(granted, limit, 0), 1), *rest)
