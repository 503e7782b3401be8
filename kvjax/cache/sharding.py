"""How a cache is split over the devices of a mesh."""

import jax
import numpy as np

from kvjax.cache.tier import PER_ROW, Tier
from kvjax.parallel.collectives import DATA, HEADS
from kvjax.parallel.mesh import LAYERS, POOL, shape_of
from kvjax.spec import PyTree


def cache(tree: PyTree) -> PyTree:
    """How tiers are split: every device has its own pool, and its rows."""
    pools = dict.fromkeys(("k", "v", "pos", "score", "free", "num_free"), POOL)
    rows = dict.fromkeys(PER_ROW, LAYERS)
    own = Tier(**pools, **rows)  # pyright: ignore[reportArgumentType]
    return jax.tree.map(lambda tier: own, tree, is_leaf=lambda x: isinstance(x, Tier))


def fullest(tier: Tier, needed: np.ndarray) -> int:
    """The largest sum on one device of what rows need, `[L B K]`, or all rows of a device together, `[L B heads]`."""
    shape = shape_of(tier)
    l, b, k = needed.shape
    each = needed.reshape(l, shape[DATA], b // shape[DATA], shape[HEADS], k // shape[HEADS])
    return int(each.sum(axis=(0, 2, 4)).max())
