"""Which implementation of a kernel runs."""

from typing import Literal

import jax

Implementation = Literal["xla", "cpu", "tpu", "gpu", "interpret"]


def resolve(implementation: Implementation | None, *, cpu: bool = False) -> Implementation:
    """The implementation for the default backend, unless one is given.

    `tpu` is lowered by Mosaic, `gpu` by Triton, `cpu` is C++ (`pallas_kernels.native`), `xla` is plain jnp; `interpret`
    runs the GPU kernel's program step by step on any platform.

    Args:
      implementation: which; None = the platform's. `cpu` is `xla` on other platforms.
      cpu: whether the operation has a kernel for CPUs; else `cpu` is `xla`.
    """
    chosen = implementation or jax.default_backend()
    if chosen == "cpu":
        return "cpu" if cpu and jax.default_backend() == "cpu" else "xla"
    return chosen  # pyright: ignore[reportReturnType]
