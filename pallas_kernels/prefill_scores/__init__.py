"""Prefill scores: how much attention prompt tokens received, without the T x T matrix."""

from typing import Any

from jax import Array
from jaxtyping import Float

from pallas_kernels import tuning
from pallas_kernels.implementation import Implementation, resolve
from pallas_kernels.prefill_scores import reference

__all__ = ["column_max", "column_sums"]


def column_sums(*args: Any, implementation: Implementation | None = None, **kwargs: Any) -> Float[Array, "B N T"]:
    """Attention that each token received from queries: the arguments of `reference.column_sums`.

    Without `block` it is that of `pallas_kernels.tuning`, where one was measured.

    Raises:
      NotImplementedError: where a kernel cannot do what is asked, which `xla` can.
    """
    return _run("column_sums", args, implementation, kwargs, {name: kwargs.get(name) for name in ("window", "recent")})


def column_max(*args: Any, implementation: Implementation | None = None, **kwargs: Any) -> Float[Array, "B N T"]:
    """The most attention that each token gets from its chunk: the arguments of `reference.column_max`.

    Blocks and errors are as in `column_sums`.
    """
    return _run("column_max", args, implementation, kwargs, {"chunk": kwargs["chunk"]})


def _run(
    name: str, args: Any, implementation: Implementation | None, kwargs: dict[str, Any], limits: tuning.Shape
) -> Float[Array, "B N T"]:
    """An operation in the implementation that is asked for."""
    chosen, (q, k) = resolve(implementation), args[:2]
    b, t, n, width = q.shape
    shape = {"dtype": q.dtype.name, "width": width, "group": n // k.shape[2], **limits, "rows": b * n, "tokens": t}
    kwargs = tuning.settings(name, chosen, shape, kwargs)
    if chosen == "xla":
        return getattr(reference, name)(*args, **kwargs)
    if chosen == "tpu":
        from pallas_kernels.prefill_scores import tpu

        return getattr(tpu, name)(*args, **kwargs)
    from pallas_kernels.prefill_scores import gpu

    return getattr(gpu, name)(*args, interpret=chosen == "interpret", **kwargs)
