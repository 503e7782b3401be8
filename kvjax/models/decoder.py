"""One configurable Llama-family decoder in Flax NNX: weights only, the cache is passed in and out.

Covers Llama, Mistral, Qwen2, Qwen3 and InternLM2. The differences are fields of `ModelSpec`. Layers are a list and
are unrolled: scanning over stacked weights copies every layer's weights on GPU and is slower on CPU.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from kvjax.models import rope
from kvjax.spec import ModelSpec


class Linear(nnx.Module):
    """`x @ kernel + bias` with `kernel [in, out]`."""

    def __init__(self, inner: int, outer: int, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        scale = inner**-0.5
        self.kernel = nnx.Param((jax.random.normal(rngs.params(), (inner, outer)) * scale).astype(dtype))
        self.bias = nnx.Param(jnp.zeros((outer,), dtype)) if bias else None

    def __call__(self, x: Float[Array, "*b inner"]) -> Float[Array, "*b outer"]:
        y = x @ self.kernel[...]
        return y if self.bias is None else y + self.bias[...]


class RMSNorm(nnx.Module):
    """Root-mean-square norm in float32 (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((width,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*b width"]) -> Float[Array, "*b width"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * self.scale[...]


class Attention(nnx.Module):
    """The four projections of attention; attention itself is in `kvjax.attention`."""

    def __init__(self, spec: ModelSpec, dtype: DTypeLike, rngs: nnx.Rngs):
        n, k, h, d = spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.embed_dim
        self.q = Linear(d, n * h, spec.qkv_bias, dtype, rngs)
        self.k = Linear(d, k * h, spec.qkv_bias, dtype, rngs)
        self.v = Linear(d, k * h, spec.qkv_bias, dtype, rngs)
        self.o = Linear(n * h, d, spec.o_bias, dtype, rngs)
        self.q_norm = RMSNorm(h, spec.norm_eps, dtype) if spec.qk_norm else None
        self.k_norm = RMSNorm(h, spec.norm_eps, dtype) if spec.qk_norm else None


class Mlp(nnx.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))` (arXiv 2002.05202)."""

    def __init__(self, spec: ModelSpec, dtype: DTypeLike, rngs: nnx.Rngs):
        self.gate = Linear(spec.embed_dim, spec.mlp_dim, spec.mlp_bias, dtype, rngs)
        self.up = Linear(spec.embed_dim, spec.mlp_dim, spec.mlp_bias, dtype, rngs)
        self.down = Linear(spec.mlp_dim, spec.embed_dim, spec.mlp_bias, dtype, rngs)

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """One decoder block, cut where a cache sits: `project` before attention, `finish` after it."""

    def __init__(self, spec: ModelSpec, dtype: DTypeLike, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(spec.embed_dim, spec.norm_eps, dtype)
        self.attention = Attention(spec, dtype, rngs)
        self.mlp_norm = RMSNorm(spec.embed_dim, spec.norm_eps, dtype)
        self.mlp = Mlp(spec, dtype, rngs)
        self.head_dim = spec.head_dim

    def project(
        self, x: Float[Array, "*b D"]
    ) -> tuple[Float[Array, "*b N H"], Float[Array, "*b K H"], Float[Array, "*b K H"]]:
        """Queries, keys and values before rotation."""
        y = self.attention_norm(x)
        a = self.attention
        q, k, v = (p(y).reshape(*x.shape[:-1], -1, self.head_dim) for p in (a.q, a.k, a.v))
        if a.q_norm is not None and a.k_norm is not None:
            q, k = a.q_norm(q), a.k_norm(k)
        return q, k, v

    def finish(self, x: Float[Array, "*b D"], heads: Float[Array, "*b N H"]) -> Float[Array, "*b D"]:
        """Add the attention's output and the feed-forward network to the residual stream."""
        x = x + self.attention.o(heads.reshape(*x.shape[:-1], -1).astype(x.dtype))
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nnx.Module):
    """Embedding, layers, final norm and output head.

    Args:
      spec: shape and mathematics.
      dtype: dtype of weights and activations.
      rngs: seeds of the random initial weights.
    """

    def __init__(self, spec: ModelSpec, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.spec = spec
        shape = (spec.vocab_size, spec.embed_dim)
        self.embedding = nnx.Param((jax.random.normal(rngs.params(), shape) * 0.02).astype(dtype))
        self.layers = nnx.List([Layer(spec, dtype, rngs) for _ in range(spec.num_layers)])
        self.norm = RMSNorm(spec.embed_dim, spec.norm_eps, dtype)
        self.head = None if spec.tie_embeddings else Linear(spec.embed_dim, spec.vocab_size, False, dtype, rngs)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of weights and activations."""
        return self.embedding.get_raw_value().dtype  # of an abstract decoder as well

    def embed(self, tokens: Int[Array, "*b"]) -> Float[Array, "*b D"]:
        """Token vectors."""
        return self.embedding[...][tokens]

    def logits(self, x: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        """Next-token logits in float32."""
        x = self.norm(x)
        y = x @ self.embedding[...].T if self.head is None else self.head(x)
        return y.astype(jnp.float32)


def forward(model: Decoder, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """Logits at every position, without a cache: differentiable, for training and as a reference.

    Cost: materialises the `[B, N, T, T]` attention matrix; use `kvjax.decode.prefill` for long prompts.
    """
    spec = model.spec
    b, t = tokens.shape
    pos = jnp.arange(t)
    cos, sin = rope.angles(spec.rope, spec.head_dim, pos, jnp.asarray(t))
    cos, sin = cos[:, None], sin[:, None]
    x = model.embed(tokens)
    for index, layer in enumerate(model.layers):
        q, k, v = layer.project(x)
        q = rope.rotate(q, cos, sin).reshape(b, t, spec.num_kv_heads, spec.group_size, spec.head_dim)
        k = rope.rotate(k, cos, sin)
        distance = pos[:, None] - pos[None, :]
        window = spec.window(index)
        visible = (distance >= 0) & (distance < (window or t))
        score = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * spec.head_dim**-0.5
        prob = jax.nn.softmax(jnp.where(visible, score, -jnp.inf), axis=-1).astype(v.dtype)
        heads = jnp.einsum("bkgts,bskh->btkgh", prob, v)
        x = layer.finish(x, heads.reshape(b, t, spec.num_heads, spec.head_dim))
    return model.logits(x)
