"""PyramidKV: SnapKV with more slots in lower layers."""

from typing import Literal

from kvjax.cache.pages import LARGEST
from kvjax.cache.quantize import named
from kvjax.errors import InputError
from kvjax.policies import score
from kvjax.policies.base import Recipe, cached
from kvjax.policies.budgets import budget as budgets
from kvjax.policies.budgets.allocation import ADA_FLOOR, per_head
from kvjax.policies.budgets.budget import Keep
from kvjax.policies.select import retain


@cached
def pyramidkv(
    budget: Keep = "20%",
    *,
    window: int = 8,
    kernel: int = 7,
    pooling: Literal["avg", "max"] = "max",
    beta: int = 20,
    split: Literal["row", "layer"] = "row",
    decode_budget: Keep = "",
    store: str = "dense",
) -> Recipe:
    """SnapKV's choice of tokens under a budget that falls linearly with depth; generated tokens are appended.

    Args:
      budget: prompt tokens kept per row, averaged over layers, the window included.
      window, kernel, pooling: as in `snapkv`.
      beta: the last layer keeps 1/beta of the average besides the window.
      split: "row", as many slots in each head of a layer; "layer", its heads compete for them as in `adakv`.
      decode_budget: slots per row while decoding, as a mean over rows; "" = unbounded.
      store: number format of slots, a name of `kvjax.cache.quantize.named`.

    Source: Cai et al., 2024 (arXiv 2406.02069); KVCache-Factory `pyramidkv/pyramidkv_utils.py` and `run_longbench.py`.
    Differs: see `kvjax.policies.budgets.budget.pyramid` and `kvjax.policies.score.window`.
    Cost: `window` rows of attention at prefill.
    """
    if not 1 <= beta <= LARGEST:
        raise InputError(f"beta={beta} is not between 1 and {LARGEST}")
    if split not in ("row", "layer"):
        raise InputError(f"pyramidkv: split={split!r} is not 'row' or 'layer': the pyramid says what layers get")
    keep = budgets.pyramid(window=window, beta=beta)
    keep = per_head(keep, ADA_FLOOR) if split == "layer" else keep
    given = budgets.amounts(budget, decode_budget)
    votes = score.window(window, kernel, pooling, decoding=given.bounded)
    policy = retain(votes, keep, store=named(store), evict="never", bounded=given.bounded)
    return Recipe("pyramidkv", policy, amounts=given)
