"""The product with one of several matrices on CPUs: `cpu.cc`, compiled at first use (`pallas_kernels.native`).

A program has one call however many matrices there are, where XLA compiles a branch for each. The call reads the matrix
once for all rows, as fast as XLA does for one; XLA takes three times as long for two.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels import native

NAME = "pallas_kernels.chosen_product"
SYMBOL = "chosen_product"
SOURCE = Path(__file__).with_name("cpu.cc")
MOST = 32  # rows; of more XLA's products are no slower


def chosen_product(
    x: Float[Array, "*b inner"], options: Sequence[Float[Array, "inner outer"]], index: Int[Array, ""]
) -> Float[Array, "*b outer"]:
    """The contract of `reference.chosen_product`; sums are in float32 whatever the dtype."""
    dtype = options[0].dtype
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"matrices of {dtype} are for xla only")
    return _call(x, [(option,) for option in options], index).astype(jnp.result_type(x.dtype, dtype))


def coded_product(
    x: Float[Array, "*b inner"], options: Sequence[Sequence[Array]], index: Int[Array, ""]
) -> Float[Array, "*b outer"]:
    """The product with a matrix of codes, in the dtype of x.

    Args:
      x: vectors.
      options: of each matrix `[inner outer]` its codes of 8 bits, `uint8 [inner outer]`, and its scales, `bfloat16
        [inner/32 outer]`: number = (code - 128) scale. Or codes of 4 bits, `uint8 [inner/2 outer]`, scales and zeros:
        number = code scale + zero; byte i of a group of 32 inputs has the codes i, in its low bits, and i + 16.
      index: which matrix.
    """
    return _call(x, options, index).astype(x.dtype)


def _call(x: Array, options: Sequence[Sequence[Array]], index: Array) -> Float[Array, "*b outer"]:
    rows, inner, outer = math.prod(x.shape[:-1]), x.shape[-1], options[0][0].shape[-1]
    if rows > MOST:
        raise NotImplementedError(f"{rows} rows are for xla: more than {MOST}")
    native.register(NAME, SOURCE, SYMBOL)
    call = jax.ffi.ffi_call(NAME, jax.ShapeDtypeStruct((rows, outer), jnp.float32))
    arrays = [array for option in options for array in option]
    y = call(
        x.reshape(rows, inner).astype(jnp.float32), index.astype(jnp.int32), *arrays, each=np.int64(len(options[0]))
    )
    return y.reshape(*x.shape[:-1], outer)
