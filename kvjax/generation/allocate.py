"""An empty cache, for the lengths of a batch."""

import functools

import jax
from jax.typing import DTypeLike

from kvjax.cache import sharding
from kvjax.cache.layout import Cache, layer_groups
from kvjax.cache.tier import PER_ROW
from kvjax.errors import InputError, say_once
from kvjax.generation.checks import check_frequencies
from kvjax.models.decoder import Decoder
from kvjax.parallel import mesh
from kvjax.parallel.collectives import DATA, own
from kvjax.policies.base import Recipe
from kvjax.policies.layers import layer_recipe, rotates_at_read
from kvjax.spec import Lengths, ModelSpec


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
    devices, init = mesh.of(model), functools.partial(_init, model.spec, recipe)
    if devices is None:
        return init(lengths, model.dtype)
    lengths = lengths._replace(parts=devices.shape[DATA])
    if len(lengths.prompt) % lengths.parts:
        raise InputError(f"{len(lengths.prompt)} sequences cannot be split over data={lengths.parts} devices")
    with mesh.on(devices):
        return _init_parts(model.spec, recipe, lengths, model.dtype)


def _init(spec: ModelSpec, recipe: Recipe, lengths: Lengths, dtype: DTypeLike) -> Cache:
    groups = layer_groups(spec)
    policies = [layer_recipe(spec, recipe, group.index[0]).policy for group in groups]
    return tuple(p.init(spec, g, lengths, dtype, recipe.amounts) for p, g in zip(policies, groups, strict=True))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _init_parts(spec: ModelSpec, recipe: Recipe, lengths: Lengths, dtype: DTypeLike) -> Cache:
    """Every device's own pool, and its rows."""

    def init() -> Cache:
        mine = lambda tree: jax.tree.map(lambda x: own(x, 1, DATA), tree)
        rows = lambda t: {name: mine(getattr(t, name)) for name in PER_ROW}
        cache = _init(mesh.share(spec), recipe, lengths, dtype)
        return tuple(tuple(tier._replace(**rows(tier)) for tier in tiers) for tiers in cache)

    specs = sharding.cache(jax.eval_shape(functools.partial(_init, spec, recipe, lengths, dtype)))
    devices = jax.sharding.get_abstract_mesh()
    return jax.shard_map(init, mesh=devices, in_specs=(), out_specs=specs, check_vma=False)()
