"""Prefill attention: exact causal attention over padded prompts, with each query's log-sum-exp."""

from typing import Any

from jax import Array
from jaxtyping import Float

from pallas_kernels.implementation import Implementation, resolve
from pallas_kernels.prefill_attention import reference

__all__ = ["attention"]


def attention(
    *args: Any, implementation: Implementation | None = None, **kwargs: Any
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention over prompts: the arguments of `reference.attention`.

    `cpu` is C++, `tpu` JAX's splash attention, `gpu` cuDNN's; `interpret` runs the TPU's step by step on any platform.

    Raises:
      NotImplementedError: where a kernel cannot do what is asked, which `xla` can.
    """
    chosen = resolve(implementation, cpu=True)
    if chosen == "xla":
        return reference.attention(*args, **kwargs)
    if chosen == "cpu":
        from pallas_kernels.prefill_attention import cpu

        return cpu.attention(*args, **kwargs)
    if kwargs.pop("visible_until", None) is not None:
        raise NotImplementedError("keys that are seen for a while only are for xla")
    if kwargs.pop("behind", None) is not None:
        raise NotImplementedError("queries behind a prompt are for xla")
    if chosen == "gpu":
        from pallas_kernels.prefill_attention import gpu

        return gpu.attention(*args, **kwargs)
    from pallas_kernels.prefill_attention import tpu

    return tpu.attention(*args, interpret=chosen == "interpret", **kwargs)
