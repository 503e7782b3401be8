"""Folds: which vector is cached per token, and how attention reads it."""

from collections.abc import Callable
from typing import NamedTuple

from jax import Array
from jaxtyping import Float

from kvjax.models.decoder import Layer
from kvjax.spec import ModelSpec, PyTree


class Fold(NamedTuple):
    """A change of the cached vectors.

    Attributes:
      widths: `(spec, layer) -> (R of keys, R of values)`.
      params: `(layer index, weights of the layer) -> pytree` that the other functions take first.
      key: `(params, k [... K H]) -> [... K R]`, what is cached for a key.
      value: `(params, v [... K H]) -> [... K R]`.
      expand_key: `(params, cached [B K s R]) -> [B K s H]`, at read, before rotation if that is at read; None = what is
        cached is the key.
      expand_value: `(params, o [B K G R]) -> [B K G H]`, once per step on the attention's output.
    """

    widths: Callable[[ModelSpec, int], tuple[int, int]]
    params: Callable[[int, Layer], PyTree]
    key: Callable[[PyTree, Float[Array, "*b K H"]], Float[Array, "*b K R"]]
    value: Callable[[PyTree, Float[Array, "*b K H"]], Float[Array, "*b K R"]]
    expand_key: Callable[[PyTree, Float[Array, "B K s R"]], Float[Array, "B K s H"]] | None
    expand_value: Callable[[PyTree, Float[Array, "B K G R"]], Float[Array, "B K G H"]]


def identity() -> Fold:
    """Keys and values are cached as they are.

    Cost: nothing.
    """
    same = lambda params, x: x
    return Fold(lambda spec, layer: (spec.head_dim, spec.head_dim), lambda layer, weights: (), same, same, None, same)
