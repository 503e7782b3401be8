"""Decode attention: one query per row over the row's pages."""

from typing import Any

from pallas_kernels.decode_attention import gpu, reference, tpu
from pallas_kernels.decode_attention.reference import EMPTY, Partial, merge, probabilities
from pallas_kernels.implementation import Implementation, resolve

__all__ = ["EMPTY", "Partial", "decode_attention", "merge", "probabilities"]


def decode_attention(*args: Any, implementation: Implementation | None = None, **kwargs: Any) -> Partial:
    """Attention of one query per row over the first slots of the row: the arguments of `reference.decode_attention`.

    Raises:
      NotImplementedError: where a kernel cannot do what is asked, which `xla` can.
    """
    chosen = resolve(implementation)
    if chosen == "xla":
        return reference.decode_attention(*args, **kwargs)
    for name in ("expand_key", "place", "slots"):
        if kwargs.pop(name, None) is not None:
            raise NotImplementedError(f"{name} is for xla only")
    if chosen == "tpu":
        return tpu.decode_attention(*args, **kwargs)
    return gpu.decode_attention(*args, interpret=chosen == "interpret", **kwargs)
