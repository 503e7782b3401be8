"""Keys of a block that a GPU kernel expands from latents and rotates as it reads them.

A head's key is made in two halves, which the rotation mixes, and meets the queries at once: at most one head's keys of
a block are in registers. Latents of low bits are decoded before they are expanded, which is little beside the products.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.codes import Piece, whole
from pallas_kernels.decode_attention.formats import Format
from pallas_kernels.decode_attention.gpu_block import Block, bias_of, spread
from pallas_kernels.decode_attention.reference import KeyExpansion
from pallas_kernels.product import dot

SLOTS = 64  # of a step: the halves of a head's keys are kept in registers beside the sums of values
MOST = 8192  # sums of values beside which registers hold coded latents
WARPS = 8  # whose registers hold the sums of wide values of many query heads
TURN = (6.28125, 1.93500518798828125e-3, 3.0199159819565e-7)  # 2 pi in parts


def check(expand: KeyExpansion, key: Format, value: Format, lanes: int) -> None:
    """Raise `NotImplementedError` for what the kernel cannot do."""
    half = expand.rotation.frequency.shape[-1]
    if expand.norm is not None:
        raise NotImplementedError("keys of latents with a norm are for xla only")
    if expand.rotation.still:
        raise NotImplementedError("heads that turn in part when they are read are for xla only")
    if half & (half - 1) or half < 16:
        raise NotImplementedError(f"the halves of rotated heads are {half} numbers, not a power of two from 16 on")
    if expand.up is not None and chunk(key.width) < 16:
        raise NotImplementedError(f"latents of {key.width} numbers, not of a multiple of 16, are for xla only")
    if expand.up is not None and (key.groups or value.groups) and lanes * value.width > MOST:
        raise NotImplementedError(
            f"latents of few bits, {value.width} numbers for {lanes} query heads, are for xla only"
        )
    if key.run:
        raise NotImplementedError("keys per channel that are rotated when they are read are for xla only")


def stages(expand: KeyExpansion, keys: Sequence[Format]) -> int:
    """Of the pipeline: shared memory does not hold the factors of all pieces of coded latents twice."""
    return 1 if expand.up is not None and any(key.groups for key in keys) else 2


def chunk(rank: int) -> int:
    """Numbers of a latent that are expanded at a time, a power of two: the loop over them is pipelined."""
    return min(64, rank & -rank)


def operands(expand: KeyExpansion, rows: tuple[int, ...]) -> dict[str, Any]:
    """What the kernel reads beside a part."""
    frequency = expand.rotation.frequency
    frequency = jnp.broadcast_to(frequency, (*rows, frequency.shape[-1])).reshape(-1, frequency.shape[-1])
    return {"frequency": frequency, "up": expand.up, "bias": expand.bias}


def scores(
    part: dict[str, Any], expand: dict[str, Any], at: Block, *, row: Array, key: Format, interpret: bool
) -> Array:
    """`[block lanes]`, before the scale of logits."""
    half, (_, lanes, width) = expand["frequency"].shape[1], part["q"].shape
    place = at.place(part, row).astype(jnp.float32)[:, None]

    def angles(start: int, size: int) -> tuple[Array, Array]:
        theta = place * expand["frequency"].at[row, pl.ds(start, size)][...][None, :]
        return _cos_sin(theta, interpret)

    def score(halves: list[Array], start: Any, size: int, turn: tuple[Array, Array]) -> Array:
        """Of numbers from `start` on, and of those that they are paired with."""
        (a, b), (cos, sin) = (x.astype(jnp.float32) for x in halves), turn
        query = [part["q"].at[row, :, pl.ds(first, size)][...] for first in (start, start + half)]
        keys = [x.astype(query[0].dtype) for x in (a * cos - b * sin, b * cos + a * sin)]
        return dot(keys[0], query[0], (1, 1)) + dot(keys[1], query[1], (1, 1))

    if expand["up"] is None:
        total = jnp.zeros((place.shape[0], lanes), jnp.float32)
        for piece, twin in _pairs(key, half):
            halves = [_numbers(part["k"], at, x, key, interpret) for x in (piece, twin)]
            if piece.weight == 1:  # once for all planes of the codes
                starts = piece.start, twin.start
                halves = [_biased(x, expand, row, start, piece.width) for x, start in zip(halves, starts, strict=True)]
            total += score(halves, piece.start, piece.width, angles(piece.start, piece.width))
        return total
    turn = angles(0, half)

    def head(i: Array, total: Array) -> Array:
        first = pl.multiple_of(i * 2 * half, 2 * half)
        halves = [_expanded(part["k"], at, expand, row, first + x, half, key, interpret) for x in (0, half)]
        return total + score(halves, first, half, turn)

    return jax.lax.fori_loop(0, width // (2 * half), head, jnp.zeros((place.shape[0], lanes), jnp.float32))


def _pairs(key: Format, half: int) -> list[tuple[Piece, Piece]]:
    """The pieces of the first half of a key, and those that the rotation pairs them with."""
    of = {(piece.start, piece.weight): piece for piece in key.pieces}
    return [(x, of[x.start + half, x.weight]) for x in key.pieces if x.start < half]


def _numbers(pool: Any, at: Block, piece: Piece, read: Format, interpret: bool) -> Array:
    """What a piece contributes to the cached numbers, `[block width]`."""
    if not read.groups:
        return at.vectors(pool, piece.at, piece.width)
    codes = spread(at.vectors(pool["codes"], piece.at, piece.width), piece, read, interpret)
    number = (codes.astype(jnp.float32) - bias_of(read)) * piece.weight
    scale = whole(at.numbers(pool["scale"], piece.group))[:, None]
    if piece.weight == 1:
        if read.offset is not None:
            number += read.offset
        else:
            return (number * scale + whole(at.numbers(pool["zero"], piece.group))[:, None]).astype(read.dtype)
    return (number * scale).astype(read.dtype)


def _expanded(
    pool: Any, at: Block, expand: dict[str, Any], row: Array, first: Array, size: int, key: Format, interpret: bool
) -> Array:
    """Numbers from `first` on of the keys of latents, `[block size]`."""
    up = expand["up"]
    heads = row % up.shape[0]
    from_ = lambda start, width: up.at[heads, pl.ds(start, width), pl.ds(first, size)][...]
    total = jnp.zeros((at.slot.shape[0], size), jnp.float32)
    if key.groups:
        for piece in key.pieces:
            number = _numbers(pool, at, piece, key, interpret)
            total += dot(number.astype(up.dtype), from_(piece.start, piece.width), (1, 0))
    else:
        width = chunk(key.width)

        def more(i: Array, total: Array) -> Array:
            start = pl.multiple_of(i * width, width)
            return total + dot(at.vectors(pool, start, width).astype(up.dtype), from_(start, width), (1, 0))

        total = jax.lax.fori_loop(0, key.width // width, more, total)
    return _biased(total.astype(up.dtype), expand, row, first, size)


def _biased(x: Array, expand: dict[str, Any], row: Array, first: Any, size: int) -> Array:
    """Numbers from `first` on of keys `[block size]`, with the bias."""
    bias = expand["bias"]
    return x if bias is None else x + bias.at[row % bias.shape[0], pl.ds(first, size)][...][None, :]


def _cos_sin(theta: Array, interpret: bool) -> tuple[Array, Array]:
    """The hardware's functions want small angles."""
    if interpret:
        return jnp.cos(theta), jnp.sin(theta)
    theta, found = reduced(theta), []
    for name in ("cos", "sin"):
        (x,) = plt.elementwise_inline_asm(
            f"{name}.approx.f32 $0, $1;",
            args=[theta],
            constraints="=f,f",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(theta.shape, jnp.float32)],
        )
        found.append(x)
    return found[0], found[1]


def reduced(theta: Array) -> Array:
    """The angle from -pi to pi that is the same direction.

    Source: Cody and Waite, 1980: 2 pi in parts, whose multiples are exact.
    """
    turns = jnp.floor(theta / (2 * math.pi) + 0.5)
    for part in TURN:
        theta -= turns * part
    return theta
