"""How a TPU kernel reads a page of a row's slots: its codes, as numbers, and its scales."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from pallas_kernels import product
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
        codes = self._bytes(piece)
        if not self.read.groups:
            return codes
        if self.read.float8:
            return pltpu.bitcast(codes, jnp.float8_e4m3fn).astype(self.read.dtype)
        found = (codes.astype(jnp.int32) >> piece.shift) & piece.mask  # bytes cannot be shifted
        return found.astype(jnp.float32).astype(self.read.dtype)

    def signed(self, piece: Piece) -> Array:
        """What a piece's part of the codes is `affine` in, laid as its numbers: bits where they lie in signed bytes."""
        if not _of_codes(self.read):
            return self.numbers(piece)
        bits = piece.mask << piece.shift
        codes = self._bytes(piece) & jnp.uint8(bits)
        return pltpu.bitcast(codes ^ jnp.uint8(128) if bits > 127 else codes, jnp.int8).astype(self.read.dtype)

    def _bytes(self, piece: Piece) -> Array:
        part = pl.ds(piece.at, piece.width)
        return self._codes[0, part, :] if self._across else self._codes[0, :, part]

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


def _of_codes(read: Format) -> bool:
    return read.groups > 0 and not read.float8


def affine(read: Format, piece: Piece) -> tuple[float, float]:
    """Factor and offset that make `Page.signed` a piece's part of the codes."""
    if not _of_codes(read):
        return 1.0, 0.0
    factor = piece.weight * 2.0**-piece.shift
    return factor, 128 * factor if piece.mask << piece.shift > 127 else 0.0


class Line(NamedTuple):
    """Neighbouring pieces that are read at once, and multiplied with what is 0 for all but one of them."""

    piece: Piece  # all of them, as if of one group
    members: tuple[Piece, ...]

    def only(self, member: Piece, x: Float[Array, "G width"]) -> Float[Array, "G width"]:
        """`x` where it is the member's."""
        if len(self.members) == 1:
            return x
        place = self.piece.start + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        return jnp.where((place >= member.start) & (place < member.start + member.width), x, jnp.zeros_like(x))


def lines(pieces: Sequence[Piece], across: bool) -> tuple[Line, ...]:
    """Pieces as lines: of those beside each other on the lanes, which only a rotation could part."""
    found: list[Line] = []
    for piece in pieces:
        if found and not across:
            last, members = found[-1]
            after = last._replace(start=last.start + last.width, at=last.at + last.width)
            if after == piece._replace(width=after.width, group=after.group):
                found[-1] = Line(last._replace(width=last.width + piece.width), (*members, piece))
                continue
        found.append(Line(piece, (piece,)))
    return tuple(found)


def dot(a: Array, b: Array, over: tuple[int, int]) -> Array:
    """`product.dot`, also with a page of one slot."""
    if 1 in b.shape:  # a page of one slot: Mosaic multiplies by hand, numbers of 32 bits only
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return product.dot(a, b, over)
