"""Prefill: a batch of prompts through the model, each layer's keys and values compressed as soon as it has attended.

Written for one device, and run on as many as the weights lie on; see `kvjax.parallel.mesh`.
"""

import functools
from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kvjax.attention.prompt import prefill_attention, replay_attention
from kvjax.cache import pages, sharding
from kvjax.cache import tier as tiers_
from kvjax.cache.layout import Cache, Tiers, layer_groups, locate
from kvjax.errors import InputError
from kvjax.generation.allocate import allocations_of
from kvjax.generation.steps import drain
from kvjax.models import rope
from kvjax.models.decoder import Decoder, Layer, normed
from kvjax.models.stack import LayerStack, StackedLayers
from kvjax.parallel import mesh
from kvjax.parallel.mesh import EVERYWHERE, ROWS, SEQUENCES
from kvjax.policies.base import PrefillOutput, Recipe
from kvjax.policies.layers import layer_recipe, rotates_at_read
from kvjax.spec import PREFILL_CHUNK as CHUNK
from kvjax.spec import Gate, ModelSpec, Probe, Prompt, PyTree, RopeSpec
from pallas_kernels.blocks import divisor
from pallas_kernels.rotation import Rotation

RUNGS = (64, 256, 1024)
LEAST = 256  # tokens that are read at once rather than in parts


def padded_length(longest: int) -> int:
    """Tokens that a prompt is padded to: few lengths, so that a new one rarely compiles anything.

    Four times as many at each rung up to 1024, from there on twice as many. Layers read no more blocks of tokens than
    the longest prompt has: a rung costs memory.

    >>> [padded_length(n) for n in (1, 65, 1000, 1025, 5000)]
    [64, 256, 1024, 2048, 8192]
    """
    return next((rung for rung in RUNGS if longest <= rung), pages.ladder(longest, steps=1, smallest=RUNGS[-1]))


def prefill(
    model: Decoder,
    recipe: Recipe,
    tokens: Int[Array, "B T"],
    length: Int[Array, " B"],
    cache: Cache,
    chunk: int = CHUNK,
    *,
    fit: bool = True,
) -> tuple[Float[Array, "B V"], Cache]:
    """Run the prompts and fill the cache. Consumes `cache`: its buffers are reused.

    Layers run one after the other through one compiled function. Each layer's keys and values are compressed as soon as
    its attention is done, so the peak is one layer's full keys and values.

    Args:
      model: the decoder.
      recipe: the method.
      tokens: prompts, padded on the right; T should come from `padded_length`.
      length: tokens of each prompt, at least 1.
      cache: an empty cache from `init_cache`.
      chunk: tokens of a device's prompts together that projections and the feed-forward network read at once, at most,
        but one of each at least: fewer need less memory.
      fit: pools that were made for what a prompt may need shrink to what it needed; without, shapes stay.

    Returns:
      Logits after each prompt's last token, in float32, and the filled cache.

    Raises:
      InputError: a chunk below 1.

    >>> import jax.numpy as jnp, kvjax
    >>> model, recipe = kvjax.load().decoder, kvjax.methods.h2o(budget=8)
    >>> prompt = jnp.zeros((1, kvjax.padded_length(20)), jnp.int32)  # 20 tokens and padding
    >>> cache = kvjax.init_cache(model, recipe, kvjax.Lengths(prompt=(20,), new=4, padded=prompt.shape[1]))
    >>> logits, cache = kvjax.prefill(model, recipe, prompt, jnp.asarray([20], jnp.int32), cache)
    >>> logits.shape, cache[0][0].length.tolist()
    ((1, 4096), [[[8, 8]], [[8, 8]], [[8, 8]], [[8, 8]], [[8, 8]], [[8, 8]]])
    """
    return drain(prefill_by_layer(model, recipe, tokens, length, cache, chunk, fit))


def prefill_by_layer(
    model: Decoder,
    recipe: Recipe,
    tokens: Int[Array, "B T"],
    length: Int[Array, " B"],
    cache: Cache,
    chunk: int = CHUNK,
    fit: bool = True,
) -> Generator[Float[Array, "B T D"], None, tuple[Float[Array, "B V"], Cache]]:
    """`prefill`, for those who have other work between two layers: yields each layer's output, returns the result."""
    if chunk < 1:
        raise InputError(f"prefill-chunk {chunk} is not a number of tokens")
    spec, groups = model.spec, layer_groups(model.spec)
    stacks = model.layers if isinstance(model.layers, StackedLayers) else None
    x, again = _embed(model, tokens), ()
    if recipe.replay is not None:
        more = replayed(tokens.shape[1], recipe.replay) - tokens.shape[1]
        again = _embed(model, jnp.pad(tokens, ((0, 0), (0, more))))
    filled, allocations = list(cache), allocations_of(spec, recipe.structure, groups, length, cache)
    for index in range(spec.num_layers):
        layer, at = (model.layers[index], 0) if stacks is None else stacks.find(index)
        g, place = locate(groups, index)
        group = groups[g]
        x, filled[g], found, again = _prefill_layer(
            layer,
            x,
            filled[g],
            length,
            jnp.asarray(group.places[place], jnp.int32),
            jnp.asarray(place, jnp.int32),
            again,
            jnp.asarray(at, jnp.int32),
            spec=spec,
            recipe=layer_recipe(spec, recipe, index).structure,
            peers=group.peers,
            window=group.window,
            rotary=spec.rotary(index),
            chunk=chunk,
        )
        if group.window in allocations:
            filled = allocations[group.window].after(filled, found)
        yield x
    for g, group in enumerate(groups):
        own = layer_recipe(spec, recipe, group.index[0])
        if fit and own.policy.pool_hooks.shrink is not None:
            filled[g] = _shrink_pool(filled[g], length, own)
    return _last_logits(model, x, length), tuple(filled)


def _shrink_pool(tiers: Tiers, length: Int[Array, " B"], recipe: Recipe) -> Tiers:
    """Leave pools the pages that they will need."""
    shrink = recipe.policy.pool_hooks.shrink
    assert shrink is not None
    tiers, sizes = shrink(tiers, length, recipe.amounts)
    return tuple(
        _resize(t, size=n) if n * t.num_free.shape[0] < t.free.shape[0] else t
        for t, n in zip(tiers, sizes, strict=True)
    )


_resize = mesh.program((sharding.cache,), lambda tier: tier, static=("size",))(tiers_.resize)


@mesh.program((mesh.weights, SEQUENCES), lambda *_: SEQUENCES)
def _embed(model: Decoder, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    return model.embed(tokens)


@mesh.program((mesh.weights, SEQUENCES, SEQUENCES), lambda *_: SEQUENCES)
def _last_logits(model: Decoder, x: Float[Array, "B T D"], length: Int[Array, " B"]) -> Float[Array, "B V"]:
    return model.logits(jnp.take_along_axis(x, (length - 1)[:, None, None], axis=1)[:, 0])


@mesh.program(
    (mesh.weights, SEQUENCES, sharding.cache, SEQUENCES, EVERYWHERE, EVERYWHERE, SEQUENCES, EVERYWHERE),
    lambda layer, x, tiers, *_: (SEQUENCES, tiers, ROWS, SEQUENCES),
    static=("spec", "recipe", "peers", "window", "rotary", "chunk"),
    donate=(1, 2, 6),
)
def _prefill_layer(
    layer: Layer | LayerStack,
    x: Float[Array, "B T D"],
    tiers: Tiers,
    length: Int[Array, " B"],
    index: Int[Array, ""],
    place: Int[Array, ""],
    again: Float[Array, "B Q D"] | tuple = (),
    at: Int[Array, ""] | int = 0,
    *,
    spec: ModelSpec,
    recipe: Recipe,
    peers: int,
    window: int | None,
    rotary: RopeSpec,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "B T D"], Tiers, PrefillOutput, Float[Array, "B Q D"] | tuple]:
    """One layer over the whole prompt: exact attention, then compression into the layer's rows.

    `again` is the prompt behind its end, see `kvjax.spec.Probe`: it sees the prompt, which does not see it. `at` is the
    layer's place, where it lies in a stack.
    """
    if isinstance(layer, LayerStack):
        layer = layer.at(at)
    read: dict[str, Any] = dict(scale=spec.scale, cap=spec.score_cap, window=window, kernels=recipe.kernels)
    rotation, longest = rope.rotation(rotary, spec.head_dim, length[:, None]), jnp.max(length)
    pos = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    turn = rope.turn(rotary, rotation, pos[:, :, None])
    q, key, value, gate = _project(layer, x, turn, longest, chunk)
    k, v = layer.keys(key), layer.values(value)

    olds = tuple(tiers_.layer(t, place) for t in tiers)
    rewrite, visible_until, rewritten = recipe.policy.prompt_hooks.rewrite, None, ()
    if rewrite is not None and isinstance(gate, Gate):
        k, v, visible_until, rewritten = rewrite(olds, k, v, gate, length, window, recipe.kernels)
        key, value = k, v
    k = turn.key(k)
    heads, lse = prefill_attention(q, k, v, length, sink=layer.sink(), visible_until=visible_until, **read)
    probe = ()
    if not isinstance(again, tuple):
        assert recipe.replay is not None
        again, probe = _read_again(layer, again, (k, v), length, rotary, rotation, recipe.replay, chunk, read)

    prompt = Prompt(
        q=q,
        k=k,
        v=v,
        key=key if rotates_at_read(spec, recipe) else k,
        value=value,
        lse=lse,
        length=length,
        layer=index,
        num_layers=peers,
        gate=gate,
        rewritten=rewritten,
        out=layer.output,
        probe=probe,
        rotation=rotation,
        keep=() if layer.keep is None else functools.partial(_worth, layer, x, chunk),
        **read,
    )
    news, found = recipe.policy.prefill(olds, prompt)
    tiers = tuple(tiers_.with_layer(t, place, old, new) for t, old, new in zip(tiers, olds, news, strict=True))
    return _finish(layer, x, heads, longest, chunk), tiers, found, again


def replayed(tokens: int, chunk: int) -> int:
    """Q, the tokens of a prompt that is read again in whole chunks of at most `chunk`.

    >>> replayed(1024, 2048), replayed(1024, 256), replayed(1024, 500)
    (1024, 1024, 1500)
    """
    chunk = min(chunk, tokens)
    return -(-tokens // chunk) * chunk


def _read_again(
    layer: Layer,
    again: Float[Array, "B Q D"],
    prompt: tuple[Float[Array, "B T heads H"], Float[Array, "B T heads H"]],
    length: Int[Array, " B"],
    rotary: RopeSpec,
    rotation: Rotation,
    replay: int,
    chunk: int,
    read: dict[str, Any],
) -> tuple[Float[Array, "B Q D"], Probe]:
    """One layer over the prompt that is read again behind its end, in chunks of `replay`; and what it asks.

    `prompt` are the keys and values that it sees, `read` how attention reads them.
    """
    size, longest = min(replay, prompt[0].shape[1]), jnp.max(length)
    pos = length[:, None] + jnp.arange(again.shape[1]) % size
    turn = rope.turn(rotary, rotation, pos[:, :, None])
    q, key, value, _ = _project(layer, again, turn, longest, chunk)
    own = turn.key(layer.keys(key)), layer.values(value)
    heads, lse = replay_attention(q, prompt, own, length, chunk=size, sink=layer.sink(), **read)
    norm = jnp.linalg.norm(normed(again, layer.attention_norm).astype(jnp.float32), axis=-1)
    return _finish(layer, again, heads, longest, chunk), Probe(q, lse, norm, size)


def _project(
    layer: Layer,
    x: Float[Array, "B T D"],
    turn: rope.Turn,
    longest: Int[Array, ""],
    chunk: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K R"], Float[Array, "B T K W"], Gate | tuple]:
    """What `Layer.project` makes of prompts, queries rotated, some tokens at a time.

    It is written heads first, as attention reads it on XLA and on TPUs, which would keep another copy in that order.
    """

    def read(x: Array, turn: rope.Turn) -> tuple[PyTree, ...]:
        q, *rest = layer.project(x)
        return layer.queries(q, turn), *rest

    n = at_once(x.shape[0], x.shape[1], chunk)
    if n == x.shape[1]:
        return read(x, turn)

    def add_part(i: Array, whole: PyTree) -> PyTree:
        part = read(*jax.tree.map(lambda y: jax.lax.dynamic_slice_in_dim(y, i * n, n, axis=1), (x, turn)))
        put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, jnp.moveaxis(new, 1, -2), i * n, axis=-2)
        return jax.tree.map(put, whole, part)

    shapes = jax.eval_shape(lambda: jax.tree.map(lambda y: jnp.moveaxis(y, 1, -2), read(x, turn)))
    whole = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), shapes)
    whole = jax.lax.fori_loop(0, (longest + n - 1) // n, add_part, whole)
    return jax.tree.map(lambda y: jnp.moveaxis(y, -2, 1), whole)


def _worth(layer: Layer, x: Float[Array, "B T D"], chunk: int) -> Float[Array, "B K T"]:
    """`Layer.worth` of prompts, some tokens at a time."""
    b, t, d = x.shape
    parts = x.reshape(b, -1, at_once(b, t, chunk), d)
    found = jax.lax.map(layer.worth, jnp.moveaxis(parts, 1, 0))  # parts B n K
    return found.transpose(1, 3, 0, 2).reshape(b, -1, t)


def _finish(
    layer: Layer, x: Float[Array, "B T D"], heads: Float[Array, "B T N H"], longest: Int[Array, ""], chunk: int
) -> Float[Array, "B T D"]:
    """`Layer.finish` of prompts, some tokens at a time: the new residual stream is written over the old one."""
    n = at_once(x.shape[0], x.shape[1], chunk)
    if n == x.shape[1]:
        return layer.finish(x, heads)
    heads = jnp.moveaxis(heads, 1, 2)

    def finish_part(i: Array, stream: Array) -> Array:
        part = lambda y, axis: jax.lax.dynamic_slice_in_dim(y, i * n, n, axis)
        new = layer.finish(part(stream, 1), jnp.moveaxis(part(heads, 2), 2, 1))
        return jax.lax.dynamic_update_slice_in_dim(stream, new, i * n, 1)

    return jax.lax.fori_loop(0, (longest + n - 1) // n, finish_part, x)


def at_once(batch: int, tokens: int, chunk: int) -> int:
    """Tokens of each of a batch's prompts that are read at once: a divisor of them, so that all parts are equal.

    No more than a sixteenth where that is many: what is behind the longest prompt is not read.

    >>> at_once(4, 32768, 4096), at_once(1, 4096, 4096), at_once(1, 256, 4096)
    (1024, 256, 256)
    """
    return divisor(tokens, max(1, min(chunk // batch, max(tokens // 16, LEAST))))
