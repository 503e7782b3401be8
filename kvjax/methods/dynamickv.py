"""DynamicKV: slots go to the layers in which the end of the prompt looks back."""

from typing import Literal

from kvjax.cache.quantize import named
from kvjax.policies import score
from kvjax.policies.base import Recipe, cached
from kvjax.policies.budgets.allocation import from_scores
from kvjax.policies.budgets.budget import Keep, amounts
from kvjax.policies.select import retain


@cached
def dynamickv(
    budget: Keep = "20%",
    *,
    window: int = 8,
    kernel: int = 7,
    pooling: Literal["avg", "max"] = "avg",
    r_max: float = 10.0,
    update_interval: int = 4,
    regrow: bool = True,
    floor: float = 0.0,
    ada: bool = False,
    decode_budget: Keep = "",
    store: str = "dense",
) -> Recipe:
    """SnapKV's choice of tokens under one threshold for all layers; generated tokens are appended.

    Args:
      budget: prompt tokens kept per row, averaged over layers, the window included.
      window, kernel, pooling: as in `snapkv`; "avg" for Llama-3, "max" for Mistral and Qwen2 in the released scripts.
      r_max, update_interval, regrow, floor, ada: as in `kvjax.policies.budgets.allocation.from_scores`.
      decode_budget: slots per row while decoding, as a mean over rows; "" = unbounded.
      store: number format of slots, a name of `kvjax.cache.quantize.named`.

    Source: Zhou et al., EMNLP 2025 (arXiv 2412.14838); DreamMr/DynamicKV `methods/dynamic_v11.py`.
    Differs: see `from_scores` and `kvjax.policies.score.window`.
    Cost: `window` rows of attention at prefill; up to `update_interval` layers hold `r_max` times their share until the
      next update.
    """
    keep = from_scores(r_max=r_max, update_interval=update_interval, regrow=regrow, floor=floor, ada=ada)
    given = amounts(budget, decode_budget)
    votes = score.window(window, kernel, pooling, decoding=given.bounded)
    policy = retain(votes, keep, store=named(store), evict="never", bounded=given.bounded)
    return Recipe("dynamickv", policy, amounts=given)
