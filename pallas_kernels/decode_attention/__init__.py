"""Decode attention: one query per row over the pages of the row's parts."""

from collections.abc import Sequence
from typing import Any

from pallas_kernels.decode_attention import gpu, reference, tpu
from pallas_kernels.decode_attention.reference import EMPTY, Expand, Part, Partial, merge, probabilities
from pallas_kernels.implementation import Implementation, resolve

__all__ = ["EMPTY", "Expand", "Part", "Partial", "decode_attention", "merge", "probabilities"]


def decode_attention(parts: Sequence[Part], *, implementation: Implementation | None = None, **options: Any) -> Partial:
    """Attention of one query per row over all parts of the row: the arguments of `reference.decode_attention`.

    Raises:
      NotImplementedError: where a kernel cannot do what is asked, which `xla` can.
    """
    chosen = resolve(implementation)
    if chosen == "xla":
        return reference.decode_attention(parts, **options)
    if any(part.slots is not None for part in parts):
        raise NotImplementedError("a choice of slots is for xla only")
    if chosen == "tpu":
        return tpu.decode_attention(parts, **options)
    return gpu.decode_attention(parts, interpret=chosen == "interpret", **options)
