"""Rings: rows that hold the newest tokens, the one of position p in place p mod size."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from kvjax.cache.store import KVStore
from kvjax.cache.tier import Tier
from kvjax.policies.base import write_token
from kvjax.spec import Token


def latest(count: Int[Array, "*b one"], size: int, places: int | None = None) -> Int[Array, "*b n"]:
    """Position of the newest of `count` tokens in each place of a ring; below 0 where there is none yet.

    Args:
      count: tokens so far.
      size: places of the ring.
      places: the first ones of them that are asked for; None = all.

    >>> latest(jnp.array([[6], [2]]), 4).tolist()
    [[4, 5, 2, 3], [0, 1, -2, -1]]
    """
    last = count - 1
    return last - (last - jnp.arange(size if places is None else places)) % size


def write_newest(tier: Tier, size: int, store: KVStore, token: Token) -> Tier:
    """A layer's view, rows of which are rings of this size, with a new token in the place of the one that leaves."""
    return write_token(tier, store, token, jnp.broadcast_to(token.pos[:, None] % size, tier.length.shape))
