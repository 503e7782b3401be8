"""Attention over prompts on CPUs: `cpu.cc`, compiled at first use (`pallas_kernels.native`).

XLA writes logits and weights of a block to memory between the two products; here they stay in the second cache.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels import native

NAME = "pallas_kernels.prefill_attention"
SYMBOL = "prefill_attention"
SOURCE = Path(__file__).with_name("cpu.cc")


def register() -> None:
    """Compile the kernel, where that has not been done; raises `NotImplementedError` where it cannot be."""
    native.register(NAME, SOURCE, SYMBOL)


def attention(
    q: Float[Array, "B Q N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    length: Int[Array, " B"],
    *,
    scale: float | None = None,
    cap: float | None = None,
    window: int | None = None,
    visible_until: Int[Array, "B K T"] | None = None,
    behind: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B Q N H"], Float[Array, "B N Q"]]:
    """Causal attention: the contract of `reference.attention`; padded queries give zeros.

    Products are of float32 numbers, whatever the dtypes; outputs have that of v.
    """
    register()
    (b, queries, n, h), dtype = q.shape, v.dtype
    heads_first = [jnp.moveaxis(x, 1, 2).astype(jnp.float32) for x in (q, k, v)]
    ints = [jnp.zeros(0, jnp.int32) if x is None else x.astype(jnp.int32) for x in (visible_until, behind)]
    out = jax.ShapeDtypeStruct((b, n, queries, h), jnp.float32), jax.ShapeDtypeStruct((b, n, queries), jnp.float32)
    o, lse = jax.ffi.ffi_call(NAME, out)(
        *heads_first,
        length.astype(jnp.int32),
        *ints,
        scale=np.float32(h**-0.5 if scale is None else scale),
        cap=np.float32(cap or 0),
        window=np.int64(window or 0),
    )
    return jnp.moveaxis(o.astype(dtype), 2, 1), lse
