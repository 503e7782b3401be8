"""Pools of pages as XLA reads them.

A TPU's memory has rows of 128 lanes. Where a slot's vector is narrower, XLA lays the slots of a page on the lanes, so a
page is turned, `[width page]`. Whole pages can be gathered and scattered so. To gather or scatter single slots, or
pages whose slots then follow each other, XLA would lay the whole pool anew first.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from pallas_kernels.blocks import LANES


def lies_across(pool: Array | jax.ShapeDtypeStruct) -> bool:
    """Whether a TPU's pool `[P page width]` has slots on the lanes."""
    return pool.ndim == 3 and pool.shape[1] % LANES == 0 and pool.shape[2] % LANES > 0


def reading(pools: Any, run: Callable[[Callable[[Int[Array, "*b"]], Any]], Any]) -> Any:
    """A loop that reads pages.

    Args:
      pools: a tree of arrays `[P page ...]`.
      run: what is done; is given a function that gathers pages `[*b page ...]`. On TPUs it sees pools that are turned
        before the loop, since XLA would lay them as the loop's body likes them.
    """

    def over(turned: bool) -> Any:
        across = jax.tree.map(lambda x: turned and lies_across(x), pools)
        turn = lambda tree: jax.tree.map(lambda x, yes: jnp.swapaxes(x, -1, -2) if yes else x, tree, across)
        seen = turn(pools)
        return run(lambda at: turn(jax.tree.map(lambda x: x.at[at].get(mode="clip"), seen)))

    if not any(map(lies_across, jax.tree.leaves(pools))):
        return over(False)
    return jax.lax.platform_dependent(tpu=functools.partial(over, True), default=functools.partial(over, False))
