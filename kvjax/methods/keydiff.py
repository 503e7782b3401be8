"""KeyDiff: keys that point elsewhere than the others, whatever will be asked."""

import functools

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kvjax.cache.quantize import named
from kvjax.policies.base import Recipe, cached
from kvjax.policies.budgets import budget as budgets
from kvjax.policies.budgets.budget import Keep
from kvjax.policies.budgets.split import split_over
from kvjax.policies.score import Score, newest_and_first
from kvjax.policies.select import retain
from kvjax.spec import Prompt

TINY = 1e-20  # a length below which a vector has no direction


@cached
def keydiff(
    budget: Keep = "20%",
    *,
    split: str = "global",
    recent: int = 4,
    sinks: int = 4,
    decode_budget: Keep = "",
    store: str = "dense",
) -> Recipe:
    """Keep the tokens whose keys are least like the mean of all, under one threshold; generated tokens are appended.

    Args:
      budget: prompt tokens kept per row, all together.
      split: who competes for slots, "row", "layer", "global" or "profile": see
        `kvjax.policies.budgets.split.split_over`.
      recent, sinks: newest and first tokens of the prompt, always kept; where a budget is smaller, newest ones.
      decode_budget: slots per row while decoding, as a mean over rows, of which the oldest leaves; "" = unbounded.
      store: number format of slots, a name of `kvjax.cache.quantize.named`.

    Source: Park et al., 2025 (arXiv 2504.15364); kvpress `keydiff_press.py`.
    Differs: chosen once, when the prompt has been read, not block by block; the threshold over layers and heads is not
      the paper's, which has rows of equal lengths; first and newest tokens are protected; where heads share a latent,
      the mean of their scores.
    Cost: two passes over the prompt's keys, and no attention weights; with "global" the candidates of all layers wait
      until the last one, up to 10 times the budget.
    """
    given = budgets.amounts(budget, decode_budget)
    policy = retain(unlike(recent, sinks), split_over(split), store=named(store), evict="never", bounded=given.bounded)
    return Recipe("keydiff", policy, amounts=given)


@functools.cache
def unlike(recent: int, sinks: int) -> Score:
    """One minus the cosine of a token's rotated key and the mean direction of the keys that can still be read."""

    def prompt(prompt: Prompt) -> Float[Array, "B K T"]:
        seen = prompt.alive()[:, :, None, None]
        one = _directions(jnp.where(seen, prompt.k.astype(jnp.float32), 0.0))  # B T heads H
        mean = _directions(one.sum(axis=1, keepdims=True))  # the sum has the mean's direction
        far = jnp.maximum(1 - (one * mean).sum(axis=-1), 0.0)  # rounding can make it negative
        rows = far.reshape(*far.shape[:2], prompt.key.shape[2], -1).mean(axis=-1)
        return jnp.moveaxis(rows, 1, 2)

    return Score(prompt, newest_and_first(recent, sinks))


def _directions(x: Float[Array, "*b H"]) -> Float[Array, "*b H"]:
    """Vectors of length one; zeros stay."""
    return x / jnp.maximum(jnp.sqrt((x * x).sum(axis=-1, keepdims=True)), TINY)
