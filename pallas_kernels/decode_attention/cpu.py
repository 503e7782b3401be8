"""Decode attention on CPUs: `cpu.cc`, compiled at first use (`pallas_kernels.native`).

A step is bound by the bytes of the cache. XLA gathers a block of pages before it multiplies, and writes numbers of few
bits back before it reads them; this kernel reads pages where they lie, and multiplies codes in registers.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from pallas_kernels import native
from pallas_kernels.codes import Affine, Dense, Float8, PerChannel
from pallas_kernels.decode_attention.formats import format_of
from pallas_kernels.decode_attention.reference import KeyExpansion, PagedKV, Partial, merge

NAME = "pallas_kernels.decode_attention"
SYMBOL = "decode_attention"
SOURCE = Path(__file__).with_name("cpu.cc")
KINDS = (Dense, Affine, Float8, PerChannel)  # `Kind` of the source


def register() -> None:
    """Compile the kernel, where that has not been done; raises `NotImplementedError` where it cannot be."""
    native.register(NAME, SOURCE, SYMBOL)


def decode_attention(
    parts: Sequence[PagedKV],
    *,
    scale: float,
    after: Int[Array, "B K"] | None = None,
    cap: float | None = None,
    place: Callable[[Int[Array, "B K S"]], Int[Array, "B K S"]] | None = None,
    expand: KeyExpansion | None = None,
    with_logits: bool = False,
) -> Partial:
    """Attention of one query per row: the contract of `reference.decode_attention`, a call for each part.

    Products are of float32 numbers, whatever the dtype of queries and pages.
    """
    if expand is not None and expand[1:] != (None, None, None):
        raise NotImplementedError("low-rank keys, or keys with biases or norms added at read, are for xla only")
    if expand is not None and expand.rotation.table is None:
        raise NotImplementedError("keys that are rotated at read without a table of angles are for xla only")
    formats = [
        [_format("keys", part.decode_key, part.k), _format("values", part.decode_value, part.v)] for part in parts
    ]
    register()
    found = [
        _attend(part, *each, scale=scale, after=after, cap=cap, place=place, expand=expand, with_logits=with_logits)
        for part, each in zip(parts, formats, strict=True)
    ]
    return merge(found)


def _attend(
    part: PagedKV, key: np.ndarray, value: np.ndarray, *, scale: float, after: Any, cap: Any, place: Any, expand: Any,
    with_logits: bool,
) -> Partial:  # fmt: skip
    heads = part.q.shape[:3]
    if part.q.shape[3] != int(key[1]):
        raise ValueError(f"queries have {part.q.shape[3]} numbers, and keys {int(key[1])}")
    where = after is not None or expand is not None  # somebody asks where slots are
    none = lambda dtype: jnp.zeros(0, dtype)
    float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    logits = float32(*heads, part.capacity) if with_logits else float32(0)
    cos, sin = (none(jnp.float32),) * 2 if expand is None else expand.rotation.table
    call = jax.ffi.ffi_call(NAME, (float32(*heads, int(value[1])), float32(*heads), float32(*heads), logits))
    o, l, m, logits = call(
        *(part.q.astype(jnp.float32), *_arrays(part.k), *_arrays(part.v), part.table, part.length),
        none(jnp.int32) if part.pos is None or not where else part.pos,
        none(jnp.int32) if place is None or not where else part.places(place),
        none(jnp.int32) if after is None else jnp.broadcast_to(after, heads[:2]).astype(jnp.int32),
        none(bool) if part.slots is None else part.slots,
        *(cos.astype(jnp.float32), sin.astype(jnp.float32)),
        scale=np.float32(scale),
        cap=np.float32(cap or 0),
        key=key,
        value=value,
    )
    return Partial(o, l, m, (logits,) if with_logits else ())


def _arrays(codes: Any) -> tuple[Array, Array, Array]:
    """Codes, scales and zero points; empty where there are none."""
    if not isinstance(codes, dict):
        codes = {"codes": codes}
    return codes["codes"], *(codes.get(name, jnp.zeros(0, jnp.uint16)) for name in ("scale", "zero"))


def _format(name: str, decode: Any, codes: Any) -> np.ndarray:
    """How a pool is read, as the source has it: kind, width, offset, run, then pieces."""
    read = format_of(name, decode, codes, jnp.float32)
    if read.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"{name} of {read.dtype} are for xla only")
    kind = next(i for i, each in enumerate(KINDS) if isinstance(decode, each))
    return np.asarray(
        [kind, read.width, read.offset or 0, read.run, *(x for piece in read.pieces for x in piece)], np.int64
    )
