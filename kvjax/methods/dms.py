"""DMS: the model evicts a token some time after it was read where it has learned to."""

from kvjax.cache.quantize import named
from kvjax.policies import gate_capacity
from kvjax.policies.base import Recipe, cached
from kvjax.policies.budgets.budget import Keep
from kvjax.policies.delayed_eviction import delay


@cached
def dms(*, capacity: Keep = "", store: str = "dense") -> Recipe:
    """Each head evicts tokens of its choice, a window later; needs a model that was retrofitted for it.

    Args:
      capacity: slots per row for which there is room, as a mean over rows, in tokens or as a share of all tokens, new
        ones included, at least the window. Once it is used up, tokens are evicted that the model would have kept. "" =
        as in `dmc`, and the window.
      store: number format of slots, a name of `kvjax.cache.quantize.named`.

    Source: Lancucki et al., NeurIPS 2025 (arXiv 2506.05345); Model-Optimizer `experimental/dms`.
    Differs: see `kvjax.policies.delayed_eviction.delay`.
    Cost: see `delay`.
    """
    return Recipe("dms", delay(named(store)), amounts=gate_capacity.amounts(capacity))
