"""Packed vectors in plain jnp, piece by piece: what meets a piece is scaled, and codes are never put together.

    q . key      = sum over pieces   scale (q . codes) + zero (sum of q)
    sum p value  = beside each other (p scale) . codes + p . zero

For CPUs, where to make numbers of codes that share bytes takes several times as long as to read them.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from pallas_kernels.codes import Affine, Piece, assemble, pieces, to_groups, to_numbers, whole, width_of

MOST = 16  # pieces of a vector


def reads(decode: Any, codes: Any) -> bool:
    """Whether several numbers share a byte, in few pieces."""
    return isinstance(decode, Affine) and decode.bits < 8 and len(_pieces(codes, decode)) <= MOST


def scores(q: Float[Array, "B K G R"], codes: dict[str, Array], read: Affine) -> Float[Array, "B K G s"]:
    """Products of queries and keys, in float32."""
    scale, zero = _lines(codes, read)
    of_query = to_groups(q.astype(jnp.float32), read.size(q.shape[-1]), "constant").sum(axis=-1)
    found = jnp.einsum("bkgn,bksn->bkgs", of_query, zero)
    for piece in _pieces(codes, read):
        part = q[..., piece.start : piece.start + piece.width]
        product = jnp.einsum(
            "bkgr,bksr->bkgs", part, _numbers(codes, piece, q.dtype), preferred_element_type=jnp.float32
        )
        found += product * (piece.weight * scale[:, :, None, :, piece.group])
    return found


def sums(
    p: Float[Array, "B K G s"], codes: dict[str, Array], read: Affine, dtype: DTypeLike
) -> Float[Array, "B K G W"]:
    """Values that are weighted and added, in float32; `dtype` is what they are multiplied in."""
    of, (scale, zero) = _pieces(codes, read), _lines(codes, read)
    add = functools.partial(jnp.einsum, "bkgs,bksr->bkgr", preferred_element_type=jnp.float32)
    weights = [(p * scale[:, :, None, :, piece.group] * piece.weight).astype(dtype) for piece in of]
    found = assemble(of, [add(x, _numbers(codes, piece, dtype)) for x, piece in zip(weights, of, strict=True)])
    width = found.shape[-1]
    return found + to_numbers(add(p, zero), read.size(width), width)


def _pieces(codes: dict[str, Array], read: Affine) -> tuple[Piece, ...]:
    width = width_of(read, codes)
    return pieces(read.bits, width, read.size(width))


def _lines(codes: dict[str, Array], read: Affine) -> tuple[Float[Array, "B K s groups"], Float[Array, "B K s groups"]]:
    """Scales and zero points."""
    scale = whole(codes["scale"])
    return scale, -read.middle * scale if read.symmetric else whole(codes["zero"])


def _numbers(codes: dict[str, Array], piece: Piece, dtype: DTypeLike) -> Float[Array, "B K s width"]:
    part = codes["codes"][..., piece.at : piece.at + piece.width]
    return ((part >> jnp.uint8(piece.shift)) & jnp.uint8(piece.mask)).astype(dtype)
