"""How a TPU kernel reads a page of a row's slots: its codes, as numbers, and its scales."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from pallas_kernels.blocks import LANES
from pallas_kernels.codes import Piece, whole
from pallas_kernels.decode_attention.formats import Format


class Page:
    """A page of one of the pools in vector memory."""

    def __init__(self, pool: Any, across: bool, read: Format):
        self._pool, self._across, self.read = pool, across, read
        self._codes = pool["codes"] if read.groups else pool

    def numbers(self, piece: Piece) -> Array:
        """A piece's codes as numbers, `[width page]` if slots are on the lanes, else `[page width]`."""
        part = pl.ds(piece.at, piece.width)
        codes = self._codes[0, part, :] if self._across else self._codes[0, :, part]
        if not self.read.groups:
            return codes
        if self.read.float8:
            return pltpu.bitcast(codes, jnp.float8_e4m3fn).astype(self.read.dtype)
        found = (codes.astype(jnp.int32) >> piece.shift) & piece.mask  # bytes cannot be shifted
        return found.astype(jnp.float32).astype(self.read.dtype)

    def scale(self, group: int) -> Float[Array, "1 page"]:
        """Of a group."""
        return self._line("scale", group)

    def zero(self, group: int) -> Float[Array, "1 page"]:
        """Of a group."""
        return self._line("zero", group) if self.read.offset is None else self.read.offset * self.scale(group)

    def _line(self, name: str, group: int) -> Array:
        pool = self._pool[name]
        if pool.shape[-1] % LANES == 0:  # slots on the lanes
            return whole(pool[0, pl.ds(group, 1), :])
        return whole(pool[0]).T[group : group + 1]

    @property
    def axis(self) -> int:
        """Of the slots."""
        return 1 if self._across else 0


def dot(a: Array, b: Array, over: tuple[int, int]) -> Array:
    """A matrix product in float32 over one axis of each."""
    if 1 in b.shape:  # a page of one slot: Mosaic multiplies by hand, numbers of 32 bits only
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = jax.lax.Precision.HIGHEST if b.dtype == jnp.float32 else None
    dims = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
