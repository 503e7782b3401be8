"""The full cache: what every method is compared with."""

import functools

from kvjax.cache import budget as budgets
from kvjax.cache import score
from kvjax.cache.policy import Recipe, retain
from kvjax.cache.store import dense


@functools.cache
def full() -> Recipe:
    """Keep every token.

    Cost: the whole cache is read at every step.
    """
    keep = budgets.everything()
    return Recipe("full", retain(score.arrival(), keep, evict="never"), (dense(),), keep)
