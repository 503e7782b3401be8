"""SnapKV: what the end of the prompt looks at."""

from typing import Literal

from kvjax.cache.quantize import named
from kvjax.policies import score
from kvjax.policies.base import Recipe, cached
from kvjax.policies.budgets import budget as budgets
from kvjax.policies.budgets.budget import Keep
from kvjax.policies.budgets.split import split_over
from kvjax.policies.select import retain


@cached
def snapkv(
    budget: Keep = "20%",
    *,
    window: int = 32,
    kernel: int = 5,
    pooling: Literal["avg", "max"] = "avg",
    split: str = "row",
    decode_budget: Keep = "",
    store: str = "dense",
) -> Recipe:
    """Keep the last `window` prompt tokens and those that they attend to most; generated tokens are appended.

    Args:
      budget: prompt tokens kept per row, the window included.
      window: queries at the end of the prompt that vote [tokens].
      kernel: neighbours over which votes are pooled, odd [tokens].
      pooling: "avg" (library default) or "max" (the paper's LongBench runs, with kernel 7).
      split: who competes for slots, "row", "layer", "global" or "profile": see
        `kvjax.policies.budgets.split.split_over`.
      decode_budget: slots per row while decoding, as a mean over rows; "" = unbounded.
      store: number format of slots, a name of `kvjax.cache.quantize.named`.

    Source: Li et al., NeurIPS 2024 (arXiv 2404.14469); `snapkv/monkeypatch/snapkv_utils.py`.
    Differs: see `kvjax.policies.score.window`.
    Cost: `window` rows of attention at prefill.
    """
    given = budgets.amounts(budget, decode_budget)
    votes = score.window(window, kernel, pooling, decoding=given.bounded)
    policy = retain(votes, split_over(split), store=named(store), evict="never", bounded=given.bounded)
    return Recipe("snapkv", policy, amounts=given)
