"""H2O: heavy hitters and recent tokens."""

from kvjax.cache.quantize import named
from kvjax.policies import score
from kvjax.policies.base import Recipe, cached
from kvjax.policies.budgets import budget as budgets
from kvjax.policies.budgets.budget import Keep
from kvjax.policies.budgets.split import split_over
from kvjax.policies.select import retain


@cached
def h2o(
    budget: Keep = "20%",
    *,
    recent: float = 0.5,
    split: str = "row",
    decode_budget: Keep = "",
    store: str = "dense",
) -> Recipe:
    """Keep the newest tokens and those that received the most attention so far; evict one per decoded token.

    Args:
      budget: slots per row, as a mean over those that compete, heavy hitters and recent tokens together.
      recent: share of a row's slots for the newest tokens.
      split: who competes for slots, "row", "layer", "global" or "profile": see
        `kvjax.policies.budgets.split.split_over`.
      decode_budget: slots per row while decoding, as a mean over rows; "" = the budget.
      store: number format of slots, a name of `kvjax.cache.quantize.named`.

    Source: Zhang et al., NeurIPS 2023 (arXiv 2306.14048); `h2o_hf/utils_real_drop/modify_llama.py`.
    Differs: see `kvjax.policies.score.accumulated`.
    Cost: one more query-key pass over the prompt; 8 bytes per slot.
    """
    given = budgets.amounts(budget, decode_budget)
    policy = retain(
        score.accumulated(recent), split_over(split), store=named(store), evict="after", bounded=given.bounded
    )
    return Recipe("h2o", policy, amounts=given)
