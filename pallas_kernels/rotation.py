"""Rotary position embeddings of keys that are rotated when they are read.

Dimension `i` is paired with `i + R/2`, where the first R of a head's H dimensions turn, most often all of them.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


class Rotation(NamedTuple):
    """By which angles keys at given places turn.

    Attributes:
      frequency: of each pair of dimensions that turns [radians per place].
      magnitude: of the cosines and sines.
      table: the cosines and sines of the first places, for plain XLA, if no place is behind them: they are shared by
        all layers and steps.
      still: dimensions of a head that do not turn, its last ones.
    """

    frequency: Float[Array, "#B #K half"]
    magnitude: float = 1.0
    table: tuple[Float[Array, "places half"], Float[Array, "places half"]] | None = None
    still: int = 0

    @property
    def width(self) -> int:
        """H."""
        return 2 * self.frequency.shape[-1] + self.still

    def angles(self, place: Int[Array, "*b s"]) -> tuple[Float[Array, "*b s half"], Float[Array, "*b s half"]]:
        """Cosines and sines."""
        if self.table is not None:
            cos, sin = self.table
            return cos[place], sin[place]
        theta = place[..., None].astype(jnp.float32) * self.frequency[..., None, :]
        return jnp.cos(theta) * self.magnitude, jnp.sin(theta) * self.magnitude


def rotate(x: Float[Array, "*b H"], cos: Float[Array, "*c half"], sin: Float[Array, "*c half"]) -> Float[Array, "*b H"]:
    """Rotate the pairs of `x`; `cos` and `sin` broadcast against its leading axes. What has no angle stays as it is."""
    half = cos.shape[-1]
    a, b = (y.astype(jnp.float32) for y in (x[..., :half], x[..., half : 2 * half]))
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return turned if x.shape[-1] == 2 * half else jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)
