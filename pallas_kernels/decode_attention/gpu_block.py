"""How a GPU kernel reads a block of a row's slots: its codes, as numbers, its scales and its positions."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.codes import Piece, whole
from pallas_kernels.decode_attention.formats import Format


class Block:
    """A block of a row's slots, and how its part of a pool is loaded."""

    def __init__(self, table: Any, row: Array, index: Array, page: int, block: int, length: Array):
        self._first = pl.multiple_of(index * block, block)
        self.slot = self._first + jnp.arange(block)
        self._block, self._filled = block, self.slot < length
        self._whole = page % block == 0  # the block is a part of one page
        if self._whole:
            self._page, self._offset = table[row, index * block // page], pl.multiple_of(index * block % page, block)
        else:
            logical = jnp.where(self._filled, self.slot // page, 0)
            self._page, self._offset = plt.load(table.at[row, logical]), self.slot % page

    def vectors(self, pool: Any, start: int | Array, width: int) -> Array:
        """`[block width]` of a pool `[P page ...]`."""
        if self._whole:
            return pool.at[self._page, pl.ds(self._offset, self._block), pl.ds(start, width)][...]
        shape = self._block, width
        column = start + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        page, offset, filled = (jnp.broadcast_to(x[:, None], shape) for x in (self._page, self._offset, self._filled))
        return plt.load(pool.at[page, offset, column], mask=filled, other=0)

    def numbers(self, pool: Any, column: int) -> Array:
        """`[block]` of a pool `[P page ...]`: one column."""
        if self._whole:
            return pool.at[self._page, pl.ds(self._offset, self._block), column][...]
        at = jnp.full((self._block,), column, jnp.int32)
        return plt.load(pool.at[self._page, self._offset, at], mask=self._filled, other=0)

    def spread(self, pool: Any, piece: Piece, run: int) -> Array:
        """`[width]` of the scales that a run of slots, this block, keeps beside it."""
        channel = piece.start + jnp.arange(piece.width)
        offset = self._offset if self._whole else self._offset[0]
        page = self._page if self._whole else self._page[0]
        return whole(plt.load(pool.at[page, offset + channel % run, channel // run]))

    def place(self, part: dict[str, Any], row: Array) -> Array:
        """The slots' places: what became of their positions, or those."""
        pool = part["pos"]
        if part["place"] is not None:
            return part["place"].at[row, pl.ds(self._first, self._block)][...]
        if pool is None:
            return self.slot
        if self._whole:
            return pool.at[self._page, pl.ds(self._offset, self._block)][...]
        return plt.load(pool.at[self._page, self._offset], mask=self._filled, other=0)


def bias_of(read: Format) -> int:
    """What `spread` adds to the codes of a piece."""
    return 128 if read.bits < 8 and read.dtype == jnp.bfloat16 else 0


def spread(codes: Array, piece: Piece, read: Format, interpret: bool) -> Array:
    """A piece's codes as numbers; bfloat16 has a bias of 128 for codes of less than 8 bits.

    0x4300 is 128 in bfloat16, and its seven fraction bits count from 1: a code or-ed into them is 128 + code.
    Source: the trick with float16's 0x6400 in FasterTransformer's and BitDecoding's (arXiv 2503.18773) dequantisation.
    """
    if read.float8:
        return jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(read.dtype)
    if interpret or not bias_of(read):
        if read.bits < 8:
            codes = (codes >> jnp.uint8(piece.shift)) & jnp.uint8(piece.mask)
        return codes.astype(read.dtype) + jnp.asarray(bias_of(read), read.dtype)
    (numbers,) = plt.elementwise_inline_asm(
        assembly(piece),
        args=[codes],
        constraints="=r,=r,r",
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(codes.shape, jnp.bfloat16)],
    )
    return numbers


def assembly(piece: Piece) -> str:
    """PTX that turns four bytes, `$2`, into four biased bfloat16 numbers, `$0` and `$1`."""
    mask = piece.mask << 16 | piece.mask
    shift = f"shr.u32 x, $2, {piece.shift};" if piece.shift else "mov.b32 x, $2;"
    spread = lambda out, two: (
        f"prmt.b32 h, x, 0, {two}; lop3.b32 ${out}, h, {mask:#010x}, 0x43004300, 0xEA;"  # (h & mask) | 128
    )
    return f"{{ .reg .b32 x, h; {shift} {spread(0, '0x4140')} {spread(1, '0x4342')} }}"
