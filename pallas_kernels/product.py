"""Products of matrices inside kernels."""

import jax
import jax.numpy as jnp
from jax import Array


def dot(a: Array, b: Array, over: tuple[int, int]) -> Array:
    """The product over an axis of each of two matrices of one dtype, added up in float32; float32 is not rounded."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
