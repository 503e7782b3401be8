"""How codes of less than a byte lie in bytes: the one layout that stores write and kernels read.

The bits of a vector's codes are cut into planes of 1, 2, 4 or 8 bits. In a plane of `w` bits for `W` numbers, byte `j`
holds the numbers `j, j + n, j + 2 n, ...` where `n = W w / 8` is the plane's bytes, the first of them in the lowest
bits. So a shift and a mask of whole bytes give a contiguous part of the vector, and the two halves of a rotary pair lie
in different parts.

    8, 4, 2 bits   one plane
    3 bits         a plane of the two low bits, then a plane of the high bit

>>> pack(jnp.asarray([1, 2, 3, 4], jnp.uint8), 4).tolist()  # numbers 0 and 2, numbers 1 and 3
[49, 66]
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import UInt8

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}  # bits of each plane, the lowest first


def packed_bytes(width: int, bits: int) -> int:
    """Bytes of the codes of a vector of `width` numbers, a multiple of 8 divided by the narrowest plane.

    >>> packed_bytes(128, 4), packed_bytes(128, 3)
    (64, 48)
    """
    return width * bits // 8


def pack(codes: UInt8[Array, "*b W"], bits: int) -> UInt8[Array, "*b bytes"]:
    """Codes of `bits` bits as bytes."""
    parts, low = [], 0
    for plane in PLANES[bits]:
        each = 8 // plane
        part = (codes >> jnp.uint8(low)) & jnp.uint8((1 << plane) - 1)
        part = part.reshape(*codes.shape[:-1], each, codes.shape[-1] // each)
        shift = (jnp.arange(each, dtype=jnp.uint8) * jnp.uint8(plane))[:, None]
        parts.append(jnp.sum(part << shift, axis=-2, dtype=jnp.uint8))
        low += plane
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def unpack(packed: UInt8[Array, "*b bytes"], bits: int) -> UInt8[Array, "*b W"]:
    """Bytes as codes of `bits` bits."""
    width = packed.shape[-1] * 8 // bits
    codes, start, low = jnp.zeros((), jnp.uint8), 0, 0
    for plane in PLANES[bits]:
        size, mask = width * plane // 8, jnp.uint8((1 << plane) - 1)
        shift = jnp.arange(0, 8, plane, dtype=jnp.uint8)[:, None]
        part = (packed[..., None, start : start + size] >> shift) & mask
        codes = codes | (part.reshape(*packed.shape[:-1], width) << jnp.uint8(low))
        start, low = start + size, low + plane
    return codes
