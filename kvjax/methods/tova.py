"""TOVA: token omission via attention."""

from kvjax.cache import budget as budgets
from kvjax.cache import score
from kvjax.cache.budget import Keep
from kvjax.cache.policy import Recipe, cached
from kvjax.cache.retain import retain
from kvjax.cache.store import dense


@cached
def tova(budget: Keep = "20%", *, decode_budget: Keep = "") -> Recipe:
    """Evict the token that the newest query attends to least, the same in all heads of a layer.

    Args:
      budget: slots per row.
      decode_budget: slots per row while decoding, as a mean over rows; "" = the budget.

    Source: Oren et al., EMNLP 2024 (arXiv 2401.06104); `src/tova_cache.py`. The newest token itself may be evicted.
    Differs: nothing known.
    Cost: 8 bytes per slot.
    """
    keep = budgets.while_decoding(budgets.uniform(budget), budget, decode_budget)
    return Recipe("tova", retain(score.last_row(), keep, evict="after"), (dense(),), keep)
