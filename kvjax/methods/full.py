"""The full cache: what every method is compared with."""

import functools

from kvjax.cache.quantize import named
from kvjax.policies import score
from kvjax.policies.base import Recipe, cached
from kvjax.policies.budgets import budget as budgets
from kvjax.policies.residual import residual
from kvjax.policies.rolling import rolling
from kvjax.policies.select import retain


@cached
def full(*, store: str = "dense") -> Recipe:
    """Keep every token, in any number format: uniform quantisation and KIVI too.

    Args:
      store: number format of slots, a name of `kvjax.cache.quantize.named`.

    Source: the definition of attention with a cache; see the stores for theirs.
    Differs: nothing known.
    Cost: the whole cache is read at every step.
    """
    stored = named(store)
    if stored.residual:
        return Recipe("full", residual(stored)._replace(windowed=functools.partial(rolling, stored)))
    return Recipe("full", retain(score.arrival(), budgets.everything(), store=stored, evict="never"))
