"""Segment merging: runs of tokens become one weighted mean each (DMC)."""

from typing import Any

from jax import Array
from jaxtyping import Float

from pallas_kernels.implementation import Implementation, resolve
from pallas_kernels.segment_merge import reference
from pallas_kernels.segment_merge.reference import segment_sums

__all__ = ["pool", "segment_sums"]


def pool(*args: Any, implementation: Implementation | None = None, **kwargs: Any) -> Float[Array, "B T K n"]:
    """Running means of segments: the arguments of `reference.pool`, and differentiable as that.

    Raises:
      NotImplementedError: where a kernel cannot do what is asked, which `xla` can.
    """
    chosen = resolve(implementation)
    if chosen == "xla":
        return reference.pool(*args, **kwargs)
    if chosen == "tpu":
        from pallas_kernels.segment_merge import tpu

        return tpu.pool(*args, **kwargs)
    from pallas_kernels.segment_merge import gpu

    return gpu.pool(*args, interpret=chosen == "interpret", **kwargs)
