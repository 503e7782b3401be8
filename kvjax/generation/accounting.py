"""What a cache holds: bytes and slots, beside those of a full one."""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from kvjax.cache import layout
from kvjax.cache import tier as tiers_
from kvjax.cache.layout import Cache
from kvjax.cache.tier import Bytes
from kvjax.generation.model import Model
from kvjax.generation.results import Compared, Footprint
from kvjax.parallel import mesh as meshes
from kvjax.parallel.collectives import COPIES
from kvjax.policies.gate_capacity import CapacityState
from kvjax.spec import ModelSpec

HALF = 2  # bytes of a number that shares of the full cache count with, whatever a run computes in


def footprint(model: Model, cache: Cache, lengths: Sequence[int]) -> Footprint:
    """What a cache takes and keeps, beside the full one of sequences of these lengths [tokens]."""
    spec, whole = model.spec, full_bytes(model, lengths)
    sizes: list[Bytes] = []
    halved: list[int] = []
    kept: list[np.ndarray] = [np.zeros(0)] * spec.num_layers
    for group, tiers in zip(layout.layer_groups(spec), cache, strict=True):
        held = [meshes.read(tier.length) for tier in tiers]
        if len(tiers) > 1 and any(map(np.any, held)):  # only several tiers may hold a token twice
            held = [meshes.read(layout.held(tier)) for tier in tiers]
        sizes += map(tiers_.nbytes, tiers, held)
        halved += [tiers_.nbytes(tier, filled, HALF).total for tier, filled in zip(tiers, held, strict=True)]
        for layer, row in zip(group.index, functools.reduce(np.add, held).mean(axis=-1), strict=True):
            kept[layer] = row
    copies = meshes.shape_of(cache)[COPIES]
    size = Bytes(*(copies * sum(column) for column in zip(*sizes, strict=True)))
    compared = Compared(copies * sum(halved), whole * HALF // jnp.dtype(model.decoder.dtype).itemsize)
    number = lambda x: int(x) if x == int(x) else float(x)  # whole numbers where the heads agree
    return Footprint(size, whole, compared, [list(map(number, row)) for row in np.stack(kept, axis=1)])


def full_bytes(model: Model, lengths: Sequence[int]) -> int:
    """Bytes that a full cache needs for sequences of these lengths [tokens], in the model's dtype.

    A layer with a sliding window needs no more tokens than the window.
    """
    spec, itemsize = model.spec, jnp.dtype(model.decoder.dtype).itemsize
    tokens = sum(sum(full_slots(spec, n)) for n in lengths)
    return 2 * spec.num_kv_heads * spec.head_dim * itemsize * tokens


def full_slots(spec: ModelSpec, length: int) -> list[int]:
    """Slots of a row in each layer that a full cache fills with so many tokens; no more than a sliding window reads."""
    return [min(length, spec.window(i) or length) for i in range(spec.num_layers)]


def forced(cache: Cache) -> int:
    """Tokens that asked a gate for a slot in vain, over all rows of a cache; 0 where no model asks."""
    states = [tier.state for tiers in cache for tier in tiers if isinstance(tier.state, CapacityState)]
    return sum(int(jnp.sum(state.forced)) for state in states)
