"""A sequence's place in a batch of others that come and go: a seat."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from kvjax.cache import pages
from kvjax.cache import tier as tiers_
from kvjax.cache.tier import PER_ROW, Tier
from kvjax.spec import PyTree


def view(tier: Tier, seat: Int[Array, ""]) -> Tier:
    """The rows of one seat, as a tier of one sequence that has the pool for itself."""
    pick = lambda x: jax.lax.dynamic_slice_in_dim(x, seat, 1, axis=1)
    return tier._replace(**{name: jax.tree.map(pick, getattr(tier, name)) for name in PER_ROW})


def with_view(tier: Tier, seat: Int[Array, ""], view: Tier) -> Tier:
    """The tier with the rows of one seat written back."""
    put = lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, seat, axis=1)
    return view._replace(**{name: jax.tree.map(put, getattr(tier, name), getattr(view, name)) for name in PER_ROW})


def take(tier: Tier, seat: Int[Array, ""], one: Tier) -> Tier:
    """The tier with what a tier of one sequence holds copied into an empty seat.

    Args:
      tier: with free pages for it.
      seat: whose rows hold nothing.
      one: with pages of the same size.
    """
    held = jnp.sum(one.table < one.free.shape[0], axis=-1, dtype=jnp.int32)
    mine = view(tier, seat)
    width = mine.table.shape[-1]
    table, num_free = pages.grow(
        mine.table.reshape(-1, width), tier.free, tier.num_free, jnp.minimum(held, width).reshape(-1), width
    )
    table = table.reshape(mine.table.shape)
    shared = min(width, one.table.shape[-1])
    # Where each page of the other pool goes.
    goes = jnp.full(one.free.shape, tier.free.shape[0], jnp.int32)
    goes = goes.at[one.table[..., :shared]].set(table[..., :shared], mode="drop")
    copy = lambda pool, pages: pool.at[goes].set(pages, mode="drop")
    pools: dict[str, PyTree] = {
        name: jax.tree.map(copy, getattr(tier, name), getattr(one, name)) for name in ("k", "v", "pos", "score")
    }
    mine = one._replace(**pools, table=table, free=tier.free, num_free=num_free)
    return with_view(tier, seat, mine)


def leave(tier: Tier, seat: Int[Array, ""]) -> Tier:
    """The tier with an empty seat, whose pages are free."""
    mine = view(tier, seat)
    return with_view(tier, seat, tiers_.trim(mine, jnp.zeros_like(mine.length)))
