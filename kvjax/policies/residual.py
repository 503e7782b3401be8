"""The policy of stores that encode runs of tokens: all tokens are kept, the newest as they are until a run is complete.

Two tiers. The first holds codes, slot s for position s. The second is a ring of the newest tokens, slot s for positions
s, s + ring, ...: values leave it one by one, keys a run at a time. Attention needs both of a token in one tier, so it
reads a token from the ring as long as its value is there; when keys are encoded, the ring takes over the decoded ones.
What is computed is the same as if keys and values were read from different places.

In a layer with a sliding window the codes lie in a ring, too, of whole runs. Slots there keep their positions: -1 as
long as their tokens are read from the other ring. `calib` of the first tier says how many tokens a row has `seen`.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Int

from kvjax.cache import pages
from kvjax.cache import tier as tiers_
from kvjax.cache.layout import Layers, Tiers
from kvjax.cache.store import KVStore
from kvjax.cache.tier import Slots, Tier
from kvjax.policies.base import CachePolicy, PrefillOutput
from kvjax.policies.budgets.budget import Amounts, everything
from kvjax.policies.ring import latest
from kvjax.spec import Lengths, ModelSpec, Prompt, Token

LADDER = (8, 64)  # as of the full cache


@functools.cache
def residual(store: KVStore) -> CachePolicy:
    """Keep all tokens, the newest `store.residual` (R) as they are.

    With n tokens, keys of the first `n - n mod R` are encoded, and values of the first `n - R`. The ring has one place
    more: while a token is read, it still sees the value that leaves after it.

    Source: KIVI (arXiv 2402.02750); `models/llama_kivi.py`.
    Differs: nothing known.
    Cost: per step a write into the ring; every R steps the codes of R tokens.
    """
    size, group = store.residual, store.key.run
    ring_size = size + 1

    def init(spec: ModelSpec, layers: Layers, lengths: Lengths, dtype: DTypeLike, amounts: Amounts) -> Tiers:
        shape = {"layers": len(layers.index), "batch": len(lengths.prompt), "heads": spec.num_rows}
        rows = lengths.whole()
        coded = rows if layers.window is None else np.minimum(rows, -(-(layers.window - 1) // size) * size)
        row = pages.ladder(int(coded.max()), *LADDER)
        row = row if layers.window is None else min(row, -(-(layers.window - 1) // size) * size)
        page = max(pages.page_size(row, lengths.platform), group)
        held = shape["layers"] * shape["heads"] * lengths.most(-(-coded // page))
        sized = functools.partial(tiers_.init, **shape, widths=layers.widths, dtype=dtype)
        windowed = layers.window is not None
        low = sized(
            row=row,
            page=page,
            slots=pages.ladder(held * page, *LADDER),
            store=store,
            positions=windowed,
            calib={"seen": jnp.zeros(tuple(shape.values()), jnp.int32)} if windowed else (),
        )
        row = min(ring_size, pages.ladder(int(rows.max()), *LADDER))
        page = pages.page_size(row, lengths.platform)
        slots = math.prod(shape.values()) // lengths.parts * -(-row // page) * page
        return low, sized(row=row, page=page, slots=slots, store=KVStore())

    def prefill(tiers: Tiers, prompt: Prompt) -> tuple[Tiers, PrefillOutput]:
        low, ring = tiers
        rows, length = low.length.shape, prompt.length[:, None]
        pad = ((0, 0), (0, 0), (0, -prompt.key.shape[1] % group), (0, 0))
        k, v = (jnp.pad(jnp.moveaxis(x, 2, 1), pad) for x in (prompt.key, prompt.value))
        encoded = jnp.maximum(length - 1, 0) // size * size  # `reserve` does what is just due
        places = k.shape[2] if prompt.window is None else _places(low)
        n = min(places, k.shape[2])
        pos = jnp.arange(n)[None] if prompt.window is None else latest(encoded, places, n)
        newest = lambda x: jnp.take_along_axis(x, jnp.maximum(pos, 0)[:, None, :, None], axis=2)
        codes = store.encode(*((k, v) if prompt.window is None else (newest(k), newest(v))), low.calib)
        filled = jnp.broadcast_to(jnp.minimum(encoded, places), rows)
        outside = jnp.where(pos < length - ring_size, pos, -1)  # of the ring
        outside = jnp.broadcast_to(outside[:, None], (*rows, n))
        low = tiers_.fill(tiers_.reserve(low, filled, n), Slots(codes[0], codes[1], outside), filled)
        if prompt.window is None:
            low = low._replace(length=jnp.broadcast_to(jnp.maximum(length - ring_size, 0), rows))
        else:
            low = low._replace(calib={"seen": jnp.broadcast_to(length, rows)})
        at = jnp.broadcast_to(latest(length, ring_size)[:, None], (*rows, ring_size))
        take = lambda x: jnp.take_along_axis(x, jnp.maximum(at, 0)[..., None], axis=2)
        decoded = store.key.decode(codes[0], k.dtype)
        decoded = jnp.take_along_axis(decoded, (jnp.maximum(at, 0) % places)[..., None], axis=2)
        keys = jnp.where((at < encoded[:, None])[..., None], decoded, take(k))
        place = jnp.broadcast_to(jnp.arange(ring_size), at.shape)
        ring = tiers_.reserve(ring, jnp.broadcast_to(jnp.minimum(length, ring_size), rows), ring_size)
        return (low, tiers_.put(ring, place, Slots(keys, take(v), at), at >= 0)), PrefillOutput()

    def _seen(low: Tier, ring: Tier) -> Int[Array, "*L B K"]:
        """Tokens that rows have been given."""
        return low.length + ring.length if isinstance(low.pos, tuple) else low.calib["seen"]

    def _places(low: Tier) -> int:
        """Slots of a ring of codes."""
        return max(low.capacity // size, 1) * size

    def reserve(tiers: Tiers, active: Bool[Array, " B"]) -> Tiers:
        """Also encodes complete runs, of all layers at once: within a layer, what others still read would be copied."""
        low, ring = tiers
        n = _seen(low, ring)
        due = active[:, None] & (n > 0) & (n % size == 0)
        low = tiers_.reserve(low, jnp.where(due, jnp.minimum(n, low.capacity), 0), size)
        ring = tiers_.reserve(ring, jnp.where(active[:, None], jnp.minimum(n + 1, ring_size), 0), 1)
        turns = jnp.where(jnp.any(due), n.shape[0], 0)  # a loop: a branch would copy the pools
        return jax.lax.fori_loop(0, turns, lambda i, tiers: _flush(tiers, i, due), (low, ring))

    def _flush(tiers: Tiers, index: Int[Array, ""], due: Bool[Array, "L B K"]) -> Tiers:
        """Encode the newest `size` tokens of one layer's rows."""
        low, ring = (tiers_.layer(tier, index) for tier in tiers)
        at = _seen(low, ring)[..., None] - size + jnp.arange(size)
        where = jnp.broadcast_to(due[index][..., None], at.shape)
        at = jnp.maximum(at, 0)
        newest = tiers_.take(ring, at % ring_size)
        codes = store.encode(newest.k, newest.v, low.calib)
        if isinstance(low.pos, tuple):
            written = tiers_.put(low, at, Slots(codes[0], codes[1]), where)._replace(length=low.length)
        else:
            hidden = Slots(codes[0], codes[1], jnp.full_like(at, -1))
            written = tiers_.put(low, at % _places(low), hidden, where)
        decoded = newest._replace(k=store.key.decode(codes[0], jnp.float32))
        changed = tiers_.put(ring, at % ring_size, decoded, where)
        return tiers_.with_layer(tiers[0], index, low, written), tiers_.with_layer(tiers[1], index, ring, changed)

    def insert(tiers: Tiers, token: Token) -> Tiers:
        low, ring = tiers
        active = jnp.broadcast_to(token.active[:, None], ring.length.shape)
        leaves = active & (ring.length == ring_size)
        if token.window is None:
            low = low._replace(length=jnp.where(leaves, low.length + 1, low.length))
        else:
            old = jnp.broadcast_to((token.pos - ring_size)[:, None, None], (*leaves.shape, 1))
            low = tiers_.place(low, jnp.maximum(old, 0) % _places(low), old, leaves[..., None])
            low = low._replace(calib={"seen": jnp.where(active, token.pos[:, None] + 1, low.calib["seen"])})
        pos = jnp.broadcast_to(token.pos[:, None, None], (*ring.length.shape, 1))
        slots = Slots(token.key[:, :, None], token.value[:, :, None], pos)
        return low, tiers_.put(ring, pos % ring_size, slots, active[..., None])

    return CachePolicy((store, KVStore()), init, prefill, insert, reserve=reserve, budget=everything())
