"""The policy of models that merge a token with the ones before it: a slot holds the weighted mean of a run of tokens.

A run, a segment, ends where the gate says that the next token is not merged. Keys are averaged before rotation, so the
sum of the open segment is kept beside its slot, in float32: `OpenSegment`. Its slot is the last one of its row, but in
a layer with a sliding window, where segments that have left it give their slots to new ones. Stores of few bits encode
a slot once, when its segment closes; until then it lies in a second tier of one slot per row, unquantised.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from kvjax.attention.dispatch import kernel_or_xla
from kvjax.cache import tier as tiers_
from kvjax.cache.layout import Layers, Tiers
from kvjax.cache.pages import LARGEST
from kvjax.cache.store import KVStore
from kvjax.cache.tier import Slots
from kvjax.models import rope
from kvjax.policies import gate_capacity
from kvjax.policies.base import CachePolicy, PrefillOutput, RewrittenPrompt
from kvjax.policies.budgets.budget import Amounts
from kvjax.policies.ring import latest
from kvjax.spec import Gate, Lengths, ModelSpec, Prompt, Token
from pallas_kernels.implementation import Implementation
from pallas_kernels.segment_merge import pool


class OpenSegment(NamedTuple):
    """What a row remembers of its open segment, with `n = R + W + 1` values for its key, its value and its weight."""

    length: Int[Array, "*L B K"]  # its tokens
    ring: Float[Array, "*L B K window n"] | tuple = ()  # the newest tokens, weighted, by position; or, where a segment
    sums: Float[Array, "*L B K n"] | tuple = ()  # remembers all of its tokens, the sums over them
    slot: Int[Array, "*L B K"] | tuple = ()  # where it lies; () = last in its row

    @property
    def window(self) -> int:
        """Newest tokens that it remembers, 0 = all."""
        return 0 if isinstance(self.ring, tuple) else self.ring.shape[-2]


class Segments(NamedTuple):
    """A layer's prompt as segments."""

    begins: Bool[Array, "B T K"]  # at tokens of the prompt only
    ends: Bool[Array, "B T K"]
    forced: Int[Array, "B K"]  # tokens that were refused a slot
    last: OpenSegment


@functools.cache
def accumulate(store: KVStore) -> CachePolicy:
    """Merge a token into the open segment of its row, or begin a new one, as the gate says.

    Args:
      store: number format of the slots of closed segments.

    `Amounts.keep` is the capacity, slots for which there is room, as in `gate_capacity.sequence_slots`; tokens that get
    none are merged.

    Source: DMC (arXiv 2403.09636), Algorithm 1; Megatron-LM, branch `dmc`, `megatron/contrib/dmc/`.
    Differs: a prompt is read at once; a window is summed from its tokens, where the released code adds and subtracts;
      refused tokens (the paper's memory is unbounded).
    Cost: at prefill `window` multiplications per value; per step as many additions, and `window (R + W + 1)`
      values in float32 per row.
    """
    gate_capacity.check_store("dmc", store)
    stores = (store,) if store.is_dense else (store, KVStore())  # the open segment has a tier of its own
    part = lambda function: functools.partial(function, store)
    return gate_capacity.policy(stores, part(_init), _rewrite, part(_prefill), part(_insert))


def _init(
    store: KVStore, spec: ModelSpec, layers: Layers, lengths: Lengths, dtype: DTypeLike, amounts: Amounts
) -> Tiers:
    gate = gate_capacity.gate_of(spec, "dmc")
    shape, width = (len(layers.index), len(lengths.prompt), spec.num_rows), sum(layers.widths) + 1
    segment = OpenSegment(
        length=jnp.zeros(shape, jnp.int32),
        ring=jnp.zeros((*shape, gate.window, width)) if gate.window else (),
        sums=() if gate.window else jnp.zeros((*shape, width)),
        slot=() if layers.window is None else jnp.zeros(shape, jnp.int32),
    )
    closed = gate_capacity.init(
        spec, layers, lengths, dtype, gate=gate, amounts=amounts, min_slots=1, store=store,
        elsewhere=int(not store.is_dense), own=segment,
    )  # fmt: skip
    if store.is_dense:
        return (closed,)
    size = dict(zip(("layers", "batch", "heads"), shape, strict=True))
    slots = shape[0] * shape[1] * shape[2] // lengths.parts
    return closed, tiers_.init(**size, row=1, page=1, slots=slots, widths=layers.widths, store=KVStore(), dtype=dtype)


def _rewrite(
    tiers: Tiers,
    k: Array,
    v: Array,
    gate: Gate,
    length: Int[Array, " B"],
    window: int | None,
    kernels: Implementation | None,
) -> RewrittenPrompt:
    (tier, *_), pos = tiers, jnp.arange(k.shape[1])[:, None]
    real = pos < length[:, None, None]
    asks = (pos > 0) & real & ~(gate.logit > 0)
    forced = gate_capacity.refuse(tier, gate.logit, asks, jnp.ones(tier.length.shape, jnp.int32), length, window)
    merge = (pos > 0) & real & (~asks | forced)
    following = jnp.pad(merge[:, 1:], ((0, 0), (0, 1), (0, 0)))
    assert not isinstance(gate.weight, tuple)
    memory = tier.state.own.window
    mean = functools.partial(kernel_or_xla, "segment means", pool, kernels, window=memory)
    weight = jnp.where(real, gate.weight, 1.0)  # tokens behind the longest prompt have none: they were not read
    k_mean, v_mean = (mean(x, merge.astype(jnp.float32), weight) for x in (k, v))
    visible_until = jnp.where(following, pos, LARGEST)
    begins = real & ~merge
    start = jnp.max(jnp.where(begins, pos, 0), axis=1)
    last = _last_segment(k, v, gate.weight, length, start, memory)
    segments = Segments(begins, real & ~following, forced.sum(axis=1, dtype=jnp.int32), last)
    return RewrittenPrompt(k_mean, v_mean, jnp.moveaxis(visible_until, 1, 2), segments)


def _prefill(store: KVStore, tiers: Tiers, prompt: Prompt) -> tuple[Tiers, PrefillOutput]:
    (tier, *top), segments = tiers, prompt.rewritten
    assert isinstance(segments, Segments)
    ends = jnp.moveaxis(segments.ends & prompt.alive()[..., None], 1, 2)
    k, v = (jnp.moveaxis(x, 2, 1) for x in (prompt.key, prompt.value))
    count = ends.sum(axis=-1, dtype=jnp.int32)
    found = gate_capacity.found(tier, count)
    filled = count - len(top)
    last = segments.last if prompt.window is None else segments.last._replace(slot=count - 1)
    state = tier.state._replace(forced=segments.forced, own=last)
    tier = tiers_.reserve(tier._replace(budget=filled, state=state), filled, k.shape[2])
    k_mean, v_mean, pos = tiers_.gather_masked(ends, k, v)
    tier = tiers_.fill(tier, Slots(*store.encode(k_mean, v_mean, tier.balance), pos), filled)
    if top:
        last = jnp.broadcast_to((prompt.length - 1)[:, None, None], (*count.shape, 1))
        k, v = (jnp.take_along_axis(x, last[..., None], axis=2) for x in (k, v))
        top = [tiers_.reserve(t, jnp.ones_like(t.length), 1) for t in top]
        top = [tiers_.put(t, jnp.zeros_like(last), Slots(k, v, last), last >= 0) for t in top]
    return (tier, *top), found


def _insert(store: KVStore, tiers: Tiers, token: Token) -> Tiers:
    (tier, *top), gate = tiers, token.gate
    assert isinstance(gate, Gate)
    active = jnp.broadcast_to(token.active[:, None], tier.length.shape)
    gone, free = tiers_.expired(tier, token.pos, token.window)
    asks, full = ~(gate.logit > 0), (tier.length >= tier.budget) & ~gone
    merge = (~asks | full) & (bool(top) | (tier.length > 0))  # a window of one token leaves no segment open
    segment = tier.state.own
    last = tier.length - 1 if token.window is None else segment.slot
    extended, mean = _extended(segment, token, merge)
    if token.window is not None:
        extended = extended._replace(slot=jnp.where(merge, last, free))
    keep = lambda new, old: jnp.where(active.reshape(active.shape + (1,) * (new.ndim - 2)), new, old)
    forced = jnp.where(active & asks & full, tier.state.forced + 1, tier.state.forced)
    tier = tier._replace(state=tier.state._replace(forced=forced, own=jax.tree.map(keep, extended, segment)))
    k, v = jnp.split(mean[:, :, None], [token.k.shape[-1]], axis=-1)
    k = rope.rotate(k.astype(token.k.dtype), *(angle[:, :, None] for angle in token.angles))
    pos = jnp.broadcast_to(token.pos[:, None, None], (*merge.shape, 1))
    new, where = Slots(k, v.astype(token.value.dtype), pos), active[..., None]
    if not top:
        return (tiers_.put(tier, jnp.where(merge, last, free)[..., None], new, where),)
    (open_,) = top
    closed = tiers_.take(open_, jnp.zeros_like(pos))
    codes = closed._replace(**dict(zip("kv", store.encode(closed.k, closed.v, tier.balance), strict=True)))
    tier = tiers_.put(tier, free[..., None], codes, where & ~merge[..., None])
    return tier, tiers_.put(open_, jnp.zeros_like(pos), new, where)


def _last_segment(
    k: Float[Array, "B T K R"], v: Float[Array, "B T K W"], weight: Float[Array, "B T K"], length: Int[Array, " B"],
    start: Int[Array, "B K"], window: int,
) -> OpenSegment:  # fmt: skip
    """What is remembered of the open segments, which began at `start`."""
    tokens = length[:, None] - start
    if window == 0:
        pos = jnp.arange(k.shape[1])[:, None]
        weight = jnp.where((pos >= start[:, None]) & (pos < length[:, None, None]), weight, 0.0)
        parts = [jnp.einsum("btk,btkn->bkn", weight, x.astype(jnp.float32)) for x in (k, v)]
        return OpenSegment(tokens, sums=jnp.concatenate([*parts, weight.sum(axis=1)[..., None]], axis=-1))
    pos = jnp.maximum(latest(length[:, None], window), 0)
    take = lambda x: jnp.moveaxis(jnp.take_along_axis(x, pos.reshape(*pos.shape, *(1,) * (x.ndim - 2)), axis=1), 1, 2)
    return OpenSegment(tokens, ring=_weighted(take(k), take(v), take(weight)))


def _weighted(k: Float[Array, "*b R"], v: Float[Array, "*b W"], weight: Float[Array, "*b"]) -> Float[Array, "*b n"]:
    """Key and value times their weight, and the weight."""
    weight = weight[..., None]
    return jnp.concatenate([k.astype(jnp.float32) * weight, v.astype(jnp.float32) * weight, weight], axis=-1)


def _extended(
    segment: OpenSegment, token: Token, merge: Bool[Array, "B K"]
) -> tuple[OpenSegment, Float[Array, "B K n"]]:
    """The open segment with one more token, or a new one of it, and the segment's mean key and value."""
    assert isinstance(token.gate, Gate) and not isinstance(token.gate.weight, tuple)
    entry = _weighted(token.k, token.value, token.gate.weight)
    length = jnp.where(merge, segment.length + 1, 1)
    if not isinstance(segment.sums, tuple):
        sums = jnp.where(merge[..., None], segment.sums, 0.0) + entry
        segment = segment._replace(length=length, sums=sums)
    else:
        assert not isinstance(segment.ring, tuple)
        window, pos = segment.window, token.pos[:, None]
        place = jnp.arange(window)
        here = (place == pos % window)[:, None, :, None]
        ring = jnp.where(here, entry[:, :, None], segment.ring)
        recent = ((pos - place) % window)[:, None] < length[..., None]
        sums = jnp.sum(jnp.where(recent[..., None], ring, 0.0), axis=2)
        segment = segment._replace(length=length, ring=ring)
    return segment, sums[..., :-1] / sums[..., -1:]
