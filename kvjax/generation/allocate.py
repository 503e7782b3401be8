"""Slots: an empty cache for the lengths of a batch, and which layers have them once a prompt tells."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Int

from kvjax.cache import sharding
from kvjax.cache import tier as tiers_
from kvjax.cache.layout import Cache, Layers, Tiers, layer_groups, layers_with
from kvjax.cache.pages import LARGEST
from kvjax.cache.tier import PER_ROW, Tier
from kvjax.errors import InputError, say_once
from kvjax.generation.checks import check_frequencies
from kvjax.models.decoder import Decoder
from kvjax.parallel import mesh
from kvjax.parallel.collectives import DATA, own
from kvjax.parallel.mesh import EVERYWHERE, LAYERS, ROWS
from kvjax.policies.base import PrefillOutput, Recipe
from kvjax.policies.layers import layer_recipe, rotates_at_read
from kvjax.spec import Lengths, ModelSpec, PyTree, readable


def init_cache(model: Decoder, recipe: Recipe, lengths: Lengths) -> Cache:
    """Allocate an empty cache for a batch of prompts.

    Args:
      model: the decoder.
      recipe: the method.
      lengths: tokens of each prompt, and how many may be generated.

    Raises:
      InputError: the method cannot keep this model's vectors, or a sequence may outgrow the frequencies of its keys.
    """
    for prompt in lengths.prompt:
        check_frequencies(model.spec, recipe, prompt, prompt + lengths.new - 1)
    return allocate(model, recipe, lengths)


def allocate(model: Decoder, recipe: Recipe, lengths: Lengths) -> Cache:
    """`init_cache` for sequences of which each is known to end before it outgrows the frequencies of its keys."""
    parts = [layer_recipe(model.spec, recipe, group.index[0]) for group in layer_groups(model.spec)]
    if any(rotates_at_read(model.spec, part) and any(s.balanced for s in part.stores) for part in parts):
        raise InputError(
            f"{recipe.name}: balanced keys are undone in the query, so they must be rotated when they are written"
            + (", which latents are not: set balance=false" if model.spec.latent else "")
        )
    if recipe.policy.prompt_hooks.rewrite is not None and recipe.windowed == "whole" and model.spec.windows:
        raise InputError(f"{recipe.name}: the model decides in layers with a sliding window, too: omit windowed=whole")
    if recipe.policy.prompt_hooks.rewrite is not None and model.spec.latent is not None:
        raise InputError(f"{recipe.name}: low-rank keys cannot be merged or evicted by a gate of each head")
    if sum(part.budget is not None and part.budget.needs_one_pool for part in parts) > 1:
        raise InputError(
            f"{recipe.name}: full layers need others of equal ranks and windows: convert with rule=uniform, or set"
            " windowed=whole"
        )
    if recipe.budget is not None and recipe.budget.by_head and model.spec.latent and model.spec.num_rows == 1:
        say_once(
            f"{recipe.name}: all heads of a layer share a latent, so they keep equally many tokens: "
            "for budgets of their own convert with --lorc-groups 1"
        )
    devices, init = mesh.of(model), functools.partial(_empty, model.spec, recipe)
    if devices is None:
        return init(lengths, model.dtype)
    lengths = lengths._replace(parts=devices.shape[DATA])
    if len(lengths.prompt) % lengths.parts:
        raise InputError(f"{len(lengths.prompt)} sequences cannot be split over data={lengths.parts} devices")
    with mesh.on(devices):
        return _empty_parts(model.spec, recipe, lengths, model.dtype)


def _empty(spec: ModelSpec, recipe: Recipe, lengths: Lengths, dtype: DTypeLike) -> Cache:
    groups = layer_groups(spec)
    policies = [layer_recipe(spec, recipe, group.index[0]).policy for group in groups]
    return tuple(p.init(spec, g, lengths, dtype, recipe.amounts) for p, g in zip(policies, groups, strict=True))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty_parts(spec: ModelSpec, recipe: Recipe, lengths: Lengths, dtype: DTypeLike) -> Cache:
    """Every device's own pool, and its rows."""

    def init() -> Cache:
        mine = lambda tree: jax.tree.map(lambda x: own(x, 1, DATA), tree)
        rows = lambda t: {name: mine(getattr(t, name)) for name in PER_ROW}
        cache = _empty(mesh.share(spec), recipe, lengths, dtype)
        return tuple(tuple(tier._replace(**rows(tier)) for tier in tiers) for tiers in cache)

    specs = sharding.cache(jax.eval_shape(functools.partial(_empty, spec, recipe, lengths, dtype)))
    devices = jax.sharding.get_abstract_mesh()
    return jax.shard_map(init, mesh=devices, in_specs=(), out_specs=specs, check_vma=False)()


def allocations_of(
    spec: ModelSpec, recipe: Recipe, groups: Sequence[Layers], length: Int[Array, " B"], cache: Cache
) -> dict[int | None, "Allocation"]:
    """One for the layers of each sliding window, None for those without one, whose budget is decided after them."""
    found = {}
    for window in dict.fromkeys(group.window for group in groups):
        index, own = layers_with(spec, window), [group for group in groups if group.window == window]
        places = {group: g for g, group in enumerate(groups)}
        part = layer_recipe(spec, recipe, index[0])
        if part.budget is None or part.budget.allocate is None:
            continue
        found[window] = Allocation(
            index, part, {places[group]: group for group in own}, readable(length, window), cache[places[own[0]]][0]
        )
    return found


class Allocation:
    """Distributes slots over layers while the layers of a prompt are run; over layers that share a pool of pages.

    Args:
      index: the layers that share a budget.
      recipe: the method, as it is in these layers.
      groups: the groups of the cache that they make.
      length: tokens that a layer can read of each prompt.
      tier: the first one of these layers, which says how many slots each has as a mean.
    """

    def __init__(self, index: Sequence[int], recipe: Recipe, groups: dict[int, Layers], length: Array, tier: Tier):
        self._index, self._recipe, self._groups, self._length = index, recipe, groups, length
        self._slots, rows = tier.budget[0, :, 0], tier.length.shape[1:]
        self._infos: dict[int, PyTree] = {}
        self._waiting: dict[int, PyTree] = {}
        self._held = jnp.full((1 + max(index), *rows), LARGEST, jnp.int32)

    def after(self, cache: list[Tiers], found: PrefillOutput) -> list[Tiers]:
        """The cache after one more layer: with the slots redistributed, when the budget wants that now."""
        budget, done = self._recipe.budget, len(self._infos) + 1
        assert budget is not None
        newest = self._index[done - 1]
        self._infos[newest] = found.stats
        self._waiting[newest] = found.pending
        if done < len(self._index) and (budget.update_interval is None or done % budget.update_interval):
            return cache
        unseen = jax.tree.map(jnp.zeros_like, found.stats)  # with it, all updates are one program
        for g, group in self._groups.items():
            if not self._waiting.keys().isdisjoint(group.index):
                infos = [self._infos.get(layer, unseen) for layer in group.index]
                seen = jnp.asarray(sum(layer <= newest for layer in group.index), jnp.int32)
                index = jnp.asarray(group.index, jnp.int32)
                slots = _run_allocate(infos, seen, self._length, self._held[index], self._slots, recipe=self._recipe)
                cache[g] = _trim(cache[g], slots, self._held[index])
                self._held = self._held.at[index].set(slots)
        if self._recipe.policy.prompt_hooks.write_selected is not None:
            for index, waiting in self._waiting.items():
                group = next(g for g, group in self._groups.items() if index in group.index)
                where = jnp.asarray(self._groups[group].index.index(index), jnp.int32)
                cache[group] = _write_selected(cache[group], waiting, where, self._held[index], recipe=self._recipe)
        self._waiting.clear()
        return cache


@functools.partial(jax.jit, static_argnames=("recipe",))
def _run_allocate(
    infos: list[PyTree],
    seen: Int[Array, ""],
    length: Int[Array, " B"],
    held: Int[Array, "L B K"],
    slots: Int[Array, " B"],
    *,
    recipe: Recipe,
) -> Int[Array, "L B K"]:
    assert recipe.budget is not None and recipe.budget.allocate is not None
    return recipe.budget.allocate(infos, seen, length, held, slots)


@mesh.program((sharding.cache, LAYERS, LAYERS), lambda tiers, *_: tiers, donate=(0,))
def _trim(tiers: Tiers, slots: Int[Array, "l B K"], held: Int[Array, "l B K"]) -> Tiers:
    """Trim the first tier's rows to their slots, of the `held` ones; other tiers hold what the first one gave up."""
    tier, *rest = tiers
    more = jnp.where(held < LARGEST, tier.budget - held, 0)  # slots that rows have for new tokens
    budget = jnp.where(slots < LARGEST, slots + more, tier.budget)
    return (tiers_.trim(tier._replace(budget=budget), slots), *rest)


@mesh.program((sharding.cache, ROWS, EVERYWHERE, ROWS), lambda tiers, *_: tiers, static=("recipe",), donate=(0,))
def _write_selected(
    tiers: Tiers, waiting: PyTree, place: Int[Array, ""], slots: Int[Array, "B K"], *, recipe: Recipe
) -> Tiers:
    """Fill a layer's rows with what has waited for their slots."""
    write = recipe.policy.prompt_hooks.write_selected
    assert write is not None
    olds = tuple(tiers_.layer(t, place) for t in tiers)
    views = write(olds, waiting, slots, recipe.kernels)
    return tuple(tiers_.with_layer(t, place, old, new) for t, old, new in zip(tiers, olds, views, strict=True))
