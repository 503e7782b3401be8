"""KVzip+: KVzip, and how much a token adds where it is attended to."""

from kvjax.methods.kvzip import replaying
from kvjax.policies import score
from kvjax.policies.base import Recipe, cached
from kvjax.policies.budgets.budget import Keep


@cached
def kvzip_plus(
    budget: Keep = "20%",
    *,
    chunk: int = 2048,
    split: str = "global",
    recent: int = 4,
    sinks: int = 4,
    decode_budget: Keep = "",
    store: str = "dense",
) -> Recipe:
    """Keep the tokens that add most to others when the prompt is read a second time; generated tokens are appended.

    Args:
      budget, chunk, split, recent, sinks, decode_budget, store: as in `kvjax.methods.kvzip.kvzip`.

    Source: KVzip+ in KVzap (arXiv 2601.07891); NVIDIA/kvpress `kvzip_press.py`, `kvzip_plus_normalization`.
    Differs: as `kvzip`; a norm behind the output projection (Gemma) leaves its scale in it.
    Cost: as `kvzip`, and T N H^2 products a layer for the lengths of what values add.
    """
    weighted = score.replayed(recent, sinks, weighted=True)
    return replaying("kvzip_plus", weighted, budget, chunk, split, decode_budget, store)
