"""What a plan adds up to, by formula: device bytes by part and the bound on speed. Formulas: docs/bytes.md."""

import functools
import math
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from kvjax.cache import layout, sharding
from kvjax.cache.tier import Bytes
from kvjax.generation import prefill
from kvjax.generation.allocate import init_cache
from kvjax.methods import GUIDED
from kvjax.models.decoder import Layer
from kvjax.models.keep import KeepGate
from kvjax.parallel import mesh
from kvjax.parallel.collectives import DATA, HEADS
from kvjax.plan.chips import Chip
from kvjax.plan.dry_run import CacheSize, cache_size
from kvjax.plan.settings import Setting
from kvjax.policies.base import PrefillOutput
from kvjax.policies.layers import layer_recipe
from kvjax.spec import PyTree
from pallas_kernels.blocks import divisor
from pallas_kernels.prefill_attention.reference import tokens_at_once

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


def estimate(setting: Setting) -> Parts:
    """All parts, without compiling anything."""
    cache = held(setting).bytes
    return Parts(
        weights=sum(weights(setting)),
        codes=cache.payload + cache.slack,
        scales=cache.scales,
        statistics=cache.statistics,
        tables=cache.tables,
        prefill=waiting(setting) + prefill_temporaries(setting),
        decode=decode_temporaries(setting),
    )


def weights(setting: Setting) -> Weights:
    """Bytes of a model's arrays."""
    decoder, groups = setting.model.decoder, layout.layer_groups(setting.spec)
    return Weights(
        embedding=size(decoder.embedding),
        head=size(decoder.norm) + (0 if decoder.head is None else size(decoder.head)),
        layers=sum(len(group.index) * size(layer(setting, group.index[0])) for group in groups),
    )


def idle(setting: Setting, tokens: int) -> int:
    """Bytes of experts that so many tokens do not use, at least."""
    found = setting.spec.experts
    if found is None:
        return 0
    mlps = [layer(setting, index).mlp for index in range(setting.spec.num_layers)]
    whole = sum(size((mlp.gate, mlp.up, mlp.down)) for mlp in mlps)
    return whole * max(0, found.count - tokens * found.chosen) // found.count


@functools.lru_cache(maxsize=64)
def held(setting: Setting) -> CacheSize:
    """The cache."""
    whole, parts = cache_size(setting.model, setting.recipe, setting.lengths), _pools(setting)
    return CacheSize(Bytes(*(part // parts for part in whole.bytes)), whole.slots // parts)


def _pools(setting: Setting) -> int:
    """Devices that have different parts of the cache."""
    return 1 if setting.mesh is None else setting.mesh.shape[DATA] * setting.mesh.shape[HEADS]


@functools.lru_cache(maxsize=64)
def layer(setting: Setting, index: int) -> Layer:
    """A layer without arrays; it has a gate where the method needs one."""
    made = nnx.eval_shape(lambda: Layer(setting.spec, index, jnp.dtype(setting.dtype), nnx.Rngs(0)))
    if setting.recipe.name in GUIDED and setting.spec.window(index) is None:
        made.keep = nnx.eval_shape(lambda: KeepGate(setting.spec, nnx.Rngs(0)))
    return mesh.placed(setting.mesh, mesh.weights, made)


def size(tree: PyTree) -> int:
    """Bytes of arrays that need not exist, on one device."""
    return sum(_own(x) * jax.dtypes.itemsize_bits(x.dtype) // 8 for x in jax.tree.leaves(tree))


def _own(x: jax.Array | jax.ShapeDtypeStruct) -> int:
    """Numbers that one device has, in whole bytes."""
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    each = 8 // math.gcd(8, jax.dtypes.itemsize_bits(x.dtype))
    return -(-math.prod(shape) // each) * each


def waiting(setting: Setting) -> int:
    """Bytes that layers leave to be written or allocated once several of them, or all, have been read."""
    spec, data, of_one = setting.spec, setting.devices.data, 0
    for window in {spec.window(i) for i in range(spec.num_layers)}:
        index = layout.layers_with(spec, window)
        budget = layer_recipe(spec, setting.recipe, index[0]).budget
        if budget is not None and budget.allocate is not None:
            found = found_in_a_layer(setting._replace(batch=data), index[0])  # sequences are apart
            of_one += min(budget.update_interval or len(index), len(index)) * size(found.pending) + len(index) * size(
                found.stats
            )
    return setting.batch // data * of_one


@functools.lru_cache(maxsize=64)
def found_in_a_layer(setting: Setting, index: int) -> PrefillOutput:
    """Shapes of what reading the prompts with one layer leaves."""
    args, static = layer_arguments(setting, abstract_cache(setting), index)
    with mesh.on(setting.mesh):
        found = jax.eval_shape(functools.partial(prefill._prefill_layer, **static), *args)[2]
    return mesh.placed(setting.mesh, mesh.ROWS, found)


def layer_arguments(setting: Setting, cache: layout.Cache, index: int) -> tuple[tuple[PyTree, ...], dict[str, Any]]:
    """What a layer is read with, as shapes: arguments, and those that are static."""
    spec = setting.spec
    group = next(g for g, group in enumerate(layout.layer_groups(spec)) if index in group.index)
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    stream = (setting.batch, setting.lengths.padded, spec.embed_dim)
    arrays = layer(setting, index), jax.ShapeDtypeStruct(stream, jnp.dtype(setting.dtype)), cache[group]
    static = {
        "spec": spec,
        "recipe": layer_recipe(spec, setting.recipe, index),
        "peers": len(layout.layers_with(spec, spec.window(index))),
        "window": spec.window(index),
        "rotary": spec.rotary(index),
    }
    again = replayed(setting)
    behind = jax.ShapeDtypeStruct((setting.batch, again, spec.embed_dim), jnp.dtype(setting.dtype)) if again else ()
    return (*arrays, ints(setting.batch), ints(), ints(), behind), static


def replayed(setting: Setting) -> int:
    """Tokens of a padded prompt that are read again behind its end."""
    chunk = setting.recipe.replay
    return 0 if chunk is None else prefill.replayed(setting.lengths.padded, chunk)


@functools.lru_cache(maxsize=64)
def abstract_cache(setting: Setting) -> layout.Cache:
    """The shapes of a cache."""
    made = jax.eval_shape(functools.partial(init_cache, setting.model.decoder, setting.recipe, setting.lengths))
    return mesh.placed(setting.mesh, sharding.cache, made)


def prefill_temporaries(setting: Setting) -> int:
    """Bytes that one layer over all prompts takes: the residual stream, and the wider part of the layer.

    With n = batch x padded tokens, c those that are read at once, in numbers a token: the stream is D. Attention holds
    queries, keys, values and outputs, `2 N H + 2 K H`, N log-sum-exps and H cosines and sines in float32 and the blocks
    that it works on, or, before it, two of the stream for c tokens. A TPU copies some of it for its layouts, in all
    `4 (N H + K H)`. The feed-forward network holds the outputs, and for c tokens `3 D + 2 F`; of experts,
    of which a token has k, `3 D + 6 k D`.
    """
    setting = setting.share
    spec, itemsize = setting.spec, jnp.dtype(setting.dtype).itemsize
    batch, padded, width = setting.batch, setting.lengths.padded, spec.embed_dim
    n, part = batch * (padded + replayed(setting)), batch * prefill.at_once(batch, padded, prefill.CHUNK)
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    inner = 2 * spec.mlp_dim if spec.experts is None else 6 * spec.experts.chosen * width
    fed = itemsize * (n * queries + part * (3 * width + inner))
    if setting.platform == "tpu":
        attention = 4 * n * itemsize * (queries + keys)
    else:
        block = divisor(padded, tokens_at_once(padded))
        blocks = batch * spec.num_heads * block * (4 + itemsize) * (block + spec.head_dim)
        attention = n * (itemsize * 2 * (queries + keys) + 4 * (spec.num_heads + spec.head_dim))
        attention += max(blocks, 2 * part * itemsize * width)
    return n * itemsize * width + max(attention, fed)


def decode_temporaries(setting: Setting) -> int:
    """Bytes that a step takes: logits over the vocabulary, blocks of slots, and their weights where a method learns."""
    slots, setting = held(setting).slots, setting.share
    spec, itemsize = setting.spec, jnp.dtype(setting.dtype).itemsize
    rows = setting.batch * spec.num_rows
    block = rows * BLOCK * sum(spec.widths(0)) * (itemsize + 4)
    learned = 0
    if setting.recipe.policy.observe is not None:
        learned = 3 * 4 * spec.num_heads // spec.num_kv_heads * slots // spec.num_layers
    return setting.batch * spec.vocab_size * (4 + itemsize) + block + learned


class Work(NamedTuple):
    """What a device has to do at least."""

    read: int  # bytes of a step: weights, and every slot that is allocated
    step: float  # multiplications of a step, each with an addition
    prompts: float  # likewise, of reading the prompts


def work(setting: Setting) -> Work:
    """Bytes and products of one device."""
    cache, stored = held(setting), weights(setting)
    whole = setting._replace(spec=replace(setting.spec, weights=None))  # its bytes say how many products there are
    numbers, spare = weights(whole), functools.partial(idle, whole)
    unused, setting = functools.partial(idle, setting), setting.share
    spec, itemsize = setting.spec, jnp.dtype(setting.dtype).itemsize
    attended = cache.slots * spec.group_size * sum(spec.widths(0))
    seen = setting.context / 2 * spec.num_layers * spec.num_heads * 2 * spec.head_dim
    linear, again = (numbers.layers - spare(1)) // itemsize, setting.recipe.replay is not None  # and sees all tokens
    return Work(
        read=stored.read - unused(setting.batch) + cache.bytes.total - cache.bytes.tables,
        step=setting.batch * (numbers.read - spare(1)) // itemsize + attended,
        prompts=setting.batch * setting.context * (linear * (1 + again) + seen * (1 + 2 * again)),
    )


def bound(setting: Setting, chip: Chip) -> Bound:
    """What bandwidth and peak allow; what devices tell each other costs nothing."""
    needed = work(setting)
    step = max(needed.read / chip.bandwidth, 2 * needed.step / chip.flops)
    return Bound(
        prefill_s=max(2 * needed.prompts / chip.flops, weights(setting).read / chip.bandwidth),
        step_s=step,
        tokens_per_s=setting.devices.data * setting.share.batch / step,
        limit="bandwidth" if step == needed.read / chip.bandwidth else "compute",
    )
