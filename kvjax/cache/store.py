"""Stores: in which number format a slot is kept.

A store's codes are one array, or a dict whose `codes` entry is the payload and whose other entries are scales. Every
leaf leads with the axes of the slots; policies move slots as codes and never look inside.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from kvjax.spec import PyTree


class Store(NamedTuple):
    """A per-slot codec.

    Attributes:
      init: `(pages, page, width, dtype) -> codes`, zeroed pages `[P page ...]` for vectors of `width` numbers.
      encode: `(x [... width], dtype) -> codes [... ...]`.
      decode: `codes -> x [... width]`.
    """

    init: Callable[[int, int, int, DTypeLike], PyTree]
    encode: Callable[..., PyTree]
    decode: Callable[[PyTree], PyTree]


def _dense_init(pages: int, page: int, width: int, dtype: DTypeLike) -> PyTree:
    return jnp.zeros((pages, page, width), dtype)


def dense() -> Store:
    """Every number in the model's dtype.

    Cost: width x itemsize bytes per vector, no arithmetic.
    """
    return Store(init=_dense_init, encode=lambda x, dtype: x.astype(dtype), decode=lambda codes: codes)
