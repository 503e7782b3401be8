"""Decode attention: one query per row over the pages of the row's parts."""

from collections.abc import Sequence
from typing import Any

import jax

from pallas_kernels import tuning
from pallas_kernels.codes import groups_of
from pallas_kernels.decode_attention import reference
from pallas_kernels.decode_attention.reference import EMPTY, KeyExpansion, PagedKV, Partial, merge, probabilities
from pallas_kernels.implementation import Implementation, resolve

__all__ = ["EMPTY", "KeyExpansion", "PagedKV", "Partial", "decode_attention", "merge", "probabilities"]


def decode_attention(
    parts: Sequence[PagedKV], *, implementation: Implementation | None = None, **options: Any
) -> Partial:
    """Attention of one query per row over all parts of the row: the arguments of `reference.decode_attention`.

    Without `block` it is that of `pallas_kernels.tuning`, where one was measured.

    Raises:
      NotImplementedError: where a kernel cannot do what is asked, which `xla` can.
    """
    chosen = resolve(implementation, cpu=True)
    options = tuning.settings("decode_attention", chosen, _shape(parts), options)
    if chosen == "xla":
        return reference.decode_attention(parts, **options)
    if chosen == "cpu":
        from pallas_kernels.decode_attention import cpu

        return cpu.decode_attention(parts, **options)
    if any(part.slots is not None for part in parts):
        raise NotImplementedError("a choice of slots is for xla only")
    if chosen == "tpu":
        from pallas_kernels.decode_attention import tpu

        return tpu.decode_attention(parts, **options)
    from pallas_kernels.decode_attention import gpu

    return gpu.decode_attention(parts, interpret=chosen == "interpret", **options)


def _shape(parts: Sequence[PagedKV]) -> tuning.Shape:
    """What the best block depends on."""
    first = parts[0]
    page, (b, heads, group, width) = jax.tree.leaves(first.k)[0].shape[1], first.q.shape
    named = lambda decode, codes: f"{tuning.name_of(decode)} x {groups_of(decode, codes)}"
    key = " + ".join(named(part.decode_key, part.k) for part in parts)
    value = " + ".join(named(part.decode_value, part.v) for part in parts)
    fixed = {"key": key, "value": value, "dtype": first.q.dtype.name, "group": group, "width": width, "page": page}
    return fixed | {"rows": b * heads, "slots": sum(part.table.shape[-1] * page for part in parts)}
