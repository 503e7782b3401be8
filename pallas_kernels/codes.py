"""Number formats of cached vectors: how codes become numbers again.

A decoder is called as `decode(codes, dtype)`. The reference path accepts any such function; the kernels know those of
this file and read their codes piece by piece, without numbers ever being written back to memory.

Scales and zero points are bfloat16, kept as bits in 16-bit integers. Numbers of a vector are cut into *groups* of
neighbours, with a scale and a zero point each; all are equal but the last, which may be smaller.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, UInt16

from pallas_kernels.packing import PLANES, unpack


@dataclasses.dataclass(frozen=True)
class Dense:
    """Numbers as they are, in any floating-point format."""

    def __call__(self, codes: Float[Array, "*b R"], dtype: DTypeLike) -> Float[Array, "*b R"]:
        """The numbers."""
        return codes.astype(dtype)


DENSE = Dense()
HALF = 64  # numbers of a group at most, if none is named: half a head of 128


@dataclasses.dataclass(frozen=True)
class Affine:
    """`code x scale + zero` with a scale and a zero point per vector and group; see `pallas_kernels.packing`.

    `{"codes": [... bytes], "scale": [... groups], "zero": [... groups]}`; `symmetric`: no zero points, codes are
    numbers around `middle`. `group`: numbers that share them; None = half of the vector, so that the two that a rotary
    embedding turns into each other are in different groups, and at most `HALF`.
    """

    bits: int
    symmetric: bool = False
    group: int | None = None

    @property
    def middle(self) -> int:
        """The code of 0 in the symmetric form."""
        return 2 ** (self.bits - 1) - 1

    def size(self, width: int) -> int:
        """Numbers of a group in vectors of `width` numbers.

        >>> Affine(4).size(128), Affine(4).size(624), Affine(4, group=32).size(624)
        (64, 64, 32)
        """
        return min(width, self.group or min(max(width // 2, 1), HALF))

    def __call__(self, codes: dict[str, Array], dtype: DTypeLike) -> Float[Array, "*b R"]:
        """The numbers."""
        number = unpack(codes["codes"], self.bits).astype(jnp.float32)
        width = number.shape[-1]
        of = lambda name: to_numbers(whole(codes[name]), self.size(width), width)
        x = (number - self.middle) * of("scale") if self.symmetric else number * of("scale") + of("zero")
        return x.astype(dtype)


@dataclasses.dataclass(frozen=True)
class Float8:
    """8-bit floating point (e4m3) with a scale per vector: `{"codes": [... R], "scale": [... 1]}`."""

    def __call__(self, codes: dict[str, Array], dtype: DTypeLike) -> Float[Array, "*b R"]:
        """The numbers."""
        number = jax.lax.bitcast_convert_type(codes["codes"], jnp.float8_e4m3fn)
        return (number.astype(jnp.float32) * whole(codes["scale"])).astype(dtype)


@dataclasses.dataclass(frozen=True)
class PerChannel:
    """`code x scale + zero` with a scale and a zero point per channel and run of `group` slots.

    The run's scales lie beside its slots, that of channel `c` in column `c // group` of the run's slot `c % group`:
    `{"codes": [... n bytes], "scale": [... n columns], "zero": [... n columns]}`, n a multiple of `group`.
    """

    bits: int
    group: int

    def __call__(self, codes: dict[str, Array], dtype: DTypeLike) -> Float[Array, "*b n R"]:
        """The numbers."""
        number = unpack(codes["codes"], self.bits)
        runs = number.astype(jnp.float32).reshape(*number.shape[:-2], -1, self.group, number.shape[-1])
        width = number.shape[-1]
        x = runs * self._gathered(codes["scale"], width) + self._gathered(codes["zero"], width)
        return x.reshape(number.shape).astype(dtype)

    def _gathered(self, scale: UInt16[Array, "*b n columns"], width: int) -> Float[Array, "*b runs 1 R"]:
        runs = scale.reshape(*scale.shape[:-2], -1, self.group, scale.shape[-1])
        runs = jnp.swapaxes(runs, -1, -2).reshape(*runs.shape[:-2], 1, -1)
        return whole(runs[..., :width])


def whole(bits: UInt16[Array, "*b"]) -> Float[Array, "*b"]:
    """The float32 whose upper 16 bits these are."""
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << jnp.uint32(16), jnp.float32)


def to_numbers(x: Float[Array, "*b groups"], size: int, width: int) -> Float[Array, "*b width"]:
    """What groups of `size` numbers have, for each of `width` numbers."""
    return jnp.repeat(x, size, axis=-1)[..., :width]


def to_groups(
    x: Float[Array, "*b width"], size: int, fill: Literal["edge", "constant"]
) -> Float[Array, "*b groups size"]:
    """Numbers by their groups; a smaller last one is filled up with its last number, or with zeros."""
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)], mode=fill)
    return padded.reshape(*x.shape[:-1], -1, size)


class Piece(NamedTuple):
    """Neighbouring numbers of a vector whose codes, or some of their bits, lie in neighbouring bytes.

    The vector is linear in its pieces: number `start + i` is the sum of `weight x bits of byte (at + i)` over the
    pieces that hold it, times the group's scale, plus its zero point.
    """

    start: int  # first number
    width: int  # numbers
    at: int  # first byte, or first number of a dense vector
    shift: int
    mask: int
    weight: int
    group: int


def pieces(bits: int, width: int, size: int, most: int | None = None) -> tuple[Piece, ...]:
    """The pieces of a packed vector, none across two groups.

    Args:
      bits: of a code.
      width: numbers of the vector.
      size: numbers of a group.
      most: largest width of a piece; the widths are then powers of two.

    >>> [(p.start, p.width, p.at, p.shift, p.weight) for p in pieces(4, 128, 64)]
    [(0, 64, 0, 0, 1), (64, 64, 0, 4, 1)]
    """
    found, at, low = [], 0, 0
    for plane in PLANES[bits]:
        count = width * plane // 8  # bytes of the plane
        for part in range(8 // plane):
            start = part * count
            while start < (part + 1) * count:
                end = min((part + 1) * count, (start // size + 1) * size)
                if most is not None:
                    end = start + min(most, 1 << (end - start).bit_length() - 1)
                byte = at + start - part * count
                found.append(Piece(start, end - start, byte, part * plane, (1 << plane) - 1, 1 << low, start // size))
                start = end
        at, low = at + count, low + plane
    return tuple(found)


def assemble(of: Sequence[Piece], parts: Sequence[Float[Array, "*b _"]]) -> Float[Array, "*b R"]:
    """Vectors from what their pieces contribute."""
    planes: dict[int, list[Array]] = {}
    for piece, part in zip(of, parts, strict=True):
        planes.setdefault(piece.weight, []).append(part)
    return functools.reduce(jnp.add, (jnp.concatenate(each, axis=-1) for each in planes.values()))


def groups_of(decode: Any, codes: Any) -> int:
    """Groups of the vectors of a pool."""
    return codes["scale"].shape[-1] if isinstance(decode, Affine) else 1


def width_of(decode: Any, codes: Any) -> int:
    """Numbers of the vectors of a pool."""
    if isinstance(decode, Affine | PerChannel):
        return codes["codes"].shape[-1] * 8 // decode.bits
    return (codes["codes"] if isinstance(codes, dict) else codes).shape[-1]
