"""D2O: layers with spread-out attention keep more; what is evicted is merged into what is kept."""

from typing import Literal

from kvjax.cache.quantize import named
from kvjax.errors import InputError
from kvjax.policies import score
from kvjax.policies.base import Recipe, cached
from kvjax.policies.budgets.allocation import LayerRule, from_variance
from kvjax.policies.budgets.budget import Keep, amounts
from kvjax.policies.eviction import drop
from kvjax.policies.eviction import merge as merging
from kvjax.policies.select import retain


@cached
def d2o(
    budget: Keep = "20%",
    *,
    important: float = 0.75,
    sinks: int = 4,
    beta: float = 0.7,
    merge: Literal["paper", "scatter_mean", "off"] = "paper",
    layer_rule: LayerRule = "paper",
    full_layers: str = "",
    decode_budget: Keep = "",
    store: str = "dense",
) -> Recipe:
    """Keep sinks, heavy hitters and recent tokens, more in layers that spread their attention; merge the evicted.

    Args:
      budget: slots per row, averaged over layers.
      important: share of a row for sinks and heavy hitters, the rest is for the newest tokens; the paper's 3:1.
      sinks: first tokens, always kept.
      beta: how fast the threshold for merging follows; nothing is merged with `merge="off"`.
      merge: weights of merged tokens: the paper's, or "scatter_mean", those of the released code; "off" = what is
        evicted is forgotten.
      layer_rule: what tells layers apart, the paper's statistic or that of the released code: see
        `kvjax.policies.budgets.allocation.from_variance`.
      full_layers: layers that keep every token, generated ones too, such as "0,1,-1" in the released code; the other
        layers pay for their prompt. With sliding windows they are numbered among the layers that share a budget.
      decode_budget: slots per row while decoding, as a mean over rows; "" = the budget.
      store: number format of slots, a name of `kvjax.cache.quantize.named`.

    Source: Wan et al., ICLR 2025 (arXiv 2406.13035); AIoT-MLSys-Lab/D2O.
    Differs: compresses at prefill; the sets are per key/value head, the thresholds per row and sequence; see
      `kvjax.policies.budgets.allocation.from_variance` and `kvjax.policies.eviction.merge`.
    Cost: two more query-key passes over the prompt; all layers' keys and values wait for the last layer, so the peak at
      prefill is the full cache; per step a pass over the row's keys; 8 bytes per slot.
    """
    try:
        full = tuple(int(part) for part in full_layers.split(",") if part.strip())
    except ValueError:
        raise InputError(f"full_layers={full_layers!r} is not a list of layers such as 0,1,-1") from None
    keep = from_variance(min_slots=sinks + 1, rule=layer_rule, full_layers=full)
    given, votes = amounts(budget, decode_budget), score.accumulated(1 - important, sinks)
    action = drop if merge == "off" else merging(beta, merge)
    policy = retain(votes, keep, store=named(store), evict="after", action=action, bounded=given.bounded)
    return Recipe("d2o", policy, amounts=given)
