"""The policy of stores that encode runs of tokens: all tokens are kept, the newest as they are until a run is complete.

Two tiers. The first holds codes, slot s for position s. The second is a ring of the newest tokens, slot s for positions
s, s + ring, ...: values leave it one by one, keys a run at a time. Attention needs both of a token in one tier, so it
reads a token from the ring as long as its value is there; when keys are encoded, the ring takes over the decoded ones.
What is computed is the same as if keys and values were read from different places.
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
from kvjax.cache.budget import everything
from kvjax.cache.policy import CachePolicy, Found, Layers, Tiers
from kvjax.cache.store import KVStore
from kvjax.cache.tier import Slots
from kvjax.spec import Lengths, ModelSpec, Prompt, Token

LADDER = (8, 64)  # as of the full cache


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

    def init(spec: ModelSpec, layers: Layers, lengths: Lengths, dtype: DTypeLike) -> Tiers:
        shape = {"layers": len(layers.index), "batch": len(lengths.prompt), "heads": spec.num_rows}
        rows = np.asarray(lengths.prompt) + lengths.new
        row = pages.ladder(int(rows.max()), *LADDER)
        page = max(pages.page_size(row, lengths.platform), group)
        held = shape["layers"] * shape["heads"] * lengths.most(-(-rows // page))
        sized = functools.partial(tiers_.init, **shape, widths=layers.widths, dtype=dtype)
        low = sized(row=row, page=page, slots=pages.ladder(held * page, *LADDER), store=store, positions=False)
        row = min(ring_size, row)
        page = pages.page_size(row, lengths.platform)
        slots = math.prod(shape.values()) // lengths.parts * -(-row // page) * page
        return low, sized(row=row, page=page, slots=slots, store=KVStore())

    def prefill(tiers: Tiers, prompt: Prompt) -> tuple[Tiers, Found]:
        low, ring = tiers
        rows, length = low.length.shape, prompt.length[:, None]
        pad = ((0, 0), (0, 0), (0, -prompt.key.shape[1] % group), (0, 0))
        k, v = (jnp.pad(jnp.moveaxis(x, 2, 1), pad) for x in (prompt.key, prompt.value))
        codes = store.encode(k, v, low.calib)
        encoded = jnp.broadcast_to(jnp.maximum(length - 1, 0) // size * size, rows)  # `reserve` does what is just due
        low = tiers_.fill(tiers_.reserve(low, encoded, k.shape[2]), Slots(codes[0], codes[1]), encoded)
        low = low._replace(length=jnp.broadcast_to(jnp.maximum(length - ring_size, 0), rows))
        # The newest token of each place of the ring.
        pos = length - length % ring_size + jnp.arange(ring_size)
        pos = pos - jnp.where(pos >= length, ring_size, 0)
        at = jnp.broadcast_to(pos[:, None], (*rows, ring_size))
        take = lambda x: jnp.take_along_axis(x, jnp.maximum(at, 0)[..., None], axis=2)
        keys = jnp.where((at < encoded[..., None])[..., None], take(store.key.decode(codes[0], k.dtype)), take(k))
        place = jnp.broadcast_to(jnp.arange(ring_size), at.shape)
        ring = tiers_.reserve(ring, jnp.broadcast_to(jnp.minimum(length, ring_size), rows), ring_size)
        return (low, tiers_.put(ring, place, Slots(keys, take(v), at), at >= 0)), Found()

    def reserve(tiers: Tiers, active: Bool[Array, " B"]) -> Tiers:
        """Also encodes complete runs, of all layers at once: within a layer, what others still read would be copied."""
        low, ring = tiers
        n = low.length + ring.length
        due = active[:, None] & (n > 0) & (n % size == 0)
        low = tiers_.reserve(low, jnp.where(due, n, 0), size)
        ring = tiers_.reserve(ring, jnp.where(active[:, None], jnp.minimum(n + 1, ring_size), 0), 1)
        turns = jnp.where(jnp.any(due), n.shape[0], 0)  # a loop: a branch would copy the pools
        return jax.lax.fori_loop(0, turns, lambda i, tiers: _flush(tiers, i, due), (low, ring))

    def _flush(tiers: Tiers, index: Int[Array, ""], due: Bool[Array, "L B K"]) -> Tiers:
        """Encode the newest `size` tokens of one layer's rows."""
        low, ring = (tiers_.layer(tier, index) for tier in tiers)
        at = (low.length + ring.length)[..., None] - size + jnp.arange(size)
        where = jnp.broadcast_to(due[index][..., None], at.shape)
        at = jnp.maximum(at, 0)
        newest = tiers_.take(ring, at % ring_size)
        codes = store.encode(newest.k, newest.v, low.calib)
        written = tiers_.put(low, at, Slots(codes[0], codes[1]), where)._replace(length=low.length)
        decoded = newest._replace(k=store.key.decode(codes[0], jnp.float32))
        changed = tiers_.put(ring, at % ring_size, decoded, where)
        return tiers_.with_layer(tiers[0], index, low, written), tiers_.with_layer(tiers[1], index, ring, changed)

    def insert(tiers: Tiers, token: Token) -> Tiers:
        low, ring = tiers
        active = jnp.broadcast_to(token.active[:, None], ring.length.shape)
        low = low._replace(length=jnp.where(active & (ring.length == ring_size), low.length + 1, low.length))
        pos = jnp.broadcast_to(token.pos[:, None, None], (*ring.length.shape, 1))
        slots = Slots(token.key[:, :, None], token.value[:, :, None], pos)
        return low, tiers_.put(ring, pos % ring_size, slots, active[..., None])

    return CachePolicy((store, KVStore()), init, prefill, insert, reserve=reserve, budget=everything())
