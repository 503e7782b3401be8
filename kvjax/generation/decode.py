"""One decode step, given tokens, the decode loop: the compiled programs that read a cache, and use it up.

They are written for one device and run on as many as the weights lie on; see `kvjax.parallel.mesh`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from kvjax.attention.decode import ReadOptions, decode_attention
from kvjax.cache import sharding
from kvjax.cache import tier as tiers_
from kvjax.cache.layout import Cache, Tiers, layer_groups, layer_runs, locate
from kvjax.errors import InputError
from kvjax.generation import sampling
from kvjax.models import rope
from kvjax.models.decoder import Decoder, Layer, OneOf
from kvjax.models.stack import StackedLayers
from kvjax.parallel import mesh
from kvjax.parallel.collectives import DATA, add, gather
from kvjax.parallel.mesh import EVERYWHERE, SEQUENCES, STEPS
from kvjax.policies.base import Recipe
from kvjax.policies.layers import layer_recipe, rotates_at_read
from kvjax.spec import ModelSpec, PyTree, RopeSpec, Token, readable
from pallas_kernels.implementation import Implementation
from pallas_kernels.rotation import Rotation

STOPS = 8  # a step of the number of ids that end a text
ENDED, NOT_FINITE = -1, -2  # in place of a token: the sequence had stopped; its logits are not finite
Measure = Callable[[Decoder, Float[Array, "B D"], PyTree], PyTree]


def _decode_layer(
    layer: Layer,
    recipe: Recipe,
    spec: ModelSpec,
    index: int,
    x: Float[Array, "B D"],
    tiers: Tiers,
    shared: Tiers,
    pos: Array,
    active: Array,
) -> tuple[Float[Array, "B D"], Tiers]:
    """One layer for one token: insert, attend, observe; what is shared is attended to alone."""
    recipe = layer_recipe(spec, recipe, index)
    policy, rotary, window = recipe.policy, spec.rotary(index), spec.window(index)
    q, key, value, gate = layer.project(x)  # B N H, B K R
    q, k = q.reshape(*key.shape[:2], -1, spec.head_dim), layer.keys(key)
    here = pos[:, None, None]
    at_read = rotates_at_read(spec, recipe)
    rotation = rope.rotation(rotary, spec.head_dim, pos[:, None] + 1)
    angles = tuple(angle[:, :, 0] for angle in rotation.angles(here))  # B 1 H/2
    if not at_read:
        key = rope.rotate(k, *angles)
    token = Token(q, k, key, value, pos, active, window, gate, angles)
    tiers = policy.insert(tiers, token)
    seen, place, query_place = (*shared, *tiers), None, jnp.broadcast_to(here, (*key.shape[:2], 1))
    if (positions := recipe.positions) is not None:  # keys stand at places in the cache
        length = functools.reduce(jnp.add, (tier.length for tier in seen))
        place = lambda at: positions(at, pos, length)
        query_place = place(query_place)
        rotation = _in_cache(spec.head_dim, rotary, sum(tier.capacity for tier in seen), length)
    sink = layer.sink()
    mean, probs = decode_attention(
        layer.queries(q, rope.turn(rotary, rotation, query_place)),
        seen,
        (*(recipe.context.stores if recipe.context else ()), *recipe.stores),
        ReadOptions(
            scale=spec.scale,
            cap=spec.score_cap,
            sink=None if sink is None else sink.reshape(key.shape[1], -1),
            after=None if window is None else _before(query_place, window),
            place=place,
            expand=layer.expand(rotation) if at_read else None,
            select=None if recipe.select is None else functools.partial(recipe.select, seen=readable(pos, window) + 1),
            probabilities=policy.observe is not None,
        ),
        recipe.kernels,
    )
    if policy.observe is not None:
        tiers = policy.observe(tiers, token, probs)
    out = layer.heads(mean.astype(x.dtype))
    return layer.finish(x, out.reshape(x.shape[0], spec.num_heads, spec.head_dim)), tiers


def _before(place: Int[Array, "B K one"], window: int) -> Int[Array, "B K"]:
    """The last place that a query cannot read through a sliding window, -1 = that of slots that nobody reads yet."""
    return jnp.maximum(place[..., 0] - window, -1)


def _in_cache(head_dim: int, rotary: RopeSpec, capacity: int, length: Int[Array, "B K"]) -> Rotation:
    """How queries and keys turn at places in the cache.

    They are below its capacity: a table, which equal layers and all steps share, saves a sine and a cosine per number.
    """
    if rotary.follows_length:  # as long as the cache is
        return rope.rotation(rotary, head_dim, length)
    size = jnp.full((1, 1), capacity)
    rotation = rope.rotation(rotary, head_dim, size)
    cos, sin = rotation.angles(jnp.arange(capacity)[None, None])
    return rotation._replace(table=(cos[0, 0], sin[0, 0]))


def _layers_of(
    model: Decoder, run: Sequence[int], kernels: Implementation | None
) -> tuple[Callable[[Array | int], Layer], bool]:
    """The layers of a run by their number in it, and whether they are a loop: however many, one is compiled then.

    They are where they lie in stacks, and on CPUs those that `OneOf` takes. On GPUs they are unrolled.
    """
    if isinstance(model.layers, StackedLayers):
        stack, place = model.layers.find(run[0])
        return lambda i: stack.at(place + i), len(run) > 1
    layers, plain = [model.layers[index] for index in run], model.spec.latent is None and model.spec.experts is None
    if len(run) > 1 and mesh.platform() == "cpu" and mesh.in_force() is None and plain:
        return OneOf(layers, kernels).__getitem__, True
    return layers.__getitem__, False


def decode_step(
    model: Decoder,
    recipe: Recipe,
    cache: Cache,
    token: Int[Array, " B"],
    pos: Int[Array, " B"],
    active: Bool[Array, " B"] | None = None,
    shared: Cache = (),
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits after one more token of each sequence, and the cache with that token in it.

    A pure function for those who write their own loop; call it inside `jit` and donate the cache.

    Args:
      model: the decoder.
      recipe: the method.
      cache: from `prefill` or an earlier step.
      token: the token to read.
      pos: its position.
      active: False where a sequence has ended: its cache stays as it is; None = all active.
      shared: the cache of one sequence that all of these continue, which `recipe.context` made: it is read only. The
        sequences' own caches hold what follows it.

    The cache has room for the `lengths.new` tokens that `init_cache` was told of; methods that append drop what comes
    after them. A model whose rotary frequencies change with length (`longrope`) must not be taken across that length
    either: keys that are cached after rotation keep the frequencies of their prompt, and logits would be wrong. The
    position is data, so that nothing here can refuse it; `init_cache` refuses to make room for it.

    >>> import jax, jax.numpy as jnp, kvjax
    >>> model, recipe = kvjax.load().decoder, kvjax.methods.full()
    >>> prompt, length = jnp.ones((1, 64), jnp.int32), jnp.asarray([3], jnp.int32)
    >>> cache = kvjax.init_cache(model, recipe, kvjax.Lengths(prompt=(3,), new=2, padded=64))
    >>> logits, cache = kvjax.prefill(model, recipe, prompt, length, cache)
    >>> step = jax.jit(kvjax.decode_step, static_argnames="recipe", donate_argnames="cache")
    >>> logits, cache = step(model, recipe, cache, logits.argmax(-1).astype(jnp.int32), length)
    >>> int(cache[0][0].length[0, 0, 0])
    4
    """
    active = jnp.ones(token.shape, bool) if active is None else active
    if cache[0][0].num_free.shape[0] > 1 and mesh.of(model) is None and mesh.in_force() is None:
        raise InputError("the cache lies on a mesh: run the step under jax.set_mesh(model.mesh)")
    with mesh.on(mesh.of(model)):
        return _step(model, cache, token, pos, active, shared, recipe=recipe)


@mesh.spread(
    (mesh.weights, sharding.cache, SEQUENCES, SEQUENCES, SEQUENCES, sharding.cache),
    lambda model, cache, *_: (SEQUENCES, cache),
)
def _step(
    model: Decoder,
    cache: Cache,
    token: Int[Array, " B"],
    pos: Int[Array, " B"],
    active: Array,
    shared: Cache,
    *,
    recipe: Recipe,
) -> tuple[Float[Array, "B V"], Cache]:
    x, cache = _read_token(model, recipe, cache, token, pos, active, shared)
    return model.logits(x), cache


def _read_token(
    model: Decoder,
    recipe: Recipe,
    cache: Cache,
    token: Int[Array, " B"],
    pos: Int[Array, " B"],
    active: Array,
    shared: Cache,
) -> tuple[Float[Array, "B D"], Cache]:
    """The last layer's output for one more token of each sequence, and the cache with that token in it."""
    spec, groups = model.spec, layer_groups(model.spec)
    x = model.embed(token)
    own = [layer_recipe(spec, recipe, group.index[0]) for group in groups]
    filled = [part.policy.pool_hooks.reserve(tiers, active) for part, tiers in zip(own, cache, strict=True)]
    for run in layer_runs(spec):
        group, first = locate(groups, run[0])
        beside = shared[group] if shared else ()

        def read(
            layer: Layer,
            place: Array | int,
            carry: tuple[Array, Tiers],
            index: int = run[0],
            beside: Tiers = beside,
        ) -> tuple[Array, Tiers]:
            x, tiers = carry
            olds, fixed = (tuple(tiers_.layer(t, place) for t in each) for each in (tiers, beside))
            x, views = _decode_layer(layer, recipe, spec, index, x, olds, fixed, pos, active)
            return x, tuple(tiers_.with_layer(t, place, *each) for t, *each in zip(tiers, olds, views, strict=True))

        carry, (layer, in_a_loop) = (x, filled[group]), _layers_of(model, run, recipe.kernels)
        body = lambda i, carry, layer=layer, read=read, first=first: read(layer(i), first + i, carry)
        if in_a_loop:
            carry = jax.lax.fori_loop(0, len(run), body, carry)
        else:
            for i in range(len(run)):
                carry = body(i, carry)
        x, filled[group] = carry
    return x, tuple(filled)


@mesh.program(
    (mesh.weights, sharding.cache, *(SEQUENCES,) * 4, STEPS, sharding.cache),
    lambda model, cache, *_: (SEQUENCES, cache, STEPS),
    static=("recipe", "measure"),
    donate=(1,),
)
def feed(
    model: Decoder,
    cache: Cache,
    logits: Float[Array, "B V"],
    tokens: Int[Array, "B Q"],
    length: Int[Array, " B"],
    count: Int[Array, " B"],
    given: PyTree,
    shared: Cache = (),
    *,
    recipe: Recipe,
    measure: Measure | None = None,
) -> tuple[Float[Array, "B V"], Cache, PyTree]:
    """Read given tokens one after the other through the compressed cache: a question, a text to be scored.

    Args:
      model: the decoder.
      cache: from `prefill` or an earlier call; consumed.
      logits: after the token before the first one.
      tokens: the tokens, padded on the right.
      length: position of the first one.
      count: how many are not padding; may be 0.
      given: arrays `[Q ...]`, one entry for each step's `measure`.
      shared: as in `decode_step`; it stays as it is.
      recipe, measure: static; `(model, last layer's output [B D], entry of given) -> arrays` is collected every step.

    Returns:
      Logits after each sequence's last token, the cache, and what was measured, `[Q ...]`, zeros where nobody read.
    """

    measured_by = (lambda *args: ()) if measure is None else measure

    def step(i: Array, carry: tuple[Cache, Array, PyTree]) -> tuple[Cache, Array, PyTree]:
        cache, last, measured = carry
        x, cache = _read_token(model, recipe, cache, tokens[:, i], length + i, i < count, shared)
        found = measured_by(model, x, jax.tree.map(lambda entries: entries[i], given))
        measured = jax.tree.map(lambda all_, one: all_.at[i].set(one), measured, found)
        return cache, jnp.where((i == count - 1)[:, None], x, last), measured

    last = jnp.zeros((tokens.shape[0], model.spec.embed_dim), model.dtype)
    found = jax.eval_shape(measured_by, model, last, jax.tree.map(lambda entries: entries[0], given))
    measured = jax.tree.map(lambda x: jnp.zeros((tokens.shape[1], *x.shape), x.dtype), found)
    steps = jnp.max(gather(count, 0, DATA))  # on all devices: they read together
    cache, last, measured = jax.lax.fori_loop(0, steps, step, (cache, last, measured))
    return jnp.where((count > 0)[:, None], model.logits(last), logits), cache, measured


class DecodeState(NamedTuple):
    """What the decode loop carries."""

    cache: Cache
    token: Int[Array, " B"]  # chosen and not yet read
    pos: Int[Array, " B"]  # its position
    done: Bool[Array, " B"]  # the sequence has ended
    step: Int[Array, " B"]  # tokens chosen so far
    seen: Int[Array, "B V"]  # 1 in the prompt; chosen: one more than how often; else 0: for penalties


class Ends(NamedTuple):
    """What ends each sequence."""

    stop: Int[Array, "B E"]  # a token of these; -1 is none
    limit: Int[Array, " B"]  # so many tokens


def ends(stop: Sequence[int], limit: int, batch: int) -> Ends:
    """Ends of sequences that are alike; ids are filled up to a multiple of `STOPS`, so that shapes are few."""
    ids = np.full(STOPS * max(1, -(-len(stop) // STOPS)), -1, np.int32)
    ids[: len(stop)] = stop
    return Ends(jnp.asarray(np.tile(ids, (batch, 1))), jnp.full(batch, limit, jnp.int32))


def first_token(
    logits: Float[Array, "B V"],
    cache: Cache,
    length: Int[Array, " B"],
    chooser: sampling.Chooser,
    ends: Ends,
    seen: Bool[Array, "B V"],
) -> DecodeState:
    """The loop's state after prefill, with the first token chosen; `NOT_FINITE` as in `decode_loop`."""
    # The cache stays outside: what goes through jit without donation is copied.
    return _first_token(logits, length, chooser, ends, seen)._replace(cache=cache)


@jax.jit
def _first_token(logits, length, chooser, ends, seen):
    none = jnp.zeros(length.shape, jnp.int32)
    state = DecodeState((), none, length - 1, none > 0, none, seen.astype(jnp.int32))
    state, told = _choose(logits, state, chooser, ends)
    return state._replace(token=told)


def _choose(
    logits: Float[Array, "B V"], state: DecodeState, chooser: sampling.Chooser, ends: Ends
) -> tuple[DecodeState, Int[Array, " B"]]:
    """The state with a token chosen for each sequence that goes on; and that token, `ENDED` or `NOT_FINITE`."""
    token = sampling.choose(logits, chooser, state.step, state.seen)
    finite = jnp.isfinite(logits).all(axis=-1)
    told = jnp.where(state.done, ENDED, jnp.where(finite, token, NOT_FINITE))
    step, pos = (x + jnp.where(state.done, 0, 1) for x in (state.step, state.pos))
    reached = (token[:, None] == ends.stop).any(axis=-1) | (step >= ends.limit)
    here = jnp.arange(token.shape[0]), token
    return DecodeState(
        cache=state.cache,
        token=jnp.where(state.done, state.token, token),
        pos=pos,
        done=state.done | ~finite | reached,
        step=step,
        seen=state.seen.at[here].set(jnp.maximum(state.seen[here], 1) + 1),
    ), told


def _parts_of_state(state: DecodeState) -> DecodeState:
    return DecodeState(sharding.cache(state.cache), *[SEQUENCES] * 5)  # pyright: ignore[reportArgumentType]


class Ranked(NamedTuple):
    """Natural logarithms of the probabilities that the model gives to tokens, before anything is done to choose one."""

    chosen: Float[Array, "*B"]  # of the token that was chosen
    ids: Int[Array, "*B k"]  # the most likely tokens, from the first on
    top: Float[Array, "*B k"]  # theirs


@functools.partial(jax.jit, static_argnames="top")
def ranked(logits: Float[Array, "B V"], token: Int[Array, " B"], top: int) -> Ranked:
    """What is said of a chosen token and of the `top` most likely ones."""
    found = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    best, ids = jax.lax.top_k(found, top)
    return Ranked(jnp.take_along_axis(found, token[:, None], axis=-1)[:, 0], ids, best)


@mesh.program(
    (mesh.weights, _parts_of_state, SEQUENCES, SEQUENCES, sharding.cache, EVERYWHERE),
    lambda model, state, *_: (state, EVERYWHERE, EVERYWHERE),
    static=("recipe", "chunk", "top"),
    donate=(1,),
)
def decode_loop(
    model: Decoder,
    state: DecodeState,
    chooser: sampling.Chooser,
    ends: Ends,
    shared: Cache = (),
    pause: Bool[Array, " V"] | tuple[()] = (),
    *,
    recipe: Recipe,
    chunk: int,
    top: int | None = None,
) -> tuple[DecodeState, Int[Array, "B chunk"], Ranked | tuple[()]]:
    """Generate up to `chunk` tokens per sequence, fewer when all have ended.

    Args:
      model: the decoder.
      state: from `first_token` or an earlier call; consumed.
      chooser: sampling parameters.
      ends: what ends a sequence.
      shared: as in `decode_step`; it stays as it is.
      pause: tokens that the host wants to look at: where a sequence has chosen one, the loop returns early.
      recipe: static.
      chunk: size of the result, static.
      top: say of each token what `ranked` does, with so many of the most likely ones; None = do not. Static.

    Returns:
      The new state and the chosen tokens, `ENDED` where a sequence had ended, `NOT_FINITE` where it ends because its
      logits are not numbers to choose by; and what is said of them, `[B chunk ...]`.
    """
    rank = lambda logits, token: () if top is None else ranked(logits, token, top)
    return loop(model, state, chooser, ends, shared, pause, recipe, chunk, rank)


def loop(
    model: Decoder,
    state: DecodeState,
    chooser: sampling.Chooser,
    ends: Ends,
    shared: Cache,
    pause: Array | tuple[()],
    recipe: Recipe,
    chunk: int,
    rank: Callable[[Array, Array], PyTree],
) -> tuple[DecodeState, Array, PyTree]:
    """`decode_loop`, inside of a program; and what `rank` makes of logits and chosen tokens, `[B chunk ...]`."""
    batch = state.token.shape[0]
    on_any_device = lambda found: add(jnp.sum(found, dtype=jnp.int32), DATA) > 0

    def goes_on(state: DecodeState) -> Array:
        paused = False if isinstance(pause, tuple) else on_any_device(pause[state.token] & ~state.done)
        return on_any_device(~state.done) & ~jnp.asarray(paused)

    def body(carry: tuple[DecodeState, Array, PyTree, Array, Array]) -> tuple[DecodeState, Array, PyTree, Array, Array]:
        state, out, ranks, i, _ = carry
        x, cache = _read_token(model, recipe, state.cache, state.token, state.pos, ~state.done, shared)
        logits = model.logits(x)
        state, told = _choose(logits, state._replace(cache=cache), chooser, ends)
        ranks = jax.tree.map(lambda all_, one: all_.at[:, i].set(one), ranks, rank(logits, told))
        return state, out.at[:, i].set(told), ranks, i + 1, goes_on(state)

    def more(carry: tuple[DecodeState, Array, PyTree, Array, Array]) -> Array:
        _, _, _, i, going = carry
        return (i < chunk) & going

    out = jnp.full((batch, chunk), ENDED, jnp.int32)
    logits = jax.ShapeDtypeStruct((batch, model.spec.vocab_size), model.dtype)
    ranks = jax.tree.map(
        lambda x: jnp.zeros((batch, chunk, *x.shape[1:]), x.dtype), jax.eval_shape(rank, logits, state.token)
    )
    carry = (state, out, ranks, jnp.zeros((), jnp.int32), on_any_device(~state.done))
    state, out, ranks, *_ = jax.lax.while_loop(more, body, carry)
    return state, gather(out, 0, DATA), jax.tree.map(lambda x: gather(x, 0, DATA), ranks)
