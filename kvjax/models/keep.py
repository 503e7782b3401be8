"""A gate that tells from a token's hidden state how much the token will be needed; it lies beside a model's weights.

Of each row, x being what a layer's projections read and widths `WIDTH`:

    query[g] = rms(Wq[g] x + bq[g])    key = rms(Wk x)                      norms with a learned scale
    own[g]   = key . query[g] / sqrt(WIDTH) + offset[g]
    score    = mean over g of   exp(own[g]) / (exp(own[g]) + sum over s of exp(sink[s] . query[g] / sqrt(WIDTH)))

It is a token's alone, from 0 to 1: nothing is rotated, and no other token has a say in it.

Source: Fast KVzip (arXiv 2601.17668), Janghyun1230/FastKVzip; kvpress `fastkvzip_press.py`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from kvjax.spec import ModelSpec

WIDTH, SINKS = 16, 16  # of queries and keys of the gate; learned keys of each row
EPS = 1e-6


class KeepGate(nnx.Module):
    """The gate of one layer, in float32.

    Args:
      spec: the model.
      rngs: seeds of the random initial weights.

    Cost: `D WIDTH (N + K)` weights a layer, about 1% of a model's.
    """

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        rows, width = spec.num_rows, spec.embed_dim
        drawn = lambda *shape, scale=1.0: nnx.Param(scale * jax.random.normal(rngs.params(), shape))
        self.query = drawn(width, spec.num_heads * WIDTH, scale=width**-0.5)
        self.query_bias = nnx.Param(jnp.zeros((spec.num_heads * WIDTH,)))
        self.key = drawn(width, rows * WIDTH, scale=width**-0.5)
        self.query_scale = nnx.Param(jnp.ones((WIDTH,)))
        self.key_scale = nnx.Param(jnp.ones((WIDTH,)))
        self.sinks = drawn(rows, SINKS, WIDTH)
        self.offset = nnx.Param(jnp.zeros((rows, spec.num_heads // rows)))

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b K"]:
        rows, group = self.offset.shape
        product = lambda w: jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32)
        query = (product(self.query[...]) + self.query_bias[...]).reshape(*x.shape[:-1], rows, group, WIDTH)
        query = _rms(query, self.query_scale[...]) * WIDTH**-0.5
        key = _rms(product(self.key[...]).reshape(*x.shape[:-1], rows, WIDTH), self.key_scale[...])
        own = jnp.einsum("...kw,...kgw->...kg", key, query) + self.offset[...]
        others = jax.nn.logsumexp(jnp.einsum("ksw,...kgw->...kgs", self.sinks[...], query), axis=-1)
        return jax.nn.sigmoid(own - others).mean(axis=-1)


def gated(spec: ModelSpec) -> list[int]:
    """The layers that have a gate: those without a sliding window."""
    return [index for index in range(spec.num_layers) if spec.window(index) is None]


def _rms(y: Float[Array, "*b W"], scale: Float[Array, " W"]) -> Float[Array, "*b W"]:
    return y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + EPS) * scale
