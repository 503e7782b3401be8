"""Ada-KV: SnapKV with more slots for heads that look at more places."""

from typing import Literal

from kvjax.cache.quantize import named
from kvjax.policies import score
from kvjax.policies.base import Recipe, cached
from kvjax.policies.budgets import budget as budgets
from kvjax.policies.budgets.allocation import ADA_FLOOR, per_head
from kvjax.policies.budgets.budget import Keep
from kvjax.policies.select import retain


@cached
def adakv(
    budget: Keep = "20%",
    *,
    window: int = 32,
    kernel: int = 7,
    pooling: Literal["avg", "max"] = "max",
    floor: float = ADA_FLOOR,
    decode_budget: Keep = "",
    store: str = "dense",
) -> Recipe:
    """SnapKV's choice of tokens under one threshold for all heads of a layer; generated tokens are appended.

    Args:
      budget: prompt tokens kept per row, averaged over the heads of a layer, the window included.
      window, kernel, pooling: as in `snapkv`.
      floor: what part of the slots all heads share evenly, the safeguard.
      decode_budget: slots per row while decoding, as a mean over rows; "" = unbounded.
      store: number format of slots, a name of `kvjax.cache.quantize.named`.

    Source: Feng et al., NeurIPS 2025 (arXiv 2407.11550); FFY0/AdaKV `adaptive_snapkv`.
    Differs: see `kvjax.policies.budgets.allocation.per_head` and `kvjax.policies.score.window`.
    Cost: `window` rows of attention at prefill.
    """
    keep = per_head(budgets.uniform(), floor)
    given = budgets.amounts(budget, decode_budget)
    votes = score.window(window, kernel, pooling, decoding=given.bounded)
    policy = retain(votes, keep, store=named(store), evict="never", bounded=given.bounded)
    return Recipe("adakv", policy, amounts=given)
