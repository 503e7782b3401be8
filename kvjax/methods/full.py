"""The full cache: what every method is compared with."""

import functools

from kvjax.cache import budget as budgets
from kvjax.cache import score
from kvjax.cache.policy import Recipe, cached
from kvjax.cache.quantize import named
from kvjax.cache.residual import residual
from kvjax.cache.retain import retain
from kvjax.cache.rolling import rolling


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
