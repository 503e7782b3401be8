"""One configurable decoder in Flax NNX: weights only, the cache is passed in and out.

Covers the families of `kvjax.models.hf_config.FAMILIES`; what they differ in are fields of `ModelSpec`. Layers are a
list: scanning over stacked weights copies every layer's weights on GPU and is slower on CPU.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from kvjax.models import gate as gates
from kvjax.models import quantized, rope
from kvjax.models.experts import Experts
from kvjax.models.keep import KeepGate
from kvjax.models.quantized import Quantized, finer, matrix, numbers, rows
from kvjax.parallel.collectives import HEADS, MODEL, Axes, add, count, gather, look_up, own
from kvjax.spec import Activation, ExpertSpec, Gate, ModelSpec, WeightFormat
from pallas_kernels.chosen_product import chosen_product
from pallas_kernels.decode_attention import KeyExpansion
from pallas_kernels.implementation import Implementation
from pallas_kernels.rotation import Rotation
from pallas_kernels.soft_cap import soft_cap


def native_dtype() -> DTypeLike:
    """What weights, activations and cache are in where nobody says: float32 on CPU, bfloat16 elsewhere."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


class Linear(nnx.Module):
    """`x @ kernel + bias` with `kernel [in, out]`, of few bits if `weights` says so."""

    def __init__(
        self,
        inner: int,
        outer: int,
        bias: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        weights: WeightFormat | None = None,
    ):
        scale = inner**-0.5
        self.kernel = matrix((jax.random.normal(rngs.params(), (inner, outer)) * scale).astype(dtype), weights)
        self.bias = nnx.Param(jnp.zeros((outer,), dtype)) if bias else None

    def __call__(self, x: Float[Array, "*b inner"], over: Axes = ()) -> Float[Array, "*b outer"]:
        """The projection; where x is spread over the devices of some axes, that of all of it."""
        y = add(x @ self.kernel[...], over)
        return y if self.bias is None else y + self.bias[...]


class LowRank(nnx.Module):
    """A projection in two factors: `x @ down` is a latent per group of heads, `latent @ up` their keys or values.

    Source: LoRC (arXiv 2410.03111).
    Cost: `R heads H` products to expand a latent; `D R + R heads H` numbers per group of heads.
    """

    def __init__(self, spec: ModelSpec, rank: int, dtype: DTypeLike, rngs: nnx.Rngs):
        rows, outer = spec.num_rows, spec.num_kv_heads * spec.head_dim
        drawn = lambda *shape, inner: (jax.random.normal(rngs.params(), shape) * inner**-0.5).astype(dtype)
        self.down = nnx.Param(drawn(spec.embed_dim, rows, rank, inner=spec.embed_dim))
        self.up = nnx.Param(drawn(rows, rank, outer // rows, inner=rank))
        self.bias = nnx.Param(jnp.zeros((outer,), dtype)) if spec.qkv_bias else None
        self.head_dim = spec.head_dim

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b K R"]:
        return jnp.einsum("...d,dkr->...kr", x, self.down[...])

    def expand(self, latent: Float[Array, "*b K R"]) -> Float[Array, "*b heads H"]:
        """Keys or values of latents."""
        up = self.up[...]
        y = jnp.einsum("...kr,krn->...kn", latent.astype(up.dtype), up)
        y = y.reshape(*y.shape[:-2], -1, self.head_dim)
        return y if self.bias is None else y + self.bias[...].reshape(-1, self.head_dim)

    def expand_mean(self, mean: Float[Array, "*b K G R"]) -> Float[Array, "*b K G H"]:
        """Means of values, from those of their latents that each query head of a group made; weights add up to 1."""
        rows, rank, _ = self.up.shape
        up = self.up[...].reshape(rows, rank, -1, self.head_dim)
        own = mean.reshape(*mean.shape[:-2], up.shape[2], -1, rank)  # query heads by their value head
        y = jnp.einsum("...kgnr,krgh->...kgnh", own.astype(up.dtype), up)
        if self.bias is not None:
            y = y + self.bias[...].reshape(rows, -1, 1, self.head_dim)
        return y.reshape(*mean.shape[:-1], self.head_dim)


class Norm(nnx.Module):
    """The norm of `ModelSpec.norm`, in float32: root mean square (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450).

    What a root mean square is of may be spread over the devices of some axes.
    """

    def __init__(self, spec: ModelSpec, width: int, dtype: DTypeLike, over: Axes = ()):
        self.over = over
        self.kind = spec.norm
        self.scale = nnx.Param((jnp.zeros if spec.norm == "rms+1" else jnp.ones)((width,), dtype))
        self.bias = nnx.Param(jnp.zeros((width,), dtype)) if spec.norm == "layer" else None
        self.eps = spec.norm_eps

    def __call__(self, x: Float[Array, "*b width"]) -> Float[Array, "*b width"]:
        y = x.astype(jnp.float32)
        if self.bias is not None:
            y = y - y.mean(axis=-1, keepdims=True)
        square, scale = jnp.mean(y * y, axis=-1, keepdims=True), self.scale[...]
        if self.over:
            square, scale = add(square, self.over) / count(self.over), own(scale, -1, self.over)
        y = y * jax.lax.rsqrt(jnp.where(square < jnp.inf, square, jnp.nan) + self.eps)  # what overflows is no zero
        if self.kind == "rms":
            return y.astype(x.dtype) * scale
        y = y * self.factor()
        return (y if self.bias is None else y + self.bias[...].astype(jnp.float32)).astype(x.dtype)

    def factor(self) -> Float[Array, " width"]:
        """What vectors are multiplied by once they have unit size, in float32."""
        scale = self.scale[...].astype(jnp.float32)
        return 1 + scale if self.kind == "rms+1" else scale


def normed(x: Float[Array, "*b width"], norm: Norm | None) -> Float[Array, "*b width"]:
    """x, normed where there is a norm."""
    return x if norm is None else norm(x)


class Attention(nnx.Module):
    """The four projections of attention and its sinks; attention itself is in `kvjax.attention`."""

    def __init__(self, spec: ModelSpec, index: int, dtype: DTypeLike, rngs: nnx.Rngs):
        n, h, d = spec.num_heads, spec.head_dim, spec.embed_dim
        coarse, fine = spec.weights, finer(spec.weights)
        self.q = Linear(d, n * h, spec.qkv_bias, dtype, rngs, coarse)
        if spec.latent is None:
            of = lambda weights: Linear(d, spec.num_kv_heads * h, spec.qkv_bias, dtype, rngs, weights)
            self.k, self.v = of(coarse), of(fine)
        else:
            self.k, self.v = (LowRank(spec, rank, dtype, rngs) for rank in spec.widths(index))
        self.o = Linear(n * h, d, spec.o_bias, dtype, rngs, fine)
        self.sink = nnx.Param(jnp.zeros((n,), dtype)) if spec.sinks else None
        of = lambda heads: Norm(spec, heads * h, dtype, HEADS) if spec.joint_qk_norm else Norm(spec, h, dtype)
        self.q_norm = of(n) if spec.qk_norm else None
        self.k_norm = of(spec.num_kv_heads) if spec.qk_norm else None


ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class Mlp(nnx.Module):
    """`down(act(gate(x)) * up(x))` (arXiv 2002.05202), or without a gate `down(act(up(x)))`."""

    def __init__(self, spec: ModelSpec, dtype: DTypeLike, rngs: nnx.Rngs):
        of = lambda inner, outer: Linear(inner, outer, spec.mlp_bias, dtype, rngs, spec.weights)
        self.gate = of(spec.embed_dim, spec.mlp_dim) if spec.gated_mlp else None
        self.up = of(spec.embed_dim, spec.mlp_dim)
        self.down = of(spec.mlp_dim, spec.embed_dim)
        self.activation: Activation = spec.activation

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        act, up = ACTIVATIONS[self.activation], self.up(x)
        return self.down(act(up) if self.gate is None else act(self.gate(x)) * up, over=MODEL)


def experts(spec: ModelSpec, of: ExpertSpec, dtype: DTypeLike, rngs: nnx.Rngs) -> Experts:
    """The MLP of a model of experts."""
    router = Linear(spec.embed_dim, of.count, of.bias, dtype, rngs)
    return Experts(of, spec.embed_dim, spec.mlp_dim, router, dtype, rngs, spec.weights)


class Layer(nnx.Module):
    """One decoder block, cut where a cache sits: `project` before attention, `finish` after it.

    What `project` makes of a token is what a cache stores; `keys`, `values` and `heads` make it what attention needs.
    """

    def __init__(self, spec: ModelSpec, index: int, dtype: DTypeLike, rngs: nnx.Rngs):
        norm = lambda: Norm(spec, spec.embed_dim, dtype)
        self.attention_norm = norm() if spec.pre_norms else None
        self.attention = Attention(spec, index, dtype, rngs)
        self.mlp_norm = norm() if spec.pre_norms and spec.parallel_norms != 1 else None
        self.mlp = Mlp(spec, dtype, rngs) if spec.experts is None else experts(spec, spec.experts, dtype, rngs)
        self.attention_post_norm = norm() if spec.post_norms else None
        self.mlp_post_norm = norm() if spec.post_norms else None
        self.residual_scale = spec.residual_scale
        self.parallel = spec.parallel_norms > 0
        self.head_dim = spec.head_dim
        self.group_size = spec.group_size
        self.joint_qk_norm = spec.joint_qk_norm
        self.late_bias = spec.late_bias
        self.gate = spec.gate
        self.adapter = gates.Adapter(spec, dtype) if spec.gate is not None and spec.gate.neuron is None else None
        self.keep: KeepGate | None = nnx.data(None)  # `kvjax.checkpoint.keep_gate` puts it here

    def project(
        self, x: Float[Array, "*b D"]
    ) -> tuple[Float[Array, "*b N H"], Float[Array, "*b K R"], Float[Array, "*b K W"], Gate | tuple]:
        """Queries, keys and values before rotation, of low-rank keys and values the latents; and the gate.

        Keys are without their bias where `ModelSpec.late_bias` says so.
        """
        y, a = normed(x, self.attention_norm), self.attention
        q = self._heads(a.q(y), a.q_norm)
        v = a.v(y) if isinstance(a.v, LowRank) else self._heads(a.v(y))
        if isinstance(a.k, LowRank):
            k = a.k(y)
        else:
            k = self._heads(y @ a.k.kernel[...]) if self.late_bias else self._heads(a.k(y), a.k_norm)
        if self.gate is None:
            return q, k, v, ()
        gate, q, k = gates.read(self.gate, q, k, None if self.adapter is None else self.adapter(x))
        return q, k, v, gate

    def _heads(self, projected: Float[Array, "*b outer"], norm: Norm | None = None) -> Float[Array, "*b heads H"]:
        """A projection cut into heads, normed each by itself or all together."""
        cut = lambda y: y.reshape(*y.shape[:-1], -1, self.head_dim)
        return cut(normed(projected, norm)) if self.joint_qk_norm else normed(cut(projected), norm)

    def queries(self, q: Float[Array, "*b N H"], turn: rope.Turn) -> Float[Array, "*b N H"]:
        """Queries at their positions, without what the gate borrows."""
        q = turn.query(q)
        return q if self.gate is None else gates.silence(self.gate, q, q.shape[-2] // self.group_size)

    def keys(self, cached: Float[Array, "*b K R"]) -> Float[Array, "*b heads H"]:
        """Keys before rotation."""
        k = self.attention.k
        if isinstance(k, LowRank):
            return normed(k.expand(cached), self.attention.k_norm)
        bias = self._late_bias()
        return cached if bias is None else cached + bias

    def expand(self, rotation: Rotation) -> KeyExpansion:
        """How a cache is read that holds keys before rotation: what `keys` does, and the rotation."""
        k = self.attention.k
        if not isinstance(k, LowRank):
            return KeyExpansion(rotation, bias=self._late_bias())
        bias = None if k.bias is None else k.bias[...].reshape(k.up.shape[0], -1)
        return KeyExpansion(rotation, k.up[...], bias, self.attention.k_norm)

    def sink(self) -> Float[Array, " N"] | None:
        """The logit of each query head that is of no token."""
        return None if self.attention.sink is None else self.attention.sink[...]

    def _late_bias(self) -> Float[Array, "K H"] | None:
        bias = self.attention.k.bias
        return bias[...].reshape(-1, self.head_dim) if bias is not None and self.late_bias else None

    def values(self, cached: Float[Array, "*b K W"]) -> Float[Array, "*b heads H"]:
        """Values."""
        v = self.attention.v
        return v.expand(cached) if isinstance(v, LowRank) else cached

    def heads(self, mean: Float[Array, "*b K G W"]) -> Float[Array, "*b K G H"]:
        """The query heads' outputs from their means of cached values."""
        v = self.attention.v
        return v.expand_mean(mean) if isinstance(v, LowRank) else mean

    def output(self) -> Float[Array, "N H D"]:
        """What the query heads' outputs are multiplied by, in float32: a norm behind it leaves its scale in it."""
        kernel = self.attention.o.kernel
        coded = isinstance(kernel, Quantized)
        kernel = numbers(kernel, jnp.float32) if coded else kernel[...].astype(jnp.float32)
        scaled = kernel if self.attention_post_norm is None else kernel * self.attention_post_norm.factor()
        return scaled.reshape(-1, self.head_dim, kernel.shape[-1])

    def worth(self, x: Float[Array, "*b D"]) -> Float[Array, "*b K"]:
        """How much each token will be needed, as the layer's gate has it."""
        assert self.keep is not None
        return self.keep(normed(x, self.attention_norm))

    def finish(self, x: Float[Array, "*b D"], heads: Float[Array, "*b N H"]) -> Float[Array, "*b D"]:
        """Add the attention's output and the feed-forward network to the residual stream."""
        attended = self.attention.o(heads.reshape(*x.shape[:-1], -1).astype(x.dtype), over=HEADS)
        after = self._add(x, attended, self.attention_post_norm)
        fed = normed(x if self.parallel else after, self.attention_norm if self.mlp_norm is None else self.mlp_norm)
        return self._add(after, self.mlp(fed), self.mlp_post_norm)

    def _add(self, x: Float[Array, "*b D"], branch: Float[Array, "*b D"], norm: Norm | None) -> Float[Array, "*b D"]:
        """The residual stream with what attention or the feed-forward network adds."""
        branch = normed(branch, norm)
        return x + (branch if self.residual_scale == 1 else branch * jnp.asarray(self.residual_scale, branch.dtype))


class _Choice:
    """A matrix of one of several layers: `x @ it` is the product with the one that an index names; none is copied."""

    def __init__(self, options: Sequence[Any], index: Int[Array, ""] | int, kernels: Implementation | None):
        self.options, self.index = options, index
        self.kernels: Implementation | None = kernels

    def __getitem__(self, key: object) -> "_Choice":
        return self

    def __rmatmul__(self, x: Float[Array, "*b inner"]) -> Float[Array, "*b outer"]:
        if isinstance(self.options[0], Quantized):
            return quantized.chosen_product(x, self.options, self.index, self.kernels)
        return chosen_product(x, self.options, jnp.asarray(self.index), implementation=self.kernels)


class OneOf:
    """Equal layers, of which an index names one, for a loop over them: its body is compiled once for all.

    Matrices stay where they are, vectors are taken from a stack of all. Layers must not be low-rank, nor have experts.
    """

    def __init__(self, layers: Sequence[Layer], kernels: Implementation | None):
        whole = lambda x: isinstance(x, Quantized)
        leaves, structures = zip(*(jax.tree.flatten(layer, is_leaf=whole) for layer in layers), strict=True)
        is_vector = lambda x: not whole(x) and x.ndim == 1
        stacked = lambda x: jnp.concatenate(x).reshape(len(x), -1) if is_vector(x[0]) else x
        self.options, self.structure = [stacked(x) for x in zip(*leaves, strict=True)], structures[0]
        self.kernels: Implementation | None = kernels

    def __getitem__(self, index: Int[Array, ""] | int) -> Layer:
        pick = lambda x: _Choice(x, index, self.kernels) if isinstance(x, tuple) else x[index]
        return jax.tree.unflatten(self.structure, [pick(x) for x in self.options])


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
        drawn, fine = (jax.random.normal(rngs.params(), shape) * 0.02).astype(dtype), finer(spec.weights)
        self.embedding = matrix(drawn, fine, axis=-1)
        self.layers = nnx.List([Layer(spec, i, dtype, rngs) for i in range(spec.num_layers)])
        self.norm = Norm(spec, spec.embed_dim, dtype)
        untied = lambda: Linear(spec.embed_dim, spec.vocab_size, False, dtype, rngs, fine)
        self.head = None if spec.tie_embeddings else untied()

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of activations, and of weights that are not quantised."""
        return self.norm.scale.get_raw_value().dtype  # of an abstract decoder as well

    def embed(self, tokens: Int[Array, "*b"]) -> Float[Array, "*b D"]:
        """Token vectors."""
        table = self.embedding[...]
        take = functools.partial(rows, table, dtype=self.dtype) if isinstance(table, Quantized) else table.__getitem__
        return scaled(self.spec, look_up(take, table.shape[0], tokens, self.spec.vocab_size))

    def logits(self, x: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        """Next-token logits in float32."""
        x, table = self.norm(x), self.embedding[...]
        tied = lambda: x @ (table if isinstance(table, Quantized) else table.T)
        y = tied() if self.head is None else self.head(x)
        y = y if y.shape[-1] == self.spec.vocab_size else gather(y, y.ndim - 1, MODEL)
        return soft_cap(y.astype(jnp.float32) * self.spec.logit_scale, self.spec.logit_cap)


def scaled(spec: ModelSpec, vectors: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
    """Token vectors as the first layer reads them."""
    return vectors if spec.embed_scale == 1 else vectors * jnp.asarray(spec.embed_scale, vectors.dtype)


def layer_forward(
    layer: Layer,
    x: Float[Array, "*b T D"],
    turn: rope.Turn,
    attend: Callable[[Array, Array, Array], Float[Array, "*b T N H"]],
) -> Float[Array, "*b T D"]:
    """A layer over whole sequences, without a cache: for all who do not compress what it says of them.

    Args:
      layer: one whose gate, if it has one, says nothing.
      x: the residual stream.
      turn: from `rope.whole_turn`.
      attend: rotated queries `[*b T N H]` and keys `[*b T K H]`, values `[*b T K H]` -> the heads' outputs.
    """
    q, key, value, _ = layer.project(x)
    return layer.finish(x, attend(layer.queries(q, turn), turn.key(layer.keys(key)), layer.values(value)))


def forward(model: Decoder, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """Logits at every position, without a cache: differentiable, for training and as a reference.

    Cost: materialises the `[B, N, T, T]` attention matrix; use `kvjax.prefill` for long prompts.
    """
    spec = model.spec
    t, x = tokens.shape[1], model.embed(tokens)
    for index, layer in enumerate(model.layers):
        attend = functools.partial(_attention_of_all, spec, spec.window(index), layer.sink())
        x = layer_forward(layer, x, rope.whole_turn(spec.rotary(index), spec.head_dim, t), attend)
    return model.logits(x)


def _attention_of_all(
    spec: ModelSpec,
    window: int | None,
    sink: Float[Array, " N"] | None,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
) -> Float[Array, "B T N H"]:
    b, t, _, _ = q.shape
    q = q.reshape(b, t, spec.num_kv_heads, spec.group_size, spec.head_dim)
    distance = jnp.arange(t)[:, None] - jnp.arange(t)
    visible = (distance >= 0) & (distance < (window or t))
    score = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * spec.scale
    score = jnp.where(visible, soft_cap(score, spec.score_cap), -jnp.inf)
    if sink is not None:
        last = jnp.broadcast_to(sink.reshape(spec.num_kv_heads, -1, 1, 1), (*score.shape[:-1], 1))
        score = jnp.concatenate([score, last.astype(score.dtype)], axis=-1)
    prob = jax.nn.softmax(score, axis=-1)[..., :t].astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", prob, v).reshape(b, t, spec.num_heads, spec.head_dim)
