"""The full cache: what every method is compared with."""

from kvjax.cache import budget as budgets
from kvjax.cache import score
from kvjax.cache.policy import Recipe, cached
from kvjax.cache.retain import retain
from kvjax.cache.store import dense


@cached
def full() -> Recipe:
    """Keep every token.

    Source: the definition of attention with a cache; nothing differs.
    Cost: the whole cache is read at every step.
    """
    keep = budgets.everything()
    return Recipe("full", retain(score.arrival(), keep, evict="never"), (dense(),), keep)
