"""A smooth bound on logits (Gemma 2, arXiv 2408.00118)."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


def soft_cap(logits: Float[Array, "*b"], cap: float | None) -> Float[Array, "*b"]:
    """`cap tanh(logits / cap)`; None = as they are."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)
