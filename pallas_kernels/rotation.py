"""Rotary position embeddings of keys that are rotated when they are read: dimension `i` is paired with `i + H/2`."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


class Rotation(NamedTuple):
    """By which angles keys at given places turn.

    Attributes:
      frequency: of each pair of dimensions [radians per place].
      magnitude: of the cosines and sines.
      table: the cosines and sines of the first places, for plain XLA, if no place is behind them: they are shared by
        all layers and steps.
    """

    frequency: Float[Array, "#B #K half"]
    magnitude: float = 1.0
    table: tuple[Float[Array, "places half"], Float[Array, "places half"]] | None = None

    def angles(self, place: Int[Array, "B K s"]) -> tuple[Float[Array, "B K s half"], Float[Array, "B K s half"]]:
        """Cosines and sines."""
        if self.table is not None:
            cos, sin = self.table
            return cos[place], sin[place]
        theta = place[..., None].astype(jnp.float32) * self.frequency[..., None, :]
        return jnp.cos(theta) * self.magnitude, jnp.sin(theta) * self.magnitude


def rotate(x: Float[Array, "*b H"], cos: Float[Array, "*c half"], sin: Float[Array, "*c half"]) -> Float[Array, "*b H"]:
    """Rotate the pairs of `x`; `cos` and `sin` broadcast against its leading axes."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
