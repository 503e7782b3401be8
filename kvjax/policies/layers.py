"""What a method is in each layer of a model."""

import functools

from kvjax.cache.store import dense
from kvjax.policies import score
from kvjax.policies.base import Recipe
from kvjax.policies.budgets.budget import Amounts, everything
from kvjax.policies.rolling import rolling
from kvjax.policies.select import retain
from kvjax.spec import ModelSpec


@functools.lru_cache(maxsize=256)
def layer_recipe(spec: ModelSpec, recipe: Recipe, layer: int) -> Recipe:
    """What a method is in one of a model's layers: the same, but for layers with a sliding window.

    Those are kept whole, in the number format of the first tier, or compressed with a budget of their own: `Recipe`.
    """
    window = spec.window(layer)
    if window is None:
        return recipe
    context = recipe.context and layer_recipe(spec, recipe.context, layer)
    if recipe.windowed == "whole":
        policy = rolling(recipe.stores[0], window)
        return Recipe(recipe.name, policy, kernels=recipe.kernels, replay=recipe.replay, context=context)
    policy = recipe.policy.windowed
    return recipe._replace(policy=recipe.policy if policy is None else policy(window), context=context)


@functools.cache
def asking(recipe: Recipe) -> Recipe:
    """How questions to what a method has cached are cached themselves: whole, beside it, in its first number format."""
    # Not by arrival: a slot's number is not its position, since others came before.
    policy = retain(score.recency(0), everything(), store=recipe.stores[0].one_by_one, evict="never")
    return recipe._replace(policy=policy, amounts=Amounts(), replay=None, context=recipe.structure)


def rotates_at_read(spec: ModelSpec, recipe: Recipe) -> bool:
    """Whether keys are cached before rotation.

    In few bits those that have a bias are, without it: it is often far larger than what tokens differ by and would take
    all codes, and before rotation it is the same for all. A balance needs them rotated.
    """
    recipe = recipe.context or recipe  # what is read together is rotated together
    rounded = any(store.key != dense for store in recipe.stores) and not any(s.balanced for s in recipe.stores)
    return recipe.rotate == "read" or spec.latent is not None or (spec.late_bias and rounded)
