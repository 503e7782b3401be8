"""Top-k retention in plain jnp: the contract, and the XLA path on every platform."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Shaped

LEAST = jnp.iinfo(jnp.int32).min  # lower than every priority


class Kept(NamedTuple):
    """What was kept of rows of tokens, best first; an empty slot has index T, position -1 and zeros."""

    index: Int[Array, "B K n"]  # into the row's tokens
    k: Shaped[Array, "B K n R"]
    v: Shaped[Array, "B K n W"]
    pos: Int[Array, "B K n"]
    stat: Float[Array, "B K n"]


def topk_retain(
    priority: Float[Array, "B K T"],
    count: Int[Array, "B K"],
    k: Shaped[Array, "B K T R"],
    v: Shaped[Array, "B K T W"],
    pos: Int[Array, "B K T"],
    stat: Float[Array, "B K T"],
    *,
    n: int,
) -> Kept:
    """The best tokens of each row, exactly, in descending order; of equal ones the first comes first.

    Args:
      priority: larger = keep; +inf for protected tokens, -inf for padding. nan is as low as -inf; 0, -0 and numbers
        that are too small to be normal are equal.
      count: tokens that a row keeps; as data, so that budgets may be. At most n are kept.
      k, v, pos, stat: keys and values (numbers or codes), positions and scores of the tokens.
      n: slots of the result, at most T.

    Cost: a sort of T priorities per row, and a copy of n tokens.
    """
    check(n, priority)
    t = priority.shape[-1]
    _, best = jax.lax.top_k(comparable(priority), n)
    filled = jnp.arange(n) < count[..., None]

    def pick(x: Array, empty: int) -> Array:
        like = lambda y: y.reshape(y.shape + (1,) * (x.ndim - 3))
        return jnp.where(like(filled), jnp.take_along_axis(x, like(best), axis=2), jnp.asarray(empty, x.dtype))

    return Kept(jnp.where(filled, best, t), pick(k, 0), pick(v, 0), pick(pos, -1), pick(stat, 0))


def check(n: int, priority: Float[Array, "B K T"]) -> None:
    """Raises `ValueError` where there are not so many tokens."""
    if not 1 <= n <= priority.shape[-1]:
        raise ValueError(f"n={n} slots for rows of {priority.shape[-1]} tokens: give 1 to that many")


def comparable(priority: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Priorities without numbers that platforms compare in ways of their own: nan, -0, subnormal ones."""
    priority = jnp.where(priority == priority, priority, -jnp.inf)
    tiny = float(jnp.finfo(priority.dtype).tiny)
    return jnp.where(jnp.abs(priority) < tiny, jnp.zeros_like(priority), priority)


def ordered(priority: Float[Array, "*b"]) -> Int[Array, "*b"]:
    """Integers in the order of the priorities; all are larger than the least integer, which is free for padding."""
    bits = jax.lax.bitcast_convert_type(comparable(priority), jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
