"""A feed-forward network of experts: every token is read by the few that a router chooses for it.

Products are grouped: tokens are sorted by expert into blocks that each meet one expert's matrices. `jax.lax.ragged_dot`
would be shorter, but XLA has it for TPUs only and elsewhere multiplies every token with every expert's matrix.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from kvjax.models.quantized import matrix
from kvjax.parallel.collectives import MODEL, add
from kvjax.spec import ExpertSpec, WeightFormat

LARGEST = 256  # rows of a block


class Stack(nnx.Module):
    """A `Linear` of each expert: `kernels [E in out]`, `biases [E out]`."""

    def __init__(
        self,
        experts: ExpertSpec,
        inner: int,
        outer: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        weights: WeightFormat | None = None,
    ):
        drawn = jax.random.normal(rngs.params(), (experts.count, inner, outer)) * inner**-0.5
        self.kernels = matrix(drawn.astype(dtype), weights)
        self.biases = nnx.Param(jnp.zeros((experts.count, outer), dtype)) if experts.bias else None

    def __call__(self, x: Float[Array, "rows inner"], expert: Int[Array, ""]) -> Float[Array, "rows outer"]:
        """The projection of one expert."""
        y = x @ self.kernels[...][expert]
        return y if self.biases is None else y + self.biases[...][expert]


class Experts(nnx.Module):
    """The weighted sum of what the chosen experts make of a token, each of them `down(act(gate(x)) * up(x))`.

    Source: Mixtral (arXiv 2401.04088); transformers `MixtralSparseMoeBlock`, `Qwen3MoeSparseMoeBlock`, `GptOssMLP`.
    Cost: the products of the chosen experts, and of at most one block more for each; `k` times the tokens in memory.
    """

    def __init__(
        self,
        experts: ExpertSpec,
        dim: int,
        width: int,
        router: nnx.Module,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        weights: WeightFormat | None = None,
    ):
        self.spec = experts
        self.router = router
        self.gate, self.up = (Stack(experts, dim, width, dtype, rngs, weights) for _ in range(2))
        self.down = Stack(experts, width, dim, dtype, rngs, weights)

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        tokens = x.reshape(-1, x.shape[-1])
        weight, chosen = choose(self.spec, self.router(tokens))
        rows = jnp.repeat(tokens, self.spec.chosen, axis=0)
        made = in_blocks(self._one, rows, chosen.reshape(-1), self.spec.count).reshape(*chosen.shape, -1)
        out = add(jnp.einsum("nk,nkd->nd", weight, made.astype(weight.dtype)), MODEL)
        if self.down.biases is not None:
            biases = self.down.biases[...][chosen]
            out = out + jnp.einsum("nk,nkd->nd", weight, biases.astype(weight.dtype))
        return out.astype(x.dtype).reshape(x.shape)

    def _one(self, x: Float[Array, "rows D"], expert: Int[Array, ""]) -> Float[Array, "rows D"]:
        """What one expert makes of tokens, without its last bias."""
        gate, up, limit = self.gate(x, expert), self.up(x, expert), self.spec.limit
        if limit is not None:
            gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit) + 1
        act = gate * jax.nn.sigmoid(gate if self.spec.slope == 1 else gate * self.spec.slope)
        return (act * up) @ self.down.kernels[...][expert]


def choose(experts: ExpertSpec, logits: Float[Array, "n E"]) -> tuple[Float[Array, "n k"], Int[Array, "n k"]]:
    """Weights of the experts with the largest logits, in float32, and which those are."""
    logits = logits.astype(jnp.float32)
    best, chosen = jax.lax.top_k(logits, experts.chosen)
    among = best if experts.normed else logits
    return jnp.exp(best - jax.nn.logsumexp(among, axis=-1, keepdims=True)), chosen


def in_blocks(one, x: Float[Array, "rows D"], expert: Int[Array, " rows"], count: int) -> Float[Array, "rows F"]:
    """`one(rows, expert)` of every row with its own expert.

    Args:
      one: what an expert makes of rows.
      x: the rows.
      expert: of each.
      count: how many experts there are.
    """
    n = x.shape[0]
    size = min(LARGEST, 1 << (n // count).bit_length())  # about as many as an expert has
    most = n // size + min(count, n)  # blocks: each expert's last one may be filled in part
    of_expert = jnp.bincount(expert, length=count)
    end = jnp.cumsum((of_expert + size - 1) // size)  # of each expert's blocks
    order = jnp.argsort(expert)
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(n)) - (jnp.cumsum(of_expert) - of_expert)[expert]
    place = (end - (of_expert + size - 1) // size)[expert] * size + rank
    padded = jnp.zeros((most * size, x.shape[1]), x.dtype).at[place].set(x)

    def block(i: Array, out: Array) -> Array:
        rows = jax.lax.dynamic_slice_in_dim(padded, i * size, size)
        made = one(rows, jnp.searchsorted(end, i, side="right"))
        return jax.lax.dynamic_update_slice_in_dim(out, made, i * size, axis=0)

    return jax.lax.fori_loop(0, end[-1], block, jnp.zeros_like(padded))[place]
