"""What a plan adds up to, by formula: device bytes by part and the bound on speed. Formulas: docs/bytes.md."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from kvjax import decode
from kvjax.abstract import CacheSize, cache_size
from kvjax.cache.policy import Found
from kvjax.models.decoder import Layer
from kvjax.plan.chips import Chip, Platform
from kvjax.plan.settings import Setting
from kvjax.spec import ModelSpec, PyTree
from pallas_kernels.blocks import divisor

BLOCK = 512  # tokens of a block of attention, at most


class Parts(NamedTuple):
    """Bytes of a device."""

    weights: int
    codes: int  # payload and slack
    scales: int
    statistics: int
    tables: int
    prefill: int  # what reading the prompts takes beside weights and cache
    decode: int  # what a step takes beside them

    @property
    def cache(self) -> int:
        """All parts of the cache."""
        return self.codes + self.scales + self.statistics + self.tables

    @property
    def peak(self) -> int:
        """The most that is needed at one time."""
        return self.weights + self.cache + max(self.prefill, self.decode)


class Weights(NamedTuple):
    """Bytes of a model."""

    embedding: int
    head: int  # and the last norm; the norm alone where the embedding is the head
    layers: int

    @property
    def read(self) -> int:
        """What a step reads: of an embedding that is not the head, it is a row."""
        return self.layers + self.head + (0 if self.head > self.embedding else self.embedding)


class Bound(NamedTuple):
    """No program can be faster on this chip: bytes over bandwidth, or products over peak, whichever is more."""

    prefill_s: float  # all prompts
    step_s: float  # a token of every sequence, every slot being filled
    tokens_per_s: float  # of all sequences together
    limit: str  # of a step: "bandwidth" or "compute"


def estimate(setting: Setting, platform: Platform) -> Parts:
    """All parts, without compiling anything."""
    cache = held(setting).bytes
    return Parts(
        weights=sum(weights(setting)),
        codes=cache.payload + cache.slack,
        scales=cache.scales,
        statistics=cache.statistics,
        tables=cache.tables,
        prefill=waiting(setting) + prefill_temporaries(setting, platform),
        decode=decode_temporaries(setting),
    )


def weights(setting: Setting) -> Weights:
    """Bytes of a model's arrays."""
    decoder, groups = setting.model.decoder, decode.layer_groups(setting.spec)
    return Weights(
        embedding=size(decoder.embedding),
        head=size(decoder.norm) + (0 if decoder.head is None else size(decoder.head)),
        layers=sum(len(group.index) * size(layer(setting.spec, setting.dtype, group.index[0])) for group in groups),
    )


@functools.lru_cache(maxsize=64)
def held(setting: Setting) -> CacheSize:
    """The cache."""
    return cache_size(setting.model, setting.recipe, setting.lengths)


@functools.lru_cache(maxsize=64)
def layer(spec: ModelSpec, dtype: str, index: int) -> Layer:
    """A layer without arrays."""
    return nnx.eval_shape(lambda: Layer(spec, index, jnp.dtype(dtype), nnx.Rngs(0)))


def size(tree: PyTree) -> int:
    """Bytes of arrays that need not exist."""
    return sum(-(-x.size * jax.dtypes.itemsize_bits(x.dtype) // 8) for x in jax.tree.leaves(tree))


def waiting(setting: Setting) -> int:
    """Bytes that layers leave to be settled or allotted once several of them, or all, have been read."""
    budget, layers = setting.recipe.budget, setting.spec.num_layers
    if budget is None or budget.allocate is None:
        return 0
    found = found_in_a_layer(setting._replace(batch=1))  # sequences are apart
    of_one = min(budget.every or layers, layers) * size(found.waiting) + layers * size(found.info)
    return setting.batch * of_one


@functools.lru_cache(maxsize=64)
def found_in_a_layer(setting: Setting) -> Found:
    """Shapes of what reading the prompts with one layer leaves."""
    args, static = layer_arguments(setting, abstract_cache(setting), 0)
    return jax.eval_shape(functools.partial(decode._prefill_layer, **static), *args)[2]


def layer_arguments(setting: Setting, cache: decode.Cache, index: int) -> tuple[tuple[PyTree, ...], dict[str, Any]]:
    """What a layer is read with, as shapes: arguments, and those that are static."""
    spec = setting.spec
    group = next(g for g, group in enumerate(decode.layer_groups(spec)) if index in group.index)
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    stream = (setting.batch, setting.lengths.padded, spec.embed_dim)
    arrays = layer(spec, setting.dtype, index), jax.ShapeDtypeStruct(stream, jnp.dtype(setting.dtype)), cache[group]
    static = {"spec": spec, "recipe": setting.recipe, "window": spec.window(index), "rotary": spec.rotary(index)}
    return (*arrays, ints(setting.batch), ints(), ints()), static


def abstract_cache(setting: Setting) -> decode.Cache:
    """The shapes of a cache."""
    return jax.eval_shape(functools.partial(decode.init_cache, setting.model.decoder, setting.recipe, setting.lengths))


def prefill_temporaries(setting: Setting, platform: Platform) -> int:
    """Bytes that one layer over all prompts takes: the residual stream, and the wider half of the layer.

    With n = batch x padded tokens, in numbers a token: the stream is D. The feed-forward network holds its gate, its up
    projection and the stream's next value, `2 F + D`; on TPU the first two are one, `F + D`. Attention holds queries,
    keys, values and outputs, `2 N H + 2 K H`, N log-sum-exps in float32, and the blocks that it works on.
    """
    spec, itemsize = setting.spec, jnp.dtype(setting.dtype).itemsize
    n = setting.batch * setting.lengths.padded
    widest = (1 if platform == "tpu" else 2) * spec.mlp_dim + spec.embed_dim
    heads = 2 * (spec.num_heads + spec.num_kv_heads) * spec.head_dim
    block = divisor(setting.lengths.padded, BLOCK)
    each = 16 * block + 4 * spec.head_dim if platform == "tpu" else (4 + itemsize) * (block + spec.head_dim)
    blocks = setting.batch * spec.num_heads * block * each
    attention = n * (itemsize * heads + 4 * spec.num_heads) + blocks
    return n * itemsize * spec.embed_dim + max(n * itemsize * widest, attention)


def decode_temporaries(setting: Setting) -> int:
    """Bytes that a step takes: logits over the vocabulary, blocks of slots, and their weights where a method learns."""
    spec, itemsize = setting.spec, jnp.dtype(setting.dtype).itemsize
    rows = setting.batch * spec.num_rows
    block = rows * BLOCK * sum(spec.widths(0)) * (itemsize + 4)
    learned = 0
    if setting.recipe.policy.observe is not None:
        slots = held(setting).slots
        learned = 3 * 4 * spec.num_heads // spec.num_kv_heads * slots // spec.num_layers
    return setting.batch * spec.vocab_size * (4 + itemsize) + block + learned


def bound(setting: Setting, chip: Chip) -> Bound:
    """What bandwidth and peak allow."""
    spec, cache = setting.spec, held(setting)
    itemsize, stored = jnp.dtype(setting.dtype).itemsize, weights(setting)
    read = stored.read + cache.bytes.total - cache.bytes.tables
    products = setting.batch * stored.read // itemsize + cache.slots * spec.group_size * sum(spec.widths(0))
    step = max(read / chip.bandwidth, 2 * products / chip.flops)
    seen = setting.context / 2 * spec.num_layers * spec.num_heads * 2 * spec.head_dim
    prompts = setting.batch * setting.context * (stored.layers // itemsize + seen)
    return Bound(
        prefill_s=max(2 * prompts / chip.flops, stored.read / chip.bandwidth),
        step_s=step,
        tokens_per_s=setting.batch / step,
        limit="bandwidth" if step == read / chip.bandwidth else "compute",
    )
