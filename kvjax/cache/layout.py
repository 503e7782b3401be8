"""How a model's cache is laid out: which layers share a pool, and which positions its slots hold."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

from jax import Array
from jaxtyping import Int

from kvjax.cache import sharding
from kvjax.cache import tier as tiers_
from kvjax.cache.tier import Tier
from kvjax.parallel import mesh
from kvjax.parallel.mesh import EVERYWHERE, LAYERS, ROWS
from kvjax.spec import ModelSpec

Tiers = tuple[Tier, ...]  # one per number format
Cache = tuple[Tiers, ...]  # one per group of `layer_groups`


class Layers(NamedTuple):
    """Layers that share their tiers: they have equal cached widths and sliding windows; hashable."""

    index: tuple[int, ...]
    widths: tuple[int, int]  # of cached keys and values
    window: int | None  # sliding window [tokens]
    places: tuple[int, ...]  # of each among all layers with this window, which share a budget
    peers: int  # how many those are


@functools.lru_cache(maxsize=256)
def layer_groups(spec: ModelSpec) -> tuple[Layers, ...]:
    """Layers by the widths of their cached vectors and their sliding windows; each group has a page pool of its own."""
    groups: dict[tuple[tuple[int, int], int | None], list[int]] = {}
    for layer in range(spec.num_layers):
        groups.setdefault((spec.widths(layer), spec.window(layer)), []).append(layer)
    found = []
    for (widths, window), index in groups.items():
        peers = layers_with(spec, window)
        found.append(Layers(tuple(index), widths, window, tuple(peers.index(i) for i in index), len(peers)))
    return tuple(found)


def layers_with(spec: ModelSpec, window: int | None) -> tuple[int, ...]:
    """The layers that have this sliding window, None = that have none: a budget is shared by them."""
    return tuple(i for i in range(spec.num_layers) if spec.window(i) == window)


@functools.lru_cache(maxsize=256)
def layer_runs(spec: ModelSpec) -> tuple[tuple[int, ...], ...]:
    """The layers in order, those that follow each other in one group and turn alike together.

    >>> from kvjax.models.named import NAMED
    >>> import dataclasses
    >>> gemma = dataclasses.replace(NAMED["llama-3.2-1b"], num_layers=8, windows=(512, 512, 512, None) * 2)
    >>> layer_runs(gemma)
    ((0, 1, 2), (3,), (4, 5, 6), (7,))
    """
    runs: list[list[int]] = []
    kind = lambda layer: (locate(layer_groups(spec), layer)[0], spec.rotary(layer))
    for layer in range(spec.num_layers):
        last = runs[-1][0] if runs else None
        if last is not None and kind(last) == kind(layer):
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return tuple(map(tuple, runs))


def locate(groups: Sequence[Layers], layer: int) -> tuple[int, int]:
    """Group of a layer, and its index there."""
    return next((g, group.index.index(layer)) for g, group in enumerate(groups) if layer in group.index)


@mesh.program((sharding.cache, EVERYWHERE), lambda *_: ROWS)
def positions(tier: Tier, place: Int[Array, ""] | int) -> Int[Array, "B K S"]:
    """Position of every slot of one of the tier's layers, -1 where it is empty."""
    return tiers_.positions(tiers_.layer(tier, place))


@mesh.program((sharding.cache,), lambda *_: LAYERS)
def held(tier: Tier) -> Int[Array, "L B K"]:
    """`tier.held` on the mesh that a cache lies on."""
    return tiers_.held(tier)
