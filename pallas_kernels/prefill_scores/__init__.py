"""Prefill scores: how much attention each prompt token received, without the T x T matrix."""

from typing import Any

from jax import Array
from jaxtyping import Float

from pallas_kernels import tuning
from pallas_kernels.implementation import Implementation, resolve
from pallas_kernels.prefill_scores import reference

__all__ = ["column_sums"]


def column_sums(*args: Any, implementation: Implementation | None = None, **kwargs: Any) -> Float[Array, "B N T"]:
    """Attention that each token received from queries: the arguments of `reference.column_sums`.

    Without `block` it is that of `pallas_kernels.tuning`, where one was measured.

    Raises:
      NotImplementedError: where a kernel cannot do what is asked, which `xla` can.
    """
    chosen = resolve(implementation)
    kwargs = tuning.settings("column_sums", chosen, _shape(*args, **kwargs), kwargs)
    if chosen == "xla":
        return reference.column_sums(*args, **kwargs)
    if chosen == "tpu":
        from pallas_kernels.prefill_scores import tpu

        return tpu.column_sums(*args, **kwargs)
    from pallas_kernels.prefill_scores import gpu

    return gpu.column_sums(*args, interpret=chosen == "interpret", **kwargs)


def _shape(q: Array, k: Array, *_: Any, **options: Any) -> tuning.Shape:
    """What the best block depends on."""
    b, t, n, width = q.shape
    limits = {name: options.get(name) for name in ("window", "recent")}
    return {"dtype": q.dtype.name, "width": width, "group": n // k.shape[2], **limits, "rows": b * n, "tokens": t}
