"""Top-k retention: the best tokens of each row, and what a cache keeps of them, in the order of their priorities."""

from typing import Any

from pallas_kernels.implementation import Implementation, resolve
from pallas_kernels.topk_retain import reference
from pallas_kernels.topk_retain.reference import Kept

__all__ = ["Kept", "topk_retain"]


def topk_retain(*args: Any, implementation: Implementation | None = None, **kwargs: Any) -> Kept:
    """The best tokens of each row: the arguments of `reference.topk_retain`.

    Raises:
      NotImplementedError: where a kernel cannot do what is asked, which `xla` can.
    """
    chosen = resolve(implementation)
    if chosen == "xla":
        return reference.topk_retain(*args, **kwargs)
    if chosen == "tpu":
        from pallas_kernels.topk_retain import tpu

        return tpu.topk_retain(*args, **kwargs)
    from pallas_kernels.topk_retain import gpu

    return gpu.topk_retain(*args, interpret=chosen == "interpret", **kwargs)
