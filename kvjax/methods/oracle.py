"""The oracle: what a method could reach that knew which tokens the next query will look at."""

import itertools

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kvjax.cache.quantize import named
from kvjax.policies import score
from kvjax.policies.base import Recipe, cached
from kvjax.policies.budgets import budget as budgets
from kvjax.policies.budgets.budget import Keep
from kvjax.policies.select import retain


@cached
def oracle(budget: Keep = "20%", *, store: str = "dense") -> Recipe:
    """Keep every token, but let each step attend only to those that full attention weighs most: it frees nothing.

    Args:
      budget: tokens that a step attends to in each row; a share is one of all tokens so far, in a layer with a sliding
        window of those in it.
      store: number format of slots, a name of `kvjax.cache.quantize.named`.

    Source: the upper bound of MiKV (arXiv 2402.18096).
    Differs: one set of tokens per key/value head, from the mean over its query heads.
    Cost: attention twice, and a sort of the row per step.
    """
    amount, keep, stored = budgets.parse_keep(budget), budgets.everything(), named(store)

    def select(probs: tuple[Float[Array, "B K G S"], ...], seen: Int[Array, " B"]) -> tuple[Bool[Array, "B K S"], ...]:
        weight = jnp.concatenate(probs, axis=-1).mean(axis=2)
        order = jnp.argsort(-weight, axis=-1)
        chosen = jnp.arange(weight.shape[-1]) < budgets.tokens_of(amount, seen)[:, None, None]
        slots = jnp.broadcast_to(chosen, weight.shape)
        attended = jnp.put_along_axis(jnp.zeros(weight.shape, bool), order, slots, axis=-1, inplace=False)
        ends = list(itertools.accumulate(part.shape[-1] for part in probs))
        return tuple(jnp.split(attended, ends[:-1], axis=-1))

    policy = retain(score.arrival(), keep, store=stored, evict="never")
    return Recipe("oracle", policy, select=select)
