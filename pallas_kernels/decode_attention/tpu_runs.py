"""Keys whose scales belong to runs of slots, as a TPU kernel reads them: a scale per channel (KIVI).

A run's scales lie beside its slots: of its lines, each holds those of as many channels as the run has slots. Queries
come in the same order, once for every run of a page, and take scales and zero points up number by number. Then a
piece's part of each run's queries meets the codes of all slots, and each slot keeps the product of its own run.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from pallas_kernels.codes import Piece, pieces
from pallas_kernels.decode_attention.formats import Format
from pallas_kernels.decode_attention.tpu_page import Page, affine, dot

SUBLANES = 8


def cut(key: Format, page: int) -> tuple[Piece, ...]:
    """Pieces whose channels are in one line each; raises `NotImplementedError` where runs or lines do not fit."""
    if page % key.run:
        raise NotImplementedError(f"runs of {key.run} slots in pages of {page}, across two of them")
    if key.width > key.run and key.width % key.run:
        raise NotImplementedError(f"keys of {key.width} numbers with scales of {key.run} in a line")
    return pieces(key.bits, key.width, key.run)


def queries(q: Float[Array, "rows G R"], run: int, page: int) -> Float[Array, "rows lines g page"]:
    """Queries in the order of a page's scales; g is a multiple of 8."""
    rows, g, width = q.shape
    lines = -(-width // run)
    padded = jnp.pad(q.astype(jnp.float32), ((0, 0), (0, -g % SUBLANES), (0, lines * run - width)))
    return jnp.tile(jnp.moveaxis(padded.reshape(rows, -1, lines, run), 2, 1), page // run)


def scores(page: Page, query: Float[Array, "lines g page"]) -> Float[Array, "g page"]:
    """Before the scale of logits."""
    read, (lines, g, slots) = page.read, query.shape
    runs = range(slots // read.run)
    scaled = [query[line] * page.scale(line) for line in range(lines)]
    shift = functools.reduce(jnp.add, (query[line] * page.zero(line) for line in range(lines)))
    products = jnp.zeros((len(runs) * g, slots), jnp.float32)
    lane = jax.lax.broadcasted_iota(jnp.int32, shift.shape, 1)
    for piece in read.pieces:
        (line, first), (factor, offset) = divmod(piece.start, read.run), affine(read, piece)
        starts = [run * read.run + first for run in runs]
        of_runs = jnp.concatenate([scaled[line][:, at : at + piece.width] for at in starts], axis=0)
        products += dot(of_runs.astype(read.dtype), page.signed(piece), (1, 1 - page.axis)) * factor
        if offset:
            inside = (lane % read.run >= first) & (lane % read.run < first + piece.width)
            shift += jnp.where(inside, scaled[line] * offset, 0.0)
    own, total = lane // read.run, jnp.zeros_like(shift)
    for run in runs:
        zero = jnp.where(own == run, shift, 0.0).sum(axis=1, keepdims=True)
        total = jnp.where(own == run, products[run * g : (run + 1) * g] + zero, total)
    return total
