"""The gate of a retrofitted model: a number per token and key/value head that says what becomes of a cache entry.

    dmc    logit = key[neuron] - offset                     merge the token with the one before it
           weight = sigmoid(mean query[neuron] + offset)    its weight in that mean, over the queries of the group
    dms    logit = scale * query[neuron] - offset           evict the token before it, `window` tokens on; first query
           logit = scale * adapter(x) - offset              likewise, with a projection of the residual stream

A coordinate that the gate borrows carries nothing else: `dmc` has it zero in all queries and keys before rotation, and
in queries after rotation too; `dms` in each group's first query, before and after. So it does not reach a score.

Source: Megatron-LM, branch `dmc`, `megatron/contrib/dmc/dmc.py`; Model-Optimizer `experimental/dms/dms/core.py`.
Differs: the released DMC code sets the coordinate of rotated keys to zero as well, which no score can tell; it keeps
  weights above 0 by the epsilon of the model's format, in bfloat16 a weight of its own (0.008), here it is float32's.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from kvjax.spec import Gate, GateSpec, ModelSpec


class Adapter(nnx.Module):
    """A logit per key/value head from the residual stream: RMS norm and a projection that begins at zero.

    Cost: `D (1 + K)` weights a layer.
    """

    def __init__(self, spec: ModelSpec, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((spec.embed_dim,), dtype))
        self.kernel = nnx.Param(jnp.zeros((spec.embed_dim, spec.num_kv_heads), dtype))
        self.eps = spec.norm_eps

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b K"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y.astype(x.dtype) * self.scale[...]) @ self.kernel[...]


def read(
    gate: GateSpec, q: Float[Array, "*b N H"], k: Float[Array, "*b K H"], adapter: Float[Array, "*b K"] | None
) -> tuple[Gate, Float[Array, "*b N H"], Float[Array, "*b K H"]]:
    """The gate in float32, and queries and keys without what it borrows; all before rotation.

    Args:
      gate: which gate.
      q, k: queries and keys.
      adapter: what the model's `Adapter` says; None if the gate borrows a coordinate.
    """
    if adapter is not None:
        return Gate(gate.scale * adapter.astype(jnp.float32) - gate.offset), q, k
    assert gate.neuron is not None
    asked = q[..., gate.neuron].astype(jnp.float32)
    asked = asked.reshape(*asked.shape[:-1], k.shape[-2], -1)  # *b K G
    if gate.objective == "dms":
        return Gate(gate.scale * asked[..., 0] - gate.offset), silence(gate, q, k.shape[-2]), k
    logit = gate.scale * k[..., gate.neuron].astype(jnp.float32) - gate.offset
    weight = jax.nn.sigmoid(asked.mean(axis=-1) + gate.offset) + jnp.finfo(jnp.float32).eps
    k = k.at[..., gate.neuron].set(0)
    return Gate(logit, weight), silence(gate, q, k.shape[-2]), k


def silence(gate: GateSpec | None, q: Float[Array, "*b N H"], heads: int) -> Float[Array, "*b N H"]:
    """Queries without the coordinates that the gate borrows.

    Args:
      gate: which gate; None = none.
      q: queries, before or after rotation.
      heads: key/value heads that N stands for.
    """
    if gate is None or gate.neuron is None:
        return q
    every = 1 if gate.objective == "dmc" else q.shape[-2] // heads
    return q.at[..., ::every, gate.neuron].set(0)
