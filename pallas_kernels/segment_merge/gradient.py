"""The mean of segments and its gradient, of two kernels.

With `l_t` the decision at t, a mean is a scaled sum of scaled tokens, linear in them:

    y_t = after_t sum_i c_ti before_{t-i} x_{t-i}      c_ti = l_t l_{t-1} ... l_{t-i+1},  i < window

`before` is the weight and `after` one over the sum of weights, which is `n` times smaller and left to XLA. The gradient
of x is the same sum from the last token to the first, with `before` and `after` exchanged. All else follows from

    sum_t g_t y_t = sum_ti after_t c_ti before_{t-i} (g_t . x_{t-i})

whose products of vectors are `window` numbers per token; the gradient of the right-hand side is left to XLA. Where a
segment remembers all of its tokens, `s_t = before_t x_t + l_t s_{t-1}` and its reverse `r_t = after_t g_t + l_{t+1}
r_{t+1}` give the gradient of `l_t`, `r_t . s_{t-1}`, of `before_t`, `r_t . x_t`, and of `after_t`, `g_t . s_t`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from pallas_kernels.segment_merge.reference import earlier, segment_sums


class Kernels(NamedTuple):
    """What a platform computes; sums in float32.

    Attributes:
      sums: `(x [B T K n], link, before, after [B T K], window=, reverse=, dtype=) -> y [B T K n]`, the sum above; with
        `reverse` over later tokens instead, `link` being between a token and the one after it. The first link is 0.
      dots: `(g, x [B T K n], window=) -> [w B T K]`, `g_t . x_{t-i}`; anything for tokens before the first.
    """

    sums: Callable[..., Array]
    dots: Callable[..., Array]


def pool(x: Array, merge: Array, weight: Array, window: int, kernels: Kernels) -> Float[Array, "B T K n"]:
    """The contract of `reference.pool`."""
    wide = np.promote_types(x.dtype, jnp.float32)
    link, weight = merge.astype(wide).at[:, 0].set(0.0), weight.astype(wide)
    total = segment_sums(weight[..., None], link, window=window)[..., 0]
    return _scaled(x, link, weight, 1 / total, window, kernels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _scaled(x: Array, link: Array, before: Array, after: Array, window: int, kernels: Kernels) -> Array:
    return kernels.sums(x, link, before, after, window=window, reverse=False, dtype=x.dtype)


def _forward(x: Array, link: Array, before: Array, after: Array, window: int, kernels: Kernels) -> tuple[Array, tuple]:
    return _scaled(x, link, before, after, window, kernels), (x, link, before, after)


def _backward(window: int, kernels: Kernels, kept: tuple, g: Array) -> tuple[Array, ...]:
    x, link, before, after = kept
    following = jnp.pad(link[:, 1:], ((0, 0), (0, 1), (0, 0)))  # between a token and the one after it
    back = functools.partial(kernels.sums, g, following, after, window=window, reverse=True)
    if window:
        products = kernels.dots(g, x, window=window)
        _, pull = jax.vjp(functools.partial(_value, products), link, before, after)
        return back(before, dtype=x.dtype), *pull(jnp.ones_like(link))
    ones, wide = jnp.ones_like(before), link.dtype
    s = kernels.sums(x, link, before, ones, window=0, reverse=False, dtype=wide)
    r = back(ones, dtype=wide)
    dot = lambda a, b: jnp.sum(a.astype(wide) * b.astype(wide), axis=-1)
    return (r * before[..., None]).astype(x.dtype), dot(r, earlier(s, 1)), dot(r, x), dot(g, s)


def _value(products: Float[Array, "w B T K"], link: Array, before: Array, after: Array) -> Float[Array, "B T K"]:
    """What each token adds to `sum g y`."""
    total, carried = products[0] * before, link
    for by in range(1, products.shape[0]):
        total = total + carried * earlier(before, by) * products[by]
        carried = carried * earlier(link, by)
    return after * total


_scaled.defvjp(_forward, _backward)
