"""DMC: the model merges a token with the ones before it where it has learned to."""

from kvjax.cache.quantize import named
from kvjax.policies import gate_capacity
from kvjax.policies.base import Recipe, cached
from kvjax.policies.budgets.budget import Keep
from kvjax.policies.segment_merge import accumulate


@cached
def dmc(*, capacity: Keep = "", store: str = "dense") -> Recipe:
    """Each head appends a token or merges it into its newest slot; needs a model that was retrofitted for it.

    Args:
      capacity: slots per row for which there is room, as a mean over rows, in tokens or as a share of all tokens, new
        ones included. Once it is used up, tokens are merged that the model would have appended. "" = while the prompt
        is read, twice what the model's own rate needs; then what the prompt has filled, and for new tokens half as
        much again as they need at its rate.
      store: number format of slots that take no more tokens, a name of `kvjax.cache.quantize.named`.

    Source: Nawrot et al., ICML 2024 (arXiv 2403.09636); Megatron-LM, branch `dmc`.
    Differs: see `kvjax.policies.segment_merge.accumulate`; the borrowed coordinate is the released code's, the last.
    Cost: see `accumulate`.
    """
    return Recipe("dmc", accumulate(named(store)), amounts=gate_capacity.amounts(capacity))
