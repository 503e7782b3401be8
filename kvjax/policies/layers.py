"""What a method is in each layer of a model."""

import functools

from kvjax.cache.store import dense
from kvjax.policies.base import Recipe
from kvjax.policies.rolling import rolling
from kvjax.spec import ModelSpec


@functools.lru_cache(maxsize=256)
def layer_recipe(spec: ModelSpec, recipe: Recipe, layer: int) -> Recipe:
    """What a method is in one of a model's layers: the same, but for layers with a sliding window.

    Those are kept whole, in the number format of the first tier, or compressed with a budget of their own: `Recipe`.
    """
    window = spec.window(layer)
    if window is None:
        return recipe
    if recipe.windowed == "whole":
        return Recipe(recipe.name, rolling(recipe.stores[0], window), kernels=recipe.kernels)
    policy = recipe.policy.windowed
    return recipe if policy is None else recipe._replace(policy=policy(window))


def rotates_at_read(spec: ModelSpec, recipe: Recipe) -> bool:
    """Whether keys are cached before rotation.

    In few bits those that have a bias are, without it: it is often far larger than what tokens differ by and would take
    all codes, and before rotation it is the same for all. A balance needs them rotated.
    """
    rounded = any(store.key != dense() for store in recipe.stores) and not any(s.balanced for s in recipe.stores)
    return recipe.rotate == "read" or spec.latent is not None or (spec.late_bias and rounded)
