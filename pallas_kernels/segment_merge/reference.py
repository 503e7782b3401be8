"""Running means of segments in plain jnp: the contract, and the XLA path on every platform."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float


def pool(
    x: Float[Array, "B T K n"], merge: Float[Array, "B T K"], weight: Float[Array, "B T K"], *, window: int
) -> Float[Array, "B T K n"]:
    """The weighted mean of each token and those before it in its segment, as it stands after that token.

    Args:
      x: keys or values.
      merge: 1 where a token continues the segment of the one before it, 0 where it begins one; between 0 and 1 it
        carries so much of that segment over (for training). That of the first token counts as 0.
      weight: of each token, above 0.
      window: newest tokens of a segment that a mean remembers; 0 = all of them.

    Sums are in float32, or wider if x is. Differentiable in everything but `window`.

    Source: DMC (arXiv 2403.09636); Megatron-LM, branch `dmc`, `megatron/contrib/dmc/dmc.py`.
    Cost: `window` multiplications per number, or a scan over the tokens.
    """
    wide = np.promote_types(x.dtype, jnp.float32)
    weight = weight.astype(wide)
    sums = segment_sums(x.astype(wide) * weight[..., None], merge, window=window)
    return (sums / segment_sums(weight[..., None], merge, window=window)).astype(x.dtype)


def segment_sums(x: Float[Array, "B T K n"], merge: Float[Array, "B T K"], *, window: int) -> Float[Array, "B T K n"]:
    """Sums instead of means: `s_t = x_t + merge_t s_{t-1}`, of which `window` terms; arguments as in `pool`."""
    merge = merge.astype(x.dtype).at[:, 0].set(0.0)
    return _scanned(x, merge) if window == 0 else _windowed(x, merge, min(window, x.shape[1]))


def _scanned(x: Float[Array, "B T K n"], merge: Float[Array, "B T K"]) -> Float[Array, "B T K n"]:
    def after(first: tuple[Array, Array], then: tuple[Array, Array]) -> tuple[Array, Array]:
        return first[0] * then[0], first[1] * then[0] + then[1]

    return jax.lax.associative_scan(after, (merge[..., None], x), axis=1)[1]


@functools.partial(jax.checkpoint, static_argnums=2)  # else the gradient keeps every shifted copy
def _windowed(x: Float[Array, "B T K n"], merge: Float[Array, "B T K"], window: int) -> Float[Array, "B T K n"]:
    total, carried = x, merge  # carried: how much of the token `by` places earlier is still there
    for by in range(1, window):
        total = total + carried[..., None] * earlier(x, by)
        carried = carried * earlier(merge, by)
    return total


def earlier(y: Float[Array, "B T *n"], by: int) -> Float[Array, "B T *n"]:
    """What belongs to the token `by` places earlier, 0 where there is none."""
    return jnp.pad(y, ((0, 0), (by, 0), *((0, 0),) * (y.ndim - 2)))[:, : y.shape[1]]
