"""Weights in MXFP4: blocks of 32 numbers of 4 bits, each with a power of two, as gpt-oss has them.

Source: OCP Microscaling Formats 1.0; transformers `convert_moe_packed_tensors`.
"""

from collections.abc import Mapping

import ml_dtypes
import numpy as np
from jaxtyping import UInt8

from kvjax.checkpoint.header import Stored

NAME = "MXFP4"
_BLOCK = 32  # numbers that share a power of two
_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NUMBERS = np.asarray([*_HALF, *(-x for x in _HALF)], np.float32)


def joined(stored: Mapping[str, Stored]) -> Mapping[str, Stored]:
    """Tensors by name, `NAME_blocks [E out groups 16]` and `NAME_scales [E out groups]` as `NAME [E in out]`."""
    found = dict(stored)
    for name, blocks in stored.items():
        whole = name.removesuffix("_blocks")
        scales = stored.get(f"{whole}_scales")
        if whole == name or scales is None or whole in stored or {blocks.dtype, scales.dtype} != {"U8"}:
            continue
        if len(blocks.shape) != 4 or blocks.shape[3] != _BLOCK // 2 or scales.shape != blocks.shape[:3]:
            continue  # named as what has no place
        del found[name], found[f"{whole}_scales"]
        experts, out, groups, _ = blocks.shape
        found[whole] = blocks._replace(dtype=NAME, shape=(experts, groups * _BLOCK, out), others=(scales,))
    return found


def numbers(blocks: UInt8[np.ndarray, "E out groups half"], scales: UInt8[np.ndarray, "E out groups"]) -> np.ndarray:
    """The numbers `[E in out]` in bfloat16, which has all of them."""
    experts, out, groups, half = blocks.shape
    found = np.empty((experts, groups * 2 * half, out), ml_dtypes.bfloat16)
    for expert in range(experts):  # one at a time: float32 takes eight times the memory of its codes
        pairs = np.stack([blocks[expert] & 15, blocks[expert] >> 4], axis=-1)
        powers = np.ldexp(np.float32(1), scales[expert].astype(np.int32) - 127)
        whole = _NUMBERS[pairs].reshape(out, groups, -1) * powers[..., None]
        found[expert] = whole.reshape(out, -1).T
    return found
