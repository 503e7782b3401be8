"""Fast KVzip: a gate beside the model tells from each token alone how much it will be needed."""

import functools
from fractions import Fraction

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from kvjax.cache.pages import LARGEST
from kvjax.cache.quantize import named
from kvjax.errors import InputError
from kvjax.policies.base import Recipe, cached
from kvjax.policies.budgets import budget as budgets
from kvjax.policies.budgets.budget import Keep
from kvjax.policies.budgets.split import split_over
from kvjax.policies.score import Score
from kvjax.policies.select import retain
from kvjax.spec import Prompt


@cached
def fastkvzip(
    budget: Keep = "20%",
    *,
    split: str = "global",
    recent: float = 0.02,
    sinks: int = 4,
    decode_budget: Keep = "",
    store: str = "dense",
) -> Recipe:
    """Keep the tokens that a trained gate expects to be needed, in one reading; generated tokens are appended.

    Args:
      budget: prompt tokens kept per row, all together.
      split: who competes for slots, "row", "layer", "global" or "profile": see
        `kvjax.policies.budgets.split.split_over`.
      recent: share of the prompt whose newest tokens are always kept, at least one; less where a budget is smaller.
      sinks: first tokens, always kept where the budget has room for them, too.
      decode_budget: slots per row while decoding, as a mean over rows, of which the oldest leaves; "" = unbounded.
      store: number format of slots, a name of `kvjax.cache.quantize.named`.

    Source: Kim et al., 2026 (arXiv 2601.17668); Janghyun1230/FastKVzip; kvpress `fastkvzip_press.py`.
    Differs: the newest 2% at any length, there 4,096 tokens of long prompts; the first tokens stand for the system
      prompt; a prompt is read to its end before anything is evicted; layers with a sliding window keep it.
    Cost: a 100th of a layer's projections; with "global" the candidates of all layers wait until the last one, up to 10
      times the budget. The gate is trained by `python -m kvjax.retrofit --objective keep`.
    """
    given = budgets.amounts(budget, decode_budget)
    policy = retain(
        foretold(recent, sinks), split_over(split), store=named(store), evict="never", bounded=given.bounded
    )
    return Recipe("fastkvzip", policy, amounts=given)


@functools.cache
def foretold(recent: float, sinks: int) -> Score:
    """What the layer's gate says of each token: `kvjax.models.keep`."""
    if not 0 <= recent <= 1:
        raise InputError(f"recent={recent} is not a share between 0 and 1")
    if not 0 <= sinks <= LARGEST:
        raise InputError(f"sinks={sinks} is not a number of tokens from 0 to {LARGEST}")
    of = Fraction(recent).limit_denominator(1000)

    def prompt(prompt: Prompt) -> Float[Array, "B K T"]:
        if not callable(prompt.keep):
            raise InputError(
                "fastkvzip: no gate lies beside the model: python -m kvjax.retrofit --objective keep trains one"
            )
        return prompt.keep()

    def protect(pos: Array, now: Array, budget: Array) -> Bool[Array, "*b"]:
        newest = jnp.minimum(jnp.maximum(budgets.share(now, of), 1), budget)
        return (pos >= now - newest) | (pos < jnp.minimum(sinks, budget - newest))

    return Score(prompt, protect, windows=False)
