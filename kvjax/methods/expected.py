"""Expected Attention: what queries that are still to come will look at, going by those of the prompt."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kvjax.attention.prompt_scores import reach
from kvjax.cache.pages import LARGEST
from kvjax.cache.quantize import named
from kvjax.errors import InputError
from kvjax.policies.base import Recipe, cached
from kvjax.policies.budgets import budget as budgets
from kvjax.policies.budgets.budget import Keep
from kvjax.policies.budgets.split import split_over
from kvjax.policies.score import Score, newest_and_first
from kvjax.policies.select import retain
from kvjax.spec import Prompt
from pallas_kernels.decode_attention.reference import EMPTY
from pallas_kernels.rotation import Rotation, rotate

Norm = Literal["out", "value"]
einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@cached
def expected(
    budget: Keep = "20%",
    *,
    split: str = "layer",
    future: int = 512,
    eps: float = 0.02,
    norm: Norm = "out",
    recent: int = 4,
    sinks: int = 4,
    decode_budget: Keep = "",
    store: str = "dense",
) -> Recipe:
    """Keep the tokens that queries like the prompt's are expected to attend to; generated tokens are appended.

    Args:
      budget: prompt tokens kept per row, as a mean over those that compete.
      split: who competes for slots, "row", "layer", "global" or "profile": see
        `kvjax.policies.budgets.split.split_over`.
      future: positions behind the prompt over which rotations are averaged [tokens].
      eps: what is added to the expected attention: the weight of a token's norm where it gets none.
      norm: of what a token would add to the residual stream, "out", or of its value alone, "value".
      recent, sinks: newest and first tokens of the prompt, always kept; where a budget is smaller, newest ones. The
        first ones are in no statistic and in no softmax.
      decode_budget: slots per row while decoding, as a mean over rows, of which the oldest leaves; "" = unbounded.
      store: number format of slots, a name of `kvjax.cache.quantize.named`.

    Source: Devoto et al., 2025 (arXiv 2510.00636); kvpress `expected_attention_press.py`, there under Ada-KV's budget.
    Differs: the norm of the paper, where the code has the values' (`norm="value"`), of each query head its own; `eps`
      is 0.02, there 0 or 0.01; newest tokens are protected; layers with a sliding window keep it; logits are not capped
      where a model caps them; statistics in float32.
    Cost: T N H^2 products for the queries' covariances, as many for what keys make of them, and with "out" once more;
      no attention weights.
    """
    given = budgets.amounts(budget, decode_budget)
    policy = retain(
        foreseen(future, eps, norm, recent, sinks),
        split_over(split),
        store=named(store),
        evict="never",
        bounded=given.bounded,
    )
    return Recipe("expected", policy, amounts=given)


@functools.cache
def foreseen(future: int, eps: float, norm: Norm, recent: int, sinks: int) -> Score:
    """The attention that a token will get from queries as the prompt has them, at the next `future` positions.

    A query head's queries before rotation are taken for Gaussian, with the prompt's mean and covariance; R is the mean
    of the rotations by the next positions, s the scale of logits:

        z[j] = s k[j] . R mean + s^2 / 2 k[j] . R cov R^T k[j],   p = softmax of z over the tokens but the sinks
        score = mean over the row's query heads of (eps + p[j]) |W_o v[j]|
    """
    if not 1 <= future <= LARGEST:
        raise InputError(f"expected: future={future} is not a number of tokens from 1 to {LARGEST}")
    if not 0 <= eps <= 1:
        raise InputError(f"expected: eps={eps} is not between 0 and 1")
    if norm not in ("out", "value"):
        raise InputError(f"expected: norm={norm!r} is not 'out' or 'value'")

    def prompt(prompt: Prompt) -> Float[Array, "B K T"]:
        b, t = prompt.q.shape[:2]
        each = reach(prompt) if norm == "out" else _sizes(prompt)
        score = (eps + _attention(prompt, future, sinks)) * each
        return score.reshape(b, prompt.key.shape[2], -1, t).mean(axis=2)

    return Score(prompt, newest_and_first(recent, sinks), windows=False)


def _sizes(prompt: Prompt) -> Float[Array, "B N T"]:
    """L2 norms of values."""
    size = jnp.linalg.norm(prompt.v.astype(jnp.float32), axis=-1)
    return jnp.repeat(jnp.moveaxis(size, 1, 2), prompt.q.shape[2] // prompt.v.shape[2], axis=1)


def _attention(prompt: Prompt, future: int, sinks: int) -> Float[Array, "B N T"]:
    """The expected attention of each query head."""
    assert isinstance(prompt.rotation, Rotation)
    b, t, heads, h = prompt.k.shape
    pos, length, frequency = jnp.arange(t), prompt.length[:, None], prompt.rotation.frequency  # B 1 half
    angles = lambda pos: pos.astype(jnp.float32)[..., None] * frequency
    counted = (pos >= sinks) & (pos < length)
    weight = counted.astype(jnp.float32)
    weight = weight / jnp.maximum(weight.sum(axis=1, keepdims=True), 1)
    back = angles(-pos[None])[:, :, None]  # B T 1 half
    ahead = angles(length + jnp.arange(future))
    cos, sin = (f(ahead).mean(axis=1)[:, None, None] for f in (jnp.cos, jnp.sin))
    keys = prompt.k.astype(jnp.float32)

    def of_one(q: Float[Array, "B T K H"]) -> Float[Array, "B K T"]:
        q = rotate(q.astype(jnp.float32), jnp.cos(back), jnp.sin(back))
        mean = einsum("bt,btkh->bkh", weight, q)[:, None]
        spread = rotate(einsum("bt,btki,btkj->bkij", weight, q - mean, q - mean), cos, sin)
        spread, mean = rotate(jnp.swapaxes(spread, -1, -2), cos, sin), rotate(mean, cos, sin)[:, 0]
        z = einsum("btkh,bkh->bkt", keys, prompt.scale * mean)
        z += einsum("btki,bkij,btkj->bkt", keys, prompt.scale**2 / 2 * spread, keys)
        return jax.nn.softmax(jnp.where(counted[:, None], z, EMPTY), axis=-1)

    grouped = jnp.moveaxis(prompt.q.reshape(b, t, heads, -1, h), 3, 0)
    return jnp.moveaxis(jax.lax.map(of_one, grouped), 0, 2).reshape(b, -1, t)
