"""Decode attention: one query per row over the row's pages."""

from typing import Any

import jax

from pallas_kernels import tuning
from pallas_kernels.codes import DENSE, groups_of
from pallas_kernels.decode_attention import gpu, reference, tpu
from pallas_kernels.decode_attention.reference import EMPTY, Partial, merge, probabilities
from pallas_kernels.implementation import Implementation, resolve

__all__ = ["EMPTY", "Partial", "decode_attention", "merge", "probabilities"]


def decode_attention(*args: Any, implementation: Implementation | None = None, **kwargs: Any) -> Partial:
    """Attention of one query per row over the first slots of the row: the arguments of `reference.decode_attention`.

    Without `block` it is that of `pallas_kernels.tuning`, where one was measured.

    Raises:
      NotImplementedError: where a kernel cannot do what is asked, which `xla` can.
    """
    chosen = resolve(implementation)
    kwargs = tuning.settings("decode_attention", chosen, _shape(*args, **kwargs), kwargs)
    if chosen == "xla":
        return reference.decode_attention(*args, **kwargs)
    for name in ("expand_key", "place", "slots"):
        if kwargs.pop(name, None) is not None:
            raise NotImplementedError(f"{name} is for xla only")
    if chosen == "tpu":
        return tpu.decode_attention(*args, **kwargs)
    return gpu.decode_attention(*args, interpret=chosen == "interpret", **kwargs)


def _shape(q: Any, k: Any, v: Any, table: Any, *_: Any, **options: Any) -> tuning.Shape:
    """What the best block depends on."""
    decoders = (options.get(name, DENSE) for name in ("decode_key", "decode_value"))
    key, value = (f"{tuning.name_of(f)} x {groups_of(f, x)}" for f, x in zip(decoders, (k, v), strict=True))
    page, (b, heads, group, width) = jax.tree.leaves(k)[0].shape[1], q.shape
    fixed = {"key": key, "value": value, "dtype": q.dtype.name, "group": group, "width": width, "page": page}
    return fixed | {"rows": b * heads, "slots": table.shape[-1] * page}
