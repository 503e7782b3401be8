"""Copies of kept tokens' vectors on TPUs: Pallas, lowered by Mosaic.

A row's vectors are streamed into vector memory once, at the memory's speed, and kept ones are picked there: memory is
read by tiles, so to fetch a single vector of 16-bit numbers would read 16. Vector memory is addressed by words of 32
bits, each with a number of 2 or 4 tokens; a word of the result is put together from as many others.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Int, Shaped

from pallas_kernels.blocks import LANES

BLOCK = 512  # slots of a program
TILE = 8  # words
SPARE = 2 << 20  # bytes of vector memory beside what is held


def copy(
    source: Shaped[Array, "r T W"], index: Int[Array, "r n"], count: Int[Array, " r"], interpret: Any = False
) -> Shaped[Array, "r n W"]:
    """The vectors of the tokens that each row's first `count` indices name; zeros after them.

    Rows that are longer than vector memory are XLA's to copy.
    """
    (r, t, width), n, itemsize = source.shape, index.shape[1], source.dtype.itemsize
    index = jnp.clip(index, 0, t - 1)
    words = TILE * 4 // itemsize
    tokens, block = pl.cdiv(t, words) * words, min(BLOCK, pl.cdiv(n, words) * words)
    blocks = pl.cdiv(n, block)
    lanes = pl.cdiv(width, LANES) * LANES
    held = lambda buffers: (buffers * tokens + 2 * block) * lanes * itemsize + SPARE
    buffers = 2  # one is filled while the other is read
    if not interpret:
        room = pltpu.get_tpu_info().vmem_capacity_bytes
        buffers = 2 if held(2) <= room else 1
        if held(1) > room:
            found = jnp.take_along_axis(source, index[..., None], axis=1)
            return jnp.where((jnp.arange(n) < count[:, None])[..., None], found, jnp.zeros((), source.dtype))
    index = jnp.pad(index, ((0, 0), (0, blocks * block - n)))
    found = pl.pallas_call(
        functools.partial(_copy, block=block),
        out_shape=jax.ShapeDtypeStruct((r, blocks * block, width), source.dtype),
        grid=(r, blocks),
        in_specs=[
            pl.BlockSpec((1, 1, 1), lambda i, j: (i, 0, 0), memory_space=pltpu.SMEM),
            pl.BlockSpec((1, 1, block), lambda i, j: (i * blocks + j, 0, 0), memory_space=pltpu.SMEM),
            pl.BlockSpec((1, tokens, width), lambda i, j: (i, 0, 0), pipeline_mode=pl.Buffered(buffers)),
        ],
        out_specs=pl.BlockSpec((1, block, width), lambda i, j: (i, j, 0)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=held(buffers)
        ),
        interpret=interpret,
        name="topk_retain_copy",
    )(count[:, None, None], index.reshape(r * blocks, 1, block), jnp.pad(source, ((0, 0), (0, tokens - t), (0, 0))))
    return found[:, :n]


def _copy(count_ref: Any, index_ref: Any, source_ref: Any, out_ref: Any, *, block: int) -> None:
    per = 4 // source_ref.dtype.itemsize
    bits, each = 32 // per, TILE * per
    word = jax.lax.broadcasted_iota(jnp.int32, (TILE, source_ref.shape[2]), 0)
    left = count_ref[0, 0, 0] - pl.program_id(1) * block

    def tile(i: Array, _: None) -> None:
        total = jnp.zeros(word.shape, jnp.int32)
        for slot in range(each):
            token = index_ref[0, 0, i * each + slot]
            near = source_ref[0, pl.ds(pl.multiple_of(token & -each, each), each), :]
            place = token >> (per.bit_length() - 1)  # of its word
            x = pltpu.roll(pltpu.bitcast(near, jnp.int32), (slot // per - place) & (TILE - 1), 0)
            if per > 1:
                x = jax.lax.shift_right_logical(x, jnp.broadcast_to(bits * (token & (per - 1)), x.shape))
                x = (x & ((1 << bits) - 1)) << (bits * (slot % per))
            total |= jnp.where(word == slot // per, x, 0)
        filled = jnp.clip(left - i * each - word * per, 0, per)  # of a word's numbers
        total &= jnp.where(filled == per, -1, (1 << (bits * filled % 32)) - 1)
        out_ref[0, pl.ds(pl.multiple_of(i * each, each), each), :] = pltpu.bitcast(total, out_ref.dtype)

    jax.lax.fori_loop(0, block // each, tile, None)
