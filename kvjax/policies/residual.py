"""The policy of stores that encode runs of tokens: all tokens are kept, the newest unquantised until a run is complete.

Two tiers. The first holds codes, slot s for position s. The second is a ring of the newest tokens, slot s for positions
s, s + ring, ...: values leave it one by one, keys a run at a time. Attention needs both of a token in one tier, so it
reads a token from the ring as long as its value is there; when keys are encoded, the ring takes over the decoded ones.
What is computed is the same as if keys and values were read from different places.

In a layer with a sliding window the codes lie in a ring, too, of whole runs. Slots there keep their positions: -1 as
long as their tokens are read from the other ring. The first tier's `state` is then how many tokens a row has been
given, `Seen`.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Int

from kvjax.cache import pages
from kvjax.cache import tier as tiers_
from kvjax.cache.layout import Layers, Tiers
from kvjax.cache.pages import LARGEST
from kvjax.cache.store import KVStore
from kvjax.cache.tier import Slots, Tier
from kvjax.policies.base import CachePolicy, PoolHooks, PrefillOutput
from kvjax.policies.budgets.budget import Amounts, everything
from kvjax.policies.ring import latest, write_newest
from kvjax.spec import Lengths, ModelSpec, Prompt, Token

LADDER = (8, 64)  # as of the full cache


class Seen(NamedTuple):
    """What rows of a ring of codes remember."""

    tokens: Int[Array, "*L B K"]


class Runs(NamedTuple):
    """What `residual` was given, and the sizes that follow from it."""

    store: KVStore

    @property
    def size(self) -> int:
        """Tokens that are encoded together, R."""
        return self.store.residual

    @property
    def ring(self) -> int:
        """Places of the ring."""
        return self.size + 1

    def whole(self, slots: int) -> int:
        """Slots rounded up to whole runs."""
        return -(-slots // self.size) * self.size

    def places(self, low: Tier) -> int:
        """Slots of a ring of codes."""
        return max(low.capacity // self.size, 1) * self.size


@functools.cache
def residual(store: KVStore) -> CachePolicy:
    """Keep all tokens, the newest `store.residual` (R) unquantised.

    With n tokens, keys of the first `n - n mod R` are encoded, and values of the first `n - R`. The ring has one place
    more: while a token is read, it still sees the value that leaves after it.

    Source: KIVI (arXiv 2402.02750); `models/llama_kivi.py`.
    Differs: nothing known.
    Cost: per step a write into the ring; every R steps the codes of R tokens.
    """
    part = lambda function: functools.partial(function, Runs(store))
    return CachePolicy(
        (store, KVStore()),
        part(_init),
        part(_prefill),
        part(_insert),
        pool_hooks=PoolHooks(part(_reserve)),
        budget=everything(),
    )


def _init(runs: Runs, spec: ModelSpec, layers: Layers, lengths: Lengths, dtype: DTypeLike, amounts: Amounts) -> Tiers:
    shape = {"layers": len(layers.index), "batch": len(lengths.prompt), "heads": spec.num_rows}
    windowed, rows = layers.window is not None, lengths.totals()
    limit = LARGEST if layers.window is None else runs.whole(layers.window - 1)
    coded = np.minimum(rows, limit)
    row = min(pages.ladder(int(coded.max()), *LADDER), limit)
    page = max(pages.page_size(row, lengths.platform), runs.store.key.run)
    held = shape["layers"] * shape["heads"] * lengths.fullest_part(-(-coded // page))
    sized = functools.partial(tiers_.init, **shape, widths=layers.widths, dtype=dtype)
    low = sized(
        row=row,
        page=page,
        slots=pages.ladder(held * page, *LADDER),
        store=runs.store,
        positions=windowed,
        state=Seen(jnp.zeros(tuple(shape.values()), jnp.int32)) if windowed else (),
    )
    row = min(runs.ring, pages.ladder(int(rows.max()), *LADDER))
    page = pages.page_size(row, lengths.platform)
    slots = math.prod(shape.values()) // lengths.parts * -(-row // page) * page
    return low, sized(row=row, page=page, slots=slots, store=KVStore())


def _prefill(runs: Runs, tiers: Tiers, prompt: Prompt) -> tuple[Tiers, PrefillOutput]:
    (low, ring), store = tiers, runs.store
    rows, length = low.length.shape, prompt.length[:, None]
    pad = ((0, 0), (0, 0), (0, -prompt.key.shape[1] % store.key.run), (0, 0))
    k, v = (jnp.pad(jnp.moveaxis(x, 2, 1), pad) for x in (prompt.key, prompt.value))
    encoded = jnp.maximum(length - 1, 0) // runs.size * runs.size  # `reserve` does what is just due
    places = k.shape[2] if prompt.window is None else runs.places(low)
    n = min(places, k.shape[2])
    pos = jnp.arange(n)[None] if prompt.window is None else latest(encoded, places, n)
    newest = lambda x: jnp.take_along_axis(x, jnp.maximum(pos, 0)[:, None, :, None], axis=2)
    codes = store.encode(*((k, v) if prompt.window is None else (newest(k), newest(v))), low.balance)
    filled = jnp.broadcast_to(jnp.minimum(encoded, places), rows)
    outside = jnp.where(pos < length - runs.ring, pos, -1)  # of the ring
    outside = jnp.broadcast_to(outside[:, None], (*rows, n))
    low = tiers_.fill(tiers_.reserve(low, filled, n), Slots(codes[0], codes[1], outside), filled)
    if prompt.window is None:
        low = low._replace(length=jnp.broadcast_to(jnp.maximum(length - runs.ring, 0), rows))
    else:
        low = low._replace(state=Seen(jnp.broadcast_to(length, rows)))
    at = jnp.broadcast_to(latest(length, runs.ring)[:, None], (*rows, runs.ring))
    take = lambda x: jnp.take_along_axis(x, jnp.maximum(at, 0)[..., None], axis=2)
    decoded = store.key.decode(codes[0], k.dtype)
    decoded = jnp.take_along_axis(decoded, (jnp.maximum(at, 0) % places)[..., None], axis=2)
    keys = jnp.where((at < encoded[:, None])[..., None], decoded, take(k))
    place = jnp.broadcast_to(jnp.arange(runs.ring), at.shape)
    ring = tiers_.reserve(ring, jnp.broadcast_to(jnp.minimum(length, runs.ring), rows), runs.ring)
    return (low, tiers_.put(ring, place, Slots(keys, take(v), at), at >= 0)), PrefillOutput()


def _seen(low: Tier, ring: Tier) -> Int[Array, "*L B K"]:
    """Tokens that rows have been given."""
    return low.length + ring.length if isinstance(low.pos, tuple) else low.state.tokens


def _reserve(runs: Runs, tiers: Tiers, active: Bool[Array, " B"]) -> Tiers:
    """Also encodes complete runs, of all layers at once: within a layer, what others still read would be copied."""
    low, ring = tiers
    n = _seen(low, ring)
    due = active[:, None] & (n > 0) & (n % runs.size == 0)
    low = tiers_.reserve(low, jnp.where(due, jnp.minimum(n, low.capacity), 0), runs.size)
    ring = tiers_.reserve(ring, jnp.where(active[:, None], jnp.minimum(n + 1, runs.ring), 0), 1)
    layers = jnp.where(jnp.any(due), n.shape[0], 0)  # a loop: a branch would copy the pools
    return jax.lax.fori_loop(0, layers, lambda i, tiers: _encode_run(runs, tiers, i, due), (low, ring))


def _encode_run(runs: Runs, tiers: Tiers, index: Int[Array, ""], due: Bool[Array, "L B K"]) -> Tiers:
    """Encode the newest run of one layer's rows."""
    low, ring = (tiers_.layer(tier, index) for tier in tiers)
    at = _seen(low, ring)[..., None] - runs.size + jnp.arange(runs.size)
    where = jnp.broadcast_to(due[index][..., None], at.shape)
    at = jnp.maximum(at, 0)
    newest = tiers_.take(ring, at % runs.ring)
    codes = runs.store.encode(newest.k, newest.v, low.balance)
    if isinstance(low.pos, tuple):
        written = tiers_.put(low, at, Slots(codes[0], codes[1]), where)._replace(length=low.length)
    else:
        hidden = Slots(codes[0], codes[1], jnp.full_like(at, -1))
        written = tiers_.put(low, at % runs.places(low), hidden, where)
    decoded = newest._replace(k=runs.store.key.decode(codes[0], jnp.float32))
    changed = tiers_.put(ring, at % runs.ring, decoded, where)
    return tiers_.with_layer(tiers[0], index, low, written), tiers_.with_layer(tiers[1], index, ring, changed)


def _insert(runs: Runs, tiers: Tiers, token: Token) -> Tiers:
    low, ring = tiers
    active = jnp.broadcast_to(token.active[:, None], ring.length.shape)
    leaves = active & (ring.length == runs.ring)
    if token.window is None:
        low = low._replace(length=jnp.where(leaves, low.length + 1, low.length))
    else:
        old = jnp.broadcast_to((token.pos - runs.ring)[:, None, None], (*leaves.shape, 1))
        low = tiers_.place(low, jnp.maximum(old, 0) % runs.places(low), old, leaves[..., None])
        low = low._replace(state=Seen(jnp.where(active, token.pos[:, None] + 1, low.state.tokens)))
    return low, write_newest(ring, runs.ring, KVStore(), token)
