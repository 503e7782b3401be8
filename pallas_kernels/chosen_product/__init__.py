"""The product of a few vectors and one of several equal matrices, which an index names."""

from collections.abc import Sequence

from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.chosen_product import reference
from pallas_kernels.implementation import Implementation, resolve


def chosen_product(
    x: Float[Array, "*b inner"],
    options: Sequence[Float[Array, "inner outer"]],
    index: Int[Array, ""],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "*b outer"]:
    """`x @ options[index]`; none of the matrices is copied. What the kernel cannot do is done by XLA."""
    if resolve(implementation, cpu=True) == "cpu":
        from pallas_kernels.chosen_product import cpu

        try:
            return cpu.chosen_product(x, options, index)
        except NotImplementedError:
            pass
    return reference.chosen_product(x, options, index)
