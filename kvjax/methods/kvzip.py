"""KVzip: what a prompt needs of itself when it is read again, whatever will be asked."""

from kvjax.cache.pages import LARGEST
from kvjax.cache.quantize import named
from kvjax.errors import InputError
from kvjax.policies import score
from kvjax.policies.base import Recipe, cached
from kvjax.policies.budgets import budget as budgets
from kvjax.policies.budgets.budget import Keep
from kvjax.policies.budgets.split import split_over
from kvjax.policies.score import Score
from kvjax.policies.select import retain

PART = 64  # chunks of other sizes could not be cut into equal blocks


@cached
def kvzip(
    budget: Keep = "20%",
    *,
    chunk: int = 2048,
    split: str = "global",
    recent: int = 4,
    sinks: int = 4,
    decode_budget: Keep = "",
    store: str = "dense",
) -> Recipe:
    """Keep the tokens that the prompt attends to most when it is read a second time; generated tokens are appended.

    Args:
      budget: prompt tokens kept per row, all together.
      chunk: tokens that are read again together, from 64 on a multiple of it: fewer cost less; best a power of two.
      split: who competes for slots, "row", "layer", "global" or "profile": see
        `kvjax.policies.budgets.split.split_over`.
      recent, sinks: newest and first tokens of the prompt, always kept; where a budget is smaller, newest ones.
      decode_budget: slots per row while decoding, as a mean over rows, of which the oldest leaves; "" = unbounded.
      store: number format of slots, a name of `kvjax.cache.quantize.named`.

    Source: Kim et al., NeurIPS 2025 (arXiv 2505.23416); snu-mllab/KVzip `attention/score.py`, `model/wrapper.py`.
    Differs: what is read again is a bare copy, without an instruction to repeat it, which models without a chat
      template can read, too; the softmax's sinks are the first tokens, not the system prompt, and the newest tokens are
      protected, too; layers with a sliding window keep it.
    Cost: the prompt is read twice, the second time with attention to all of it: about 3 times the work of reading it
      once; with "global" the candidates of all layers wait until the last one, up to 10 times the budget.
    """
    return replaying("kvzip", score.replayed(recent, sinks, weighted=False), budget, chunk, split, decode_budget, store)


def replaying(name: str, score: Score, budget: Keep, chunk: int, split: str, decode_budget: Keep, store: str) -> Recipe:
    """A method that reads the prompt again in chunks, for its score."""
    if not 1 <= chunk <= LARGEST:
        raise InputError(f"{name}: chunk={chunk} is not a number of tokens from 1 to {LARGEST}")
    given = budgets.amounts(budget, decode_budget)
    policy = retain(score, split_over(split), store=named(store), evict="never", bounded=given.bounded)
    return Recipe(name, policy, amounts=given, replay=chunk if chunk < PART else chunk // PART * PART)
