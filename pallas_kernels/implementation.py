"""Which implementation of a kernel runs."""

from typing import Literal

import jax

Implementation = Literal["xla", "tpu", "gpu", "interpret"]


def resolve(implementation: Implementation | None) -> Implementation:
    """The implementation for the default backend, unless one is given.

    `tpu` is lowered by Mosaic, `gpu` by Triton, `xla` is plain jnp; `interpret` runs the GPU kernel's program step by
    step on any platform.
    """
    if implementation is None:
        return {"tpu": "tpu", "gpu": "gpu"}.get(jax.default_backend(), "xla")  # pyright: ignore[reportReturnType]
    return implementation
