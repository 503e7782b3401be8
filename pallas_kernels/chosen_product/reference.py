"""The product with one of several matrices: the contract, in plain jnp."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


def chosen_product(
    x: Float[Array, "*b inner"], options: Sequence[Float[Array, "inner outer"]], index: Int[Array, ""]
) -> Float[Array, "*b outer"]:
    """`x @ options[index]`, where that matrix lies: a branch for each of them."""
    return jax.lax.switch(index, [functools.partial(jnp.matmul, b=option) for option in options], x)
