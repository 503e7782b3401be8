"""Scores: which tokens matter. Larger means keep."""

import functools
from collections.abc import Callable
from fractions import Fraction
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from kvjax.attention.prompt_scores import column_sums, replay_maxima, window_sums
from kvjax.cache.pages import LARGEST
from kvjax.errors import InputError
from kvjax.parallel import collectives
from kvjax.policies.budgets import budget as budgets
from kvjax.spec import Prompt

Protect = Callable[[Array, Array, Array], Bool[Array, "*b"]]


class Score(NamedTuple):
    """A statistic per token and the tokens that it may not condemn.

    Attributes:
      prompt: `prompt -> [B K T]`, the statistic of every prompt token; None = order of arrival, nothing is selected.
      protect: `(pos, now, budget) -> bool`, tokens that stay, whatever their score; `now` is the number of tokens seen.
        The arguments broadcast. Never protects more than `budget` tokens.
      observe: `(statistic [B K S], probabilities [B K G S]) -> statistic`, after every decoded token; None = the
        statistic is the token's position and is not stored.
      windows: whether it says something of layers with a sliding window; False = these keep it.
    """

    prompt: Callable[[Prompt], Float[Array, "B K T"]] | None
    protect: Protect
    observe: Callable[[Float[Array, "B K S"], Float[Array, "B K G S"]], Float[Array, "B K S"]] | None = None
    windows: bool = True


@functools.cache
def arrival() -> Score:
    """All tokens matter, in the order in which they came."""
    return Score(prompt=None, protect=lambda pos, now, budget: pos >= 0)


@functools.cache
def recency(sinks: int) -> Score:
    """The newest tokens matter, and the first `sinks`.

    Source: StreamingLLM (arXiv 2309.17453), `streaming_llm/kv_cache.py`.
    Differs: a budget that is smaller than the sinks keeps the newest token and fewer sinks.
    Cost: nothing.
    """
    if sinks < 0:
        raise InputError(f"sinks={sinks} is negative")

    def prompt(prompt: Prompt) -> Float[Array, "B K T"]:
        b, t, k, _ = prompt.key.shape
        return jnp.broadcast_to(jnp.arange(t, dtype=jnp.float32), (b, k, t))

    return Score(prompt, lambda pos, now, budget: pos < jnp.minimum(min(sinks, LARGEST), budget - 1))


@functools.cache
def accumulated(recent: float, sinks: int = 0) -> Score:
    """Attention that a token received from all queries so far.

    Args:
      recent: share of the budget for the newest tokens.
      sinks: first tokens that stay, where the rest of the budget has room for them.

    Source: H2O (arXiv 2306.14048), `h2o_hf/utils_real_drop/modify_llama.py`.
    Differs: one set of tokens per key/value head (the released code repeats keys per query head and keeps one set for
      each); accumulated in float32.
    Cost: at prefill one more pass of queries times keys over the prompt; per step one addition per slot.
    """
    if not 0 <= recent <= 1:
        raise InputError(f"recent={recent} is not a share between 0 and 1")
    if not 0 <= sinks <= LARGEST:
        raise InputError(f"sinks={sinks} is not between 0 and {LARGEST}")
    of = Fraction(recent).limit_denominator(1000)

    def protect(pos: Array, now: Array, budget: Array) -> Bool[Array, "*b"]:
        newest = budgets.share(budget, of)
        return (pos >= now - newest) | (pos < jnp.minimum(sinks, budget - newest))

    return Score(
        prompt=column_sums,
        protect=protect,
        observe=lambda stat, probs: stat + probs.mean(axis=2),
    )


@functools.cache
def last_row() -> Score:
    """Attention of the newest query, averaged over all heads of the layer: every head keeps the same tokens.

    Source: TOVA (arXiv 2401.06104), `src/tova_cache.py`.
    Cost: at prefill one row of attention; per step a mean over heads.
    """

    def prompt(prompt: Prompt) -> Float[Array, "B K T"]:
        row = collectives.mean(window_sums(prompt, 1), axis=1)[:, None]
        return jnp.broadcast_to(row, (row.shape[0], prompt.key.shape[2], row.shape[2]))

    def observe(stat: Float[Array, "B K S"], probs: Float[Array, "B K G S"]) -> Float[Array, "B K S"]:
        return jnp.broadcast_to(collectives.mean(probs.mean(axis=2), axis=1)[:, None], stat.shape)

    return Score(prompt, lambda pos, now, budget: jnp.zeros_like(pos, bool), observe)


@functools.cache
def window(size: int, kernel: int, pooling: Literal["avg", "max"], *, decoding: bool = False) -> Score:
    """Attention from the last `size` prompt tokens, smoothed over `kernel` neighbours; the window itself is kept.

    With `decoding` the newest `size` tokens go on voting: every step adds its attention to what is left of the
    statistic, `1 - 1 / size` of it, without smoothing over neighbours. The tokens of the window begin with the votes
    that they had from those of it that saw them, or they would be condemned as soon as they have left it. The papers do
    not evict while decoding.

    Source: SnapKV (arXiv 2404.14469), `snapkv/monkeypatch/snapkv_utils.py`.
    Differs: one set of tokens per key/value head, from the mean over its query heads; a budget smaller than the window
      keeps the newest part of it (the released code fails).
    Cost: `size` rows of attention at prefill, nothing afterwards unless `decoding`: then one addition per slot.
    """
    if not 1 <= size <= LARGEST:
        raise InputError(f"window={size} is not between 1 and {LARGEST} tokens")
    if kernel < 1 or kernel % 2 == 0:
        raise InputError(f"kernel={kernel} is not an odd number of tokens")
    if pooling not in ("avg", "max"):
        raise InputError(f"pooling={pooling!r} is not 'avg' or 'max'")

    def prompt(prompt: Prompt) -> Float[Array, "B K T"]:
        sums = window_sums(prompt, size)
        before = (jnp.arange(sums.shape[-1]) < (prompt.length - size)[:, None])[:, None]
        past = _pool(jnp.where(before & prompt.alive()[:, None], sums, 0.0), kernel, pooling)
        return jnp.where(before, past, sums)

    def observe(stat: Float[Array, "B K S"], probs: Float[Array, "B K G S"]) -> Float[Array, "B K S"]:
        return stat * (1 - 1 / size) + probs.mean(axis=2)

    protect = lambda pos, now, budget: pos >= now - jnp.minimum(size, budget)
    return Score(prompt, protect, observe if decoding else None)


@functools.cache
def replayed(recent: int, sinks: int, *, weighted: bool) -> Score:
    """The most attention that a token gets while the prompt is read again behind its end: `Recipe.replay`.

    Args:
      recent, sinks: newest and first tokens, which stay; the first are in every chunk's softmax, too.
      weighted: of attention times what the token adds to the residual stream: `prompt_scores.replay_maxima`.

    Source: KVzip (arXiv 2505.23416), `attention/score.py`; weighted, KVzip+ (arXiv 2601.07891), in kvpress
      `kvzip_press.py`.
    Differs: rows of heads that share a latent take the maximum over them; a norm behind the output projection (Gemma)
      leaves its scale in it; computed in logs, in float32.
    Cost: see `replay_maxima`; and the prompt is read twice.
    """
    prompt = functools.partial(replay_maxima, sinks=sinks, weighted=weighted)
    return Score(prompt, newest_and_first(recent, sinks), windows=False)


def newest_and_first(recent: int, sinks: int) -> Protect:
    """Protects the newest tokens and the first ones; where a budget is smaller, newest ones."""
    for name, count in (("recent", recent), ("sinks", sinks)):
        if not 0 <= count <= LARGEST:
            raise InputError(f"{name}={count} is not a number of tokens from 0 to {LARGEST}")

    def protect(pos: Array, now: Array, budget: Array) -> Bool[Array, "*b"]:
        newest = jnp.minimum(recent, budget)
        return (pos >= now - newest) | (pos < jnp.minimum(sinks, budget - newest))

    return protect


def _pool(x: Float[Array, "B K T"], kernel: int, pooling: Literal["avg", "max"]) -> Float[Array, "B K T"]:
    """Pool over tokens, stride 1, padded with zeros (scores are not negative)."""
    shape, pad = (1, 1, kernel), ((0, 0), (0, 0), (kernel // 2, kernel // 2))
    if pooling == "max":
        return jax.lax.reduce_window(x, 0.0, jax.lax.max, shape, (1, 1, 1), pad)
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, shape, (1, 1, 1), pad) / kernel
