"""StreamingLLM: attention sinks and a rolling window."""

import functools
from typing import Literal

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from kvjax.cache.quantize import named
from kvjax.errors import InputError
from kvjax.policies import score
from kvjax.policies.base import Positions, Recipe, cached
from kvjax.policies.budgets import budget as budgets
from kvjax.policies.budgets.budget import Keep
from kvjax.policies.select import retain


@cached
def streaming_llm(
    budget: Keep = "20%",
    *,
    sinks: int = 4,
    positions: Literal["cache", "absolute"] = "cache",
    decode_budget: Keep = "",
    store: str = "dense",
) -> Recipe:
    """Keep the first `sinks` tokens and the newest ones.

    Args:
      budget: slots per row, sinks and the token being decoded included.
      sinks: first tokens that stay.
      positions: "cache" stores keys unrotated and rotates them by their place in the cache, so that a text may be
        longer than the context limit; "absolute" keeps the tokens' own positions. With a sliding window, sinks stay in
        it by their place in the cache, where a budget beyond the window is the window; by their own positions they
        leave it.
      decode_budget: slots per row while decoding, as a mean over rows; "" = the budget.
      store: number format of slots, a name of `kvjax.cache.quantize.named`.

    Source: Xiao et al., ICLR 2024 (arXiv 2309.17453); `streaming_llm/kv_cache.py`, `pos_shift/modify_llama.py`.
    Differs: the prompt is read with exact attention at its own positions; places in the cache count from the first
      generated token on, as in the released code when the prompt is given in one piece.
    Cost: "cache" rotates every kept key at every step.
    """
    if positions not in ("cache", "absolute"):
        raise InputError(f"streaming_llm: positions={positions!r} is not 'cache' or 'absolute'")

    given = budgets.amounts(budget, decode_budget)
    by_place = positions == "cache"
    policy = retain(
        score.recency(sinks), budgets.uniform(), store=named(store), evict="before", by_place=by_place,
        bounded=given.bounded,
    )  # fmt: skip
    if not by_place:
        return Recipe("streaming_llm", policy, amounts=given)
    return Recipe("streaming_llm", policy, rotate="read", positions=_places(sinks), amounts=given)


@functools.cache
def _places(sinks: int) -> Positions:
    """Where a slot stands among those of its row, the sinks first."""

    def place(pos: Int[Array, "B K s"], now: Int[Array, " B"], length: Int[Array, "B K"]) -> Int[Array, "B K s"]:
        newest = length[..., None] - 1 - (now[:, None, None] - pos)
        return jnp.where(pos < sinks, jnp.minimum(pos, jnp.maximum(length[..., None] - 1, 0)), newest)

    return place
