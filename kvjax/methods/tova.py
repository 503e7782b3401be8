"""TOVA: token omission via attention."""

from kvjax.cache.quantize import named
from kvjax.policies import score
from kvjax.policies.base import Recipe, cached
from kvjax.policies.budgets import budget as budgets
from kvjax.policies.budgets.budget import Keep
from kvjax.policies.budgets.split import split_over
from kvjax.policies.select import retain


@cached
def tova(budget: Keep = "20%", *, split: str = "row", decode_budget: Keep = "", store: str = "dense") -> Recipe:
    """Evict the token that the newest query attends to least, the same in all heads of a layer.

    Args:
      budget: slots per row, as a mean over those that compete.
      split: who competes for slots, "row", "layer", "global" or "profile": see
        `kvjax.policies.budgets.split.split_over`.
      decode_budget: slots per row while decoding, as a mean over rows; "" = the budget.
      store: number format of slots, a name of `kvjax.cache.quantize.named`.

    Source: Oren et al., EMNLP 2024 (arXiv 2401.06104); `src/tova_cache.py`. The newest token itself may be evicted.
    Differs: nothing known.
    Cost: 8 bytes per slot.
    """
    given = budgets.amounts(budget, decode_budget)
    policy = retain(score.last_row(), split_over(split), store=named(store), evict="after", bounded=given.bounded)
    return Recipe("tova", policy, amounts=given)
