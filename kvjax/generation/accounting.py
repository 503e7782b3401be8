"""What a cache holds: bytes, slots and positions, beside those of a full one."""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from kvjax.cache import layout
from kvjax.cache import tier as tiers_
from kvjax.cache.layout import Cache, Tiers
from kvjax.cache.tier import Bytes
from kvjax.generation.model import Model
from kvjax.generation.results import Compared
from kvjax.parallel import mesh as meshes
from kvjax.parallel.collectives import COPIES
from kvjax.policies.base import Recipe
from kvjax.policies.gate_capacity import CapacityState
from kvjax.spec import ModelSpec

HALF = 2  # bytes of a number that shares of the full cache count with, whatever a run computes in


def cache_bytes(cache: Cache, itemsize: int | None = None) -> Bytes:
    """Bytes of a cache by part, on all devices together, as allocated; `itemsize` as in `tier.nbytes`."""
    copies = meshes.shape_of(cache)[COPIES]
    parts = [
        tiers_.nbytes(tier, held, itemsize) for tiers in cache for tier, held in zip(tiers, _held(tiers), strict=True)
    ]
    return Bytes(*(copies * sum(column) for column in zip(*parts, strict=True)))


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


def compare(model: Model, cache: Cache, lengths: Sequence[int]) -> Compared:
    """A cache of sequences of these lengths [tokens] beside their full one."""
    full = full_bytes(model, lengths) * HALF // jnp.dtype(model.decoder.dtype).itemsize
    return Compared(cache_bytes(cache, HALF).total, full)


def _held(tiers: Tiers) -> list[np.ndarray]:
    """Slots of each tier that hold what is read from it, `[L B K]`; only several tiers may hold a token twice."""
    filled = [meshes.read(tier.length) for tier in tiers]
    if len(tiers) == 1 or not any(map(np.any, filled)):
        return filled
    return [meshes.read(layout.held(tier)) for tier in tiers]


def kept_slots(spec: ModelSpec, recipe: Recipe, cache: Cache) -> list[list[int | float]]:
    """Kept slots `[B][L]`, averaged over heads; whole numbers where the heads agree."""
    layers: list[np.ndarray] = [np.zeros(0)] * spec.num_layers
    for group, tiers in zip(layout.layer_groups(spec), cache, strict=True):
        kept = functools.reduce(np.add, _held(tiers)).mean(axis=-1)  # l B
        for place, layer in enumerate(group.index):
            layers[layer] = kept[place]
    return [[int(x) if x == int(x) else float(x) for x in row] for row in np.stack(layers, axis=1)]


def forced(cache: Cache) -> int:
    """Tokens that asked a gate for a slot in vain, over all rows of a cache; 0 where no model asks."""
    states = [tier.state for tiers in cache for tier in tiers if isinstance(tier.state, CapacityState)]
    return sum(int(jnp.sum(state.forced)) for state in states)
