"""How the kernels of decode attention read a pool: its numbers as pieces of codes."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.codes import Affine, Dense, Float8, PerChannel, Piece, groups_of, pieces, width_of


class Format(NamedTuple):
    """How a kernel reads one of the two pools of a part; hashable."""

    pieces: tuple[Piece, ...]
    dtype: Any  # of the numbers that are multiplied
    groups: int = 0  # with a scale each; 0 = no scales
    size: int = 0  # numbers of a group; the last may be smaller
    bits: int = 16
    offset: int | None = None  # of all codes, instead of zero points
    float8: bool = False
    run: int = 0  # slots that share the scales of their channels; 0 = each slot has its own

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        return max(piece.start + piece.width for piece in self.pieces)


def format_of(name: str, decode: Any, codes: Any, dtype: DTypeLike, most: int | None = None) -> Format:
    """How a pool is read; raises `NotImplementedError` for what no kernel can read.

    Args:
      name: of the numbers, for the message.
      decode: one of `pallas_kernels.codes`.
      codes: the pool.
      dtype: of the query.
      most: largest width of a piece; the widths are then powers of two.
    """
    width, dtype = width_of(decode, codes), jnp.dtype(dtype)
    if isinstance(decode, Dense):
        return Format(pieces(8, width, width, most), codes.dtype)
    if isinstance(decode, Affine):
        groups, offset = groups_of(decode, codes), -decode.middle if decode.symmetric else None
        size = decode.size(width)
        return Format(pieces(decode.bits, width, size, most), dtype, groups, size, decode.bits, offset)
    if isinstance(decode, Float8):
        return Format(pieces(8, width, width, most), dtype, 1, width, 8, offset=0, float8=True)
    if isinstance(decode, PerChannel):
        return Format(pieces(decode.bits, width, width, most), dtype, 1, width, decode.bits, run=decode.group)
    raise NotImplementedError(f"{name} in the format {decode} are for xla only")
