"""Prefill, one decode step, the decode loop: the library's compiled programs, and what they use up.

They are written for one device and run on as many as the weights lie on; see `kvjax.mesh`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from kvjax import attention, mesh, sampling
from kvjax.cache import pages
from kvjax.cache import tier as tiers_
from kvjax.cache.budget import LARGEST
from kvjax.cache.policy import Found, Layers, Recipe, Tiers
from kvjax.cache.tier import Tier
from kvjax.collectives import DATA, add, gather, own
from kvjax.errors import InputError
from kvjax.mesh import EVERYWHERE, LAYERS, ROWS, SEQUENCES, STEPS
from kvjax.models import gate as gates
from kvjax.models import rope
from kvjax.models.decoder import Decoder, Layer
from kvjax.spec import Gate, Lengths, ModelSpec, Prompt, PyTree, RopeSpec, Token
from pallas_kernels.rotation import Rotation

CHUNK = 8192  # tokens that the feed-forward network reads at once
Cache = tuple[Tiers, ...]  # one per group of layers with equal cached widths
Measure = Callable[[Decoder, Float[Array, "B D"], PyTree], PyTree]


@functools.lru_cache(maxsize=256)
def layer_groups(spec: ModelSpec) -> tuple[Layers, ...]:
    """Layers by the widths of their cached vectors; each group has a page pool of its own."""
    groups: dict[tuple[int, int], list[int]] = {}
    for layer in range(spec.num_layers):
        groups.setdefault(spec.widths(layer), []).append(layer)
    return tuple(Layers(tuple(index), widths) for widths, index in groups.items())


def _place(groups: Sequence[Layers], layer: int) -> tuple[int, int]:
    """Group of a layer, and its index there."""
    return next((g, group.index.index(layer)) for g, group in enumerate(groups) if layer in group.index)


def init_cache(model: Decoder, recipe: Recipe, lengths: Lengths) -> Cache:
    """Allocate an empty cache for a batch of prompts.

    Args:
      model: the decoder.
      recipe: the method.
      lengths: tokens of each prompt, and how many may be generated.
    """
    if rotates_at_read(model.spec, recipe) and any(store.balanced for store in recipe.stores):
        raise InputError(
            f"{recipe.name}: balanced keys are undone in the query, so they must be rotated when they are written"
            + (", which latents are not: set balance=false" if model.spec.latent else "")
        )
    if recipe.policy.revise is not None and model.spec.latent is not None:
        raise InputError(f"{recipe.name}: low-rank keys cannot be merged or evicted by a gate of each head")
    if len(layer_groups(model.spec)) > 1 and recipe.budget is not None and recipe.budget.whole:
        raise InputError(f"{recipe.name}: full layers need others of equal ranks: convert with rule=uniform")
    devices, init = mesh.of(model), functools.partial(_init, model.spec, recipe)
    if devices is None:
        return init(lengths, model.dtype)
    lengths = lengths._replace(parts=devices.shape[DATA])
    if len(lengths.prompt) % lengths.parts:
        raise InputError(f"{len(lengths.prompt)} sequences cannot be split over data={lengths.parts} devices")
    with mesh.on(devices):
        return _init_parts(model.spec, recipe, lengths, model.dtype)


def _init(spec: ModelSpec, recipe: Recipe, lengths: Lengths, dtype: DTypeLike) -> Cache:
    return tuple(recipe.policy.init(spec, group, lengths, dtype) for group in layer_groups(spec))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _init_parts(spec: ModelSpec, recipe: Recipe, lengths: Lengths, dtype: DTypeLike) -> Cache:
    """Every device's own pool, and its rows."""

    def init() -> Cache:
        mine = lambda tree: jax.tree.map(lambda x: own(x, 1, DATA), tree)
        rows = lambda t: {name: mine(getattr(t, name)) for name in ("table", "length", "budget", "calib")}
        cache = _init(mesh.share(spec), recipe, lengths, dtype)
        return tuple(tuple(tier._replace(**rows(tier)) for tier in tiers) for tiers in cache)

    specs = mesh.cache(jax.eval_shape(functools.partial(_init, spec, recipe, lengths, dtype)))
    devices = jax.sharding.get_abstract_mesh()
    return jax.shard_map(init, mesh=devices, in_specs=(), out_specs=specs, check_vma=False)()


def rotates_at_read(spec: ModelSpec, recipe: Recipe) -> bool:
    """Whether keys are cached before rotation."""
    return recipe.rotate == "read" or spec.latent is not None


def check_turn(spec: ModelSpec, recipe: Recipe, prompt: int, reach: int) -> None:
    """Raise `InputError` where keys would be cached under frequencies that their sequence outgrows.

    Args:
      spec, recipe: the model and the method.
      prompt: tokens of a prompt.
      reach: tokens that are read of the sequence in the end.
    """
    turn = spec.rope.original_max_position
    if spec.rope.type == "longrope" and prompt <= turn < reach and not rotates_at_read(spec, recipe):
        raise InputError(
            f"the model has other rotary frequencies beyond {turn} tokens, which cached keys of a prompt of {prompt} "
            f"cannot follow: end at {turn} tokens, not {reach}, or begin with a longer prompt"
        )


def padded_length(longest: int) -> int:
    """Tokens that a prompt is padded to: 8 rungs per power of two, so that a new length rarely recompiles."""
    return pages.ladder(longest, steps=8, smallest=64)


def prefill(
    model: Decoder,
    recipe: Recipe,
    tokens: Int[Array, "B T"],
    length: Int[Array, " B"],
    cache: Cache,
    chunk: int = CHUNK,
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
      chunk: tokens that the feed-forward network reads at once, at most: fewer need less memory.

    Returns:
      Logits after each prompt's last token, in float32, and the filled cache.

    >>> import jax.numpy as jnp, kvjax
    >>> model, recipe = kvjax.load().decoder, kvjax.methods.h2o(budget=8)
    >>> prompt = jnp.zeros((1, kvjax.padded_length(20)), jnp.int32)  # 20 tokens and padding
    >>> cache = kvjax.init_cache(model, recipe, kvjax.Lengths(prompt=(20,), new=4, padded=prompt.shape[1]))
    >>> logits, cache = kvjax.prefill(model, recipe, prompt, jnp.asarray([20], jnp.int32), cache)
    >>> logits.shape, cache[0][0].length.tolist()
    ((1, 4096), [[[8, 8]], [[8, 8]], [[8, 8]], [[8, 8]], [[8, 8]], [[8, 8]]])
    """
    spec, groups = model.spec, layer_groups(model.spec)
    x = _embed(model, tokens)
    filled, allocation = list(cache), _Allocation(spec, recipe, groups, length)
    for index, layer in enumerate(model.layers):
        group, place = _place(groups, index)
        x, filled[group], found = _prefill_layer(
            layer,
            x,
            filled[group],
            length,
            jnp.asarray(index, jnp.int32),
            jnp.asarray(place, jnp.int32),
            spec=spec,
            recipe=recipe,
            window=spec.window(index),
            rotary=spec.rotary(index),
            chunk=chunk,
        )
        filled = allocation.after(filled, found)
    if recipe.policy.fit is not None:
        filled = [_fit(tiers, length, recipe) for tiers in filled]
    return _last_logits(model, x, length), tuple(filled)


class _Allocation:
    """Distributes slots over layers while the layers of a prompt are run; over layers that share a pool of pages."""

    def __init__(self, spec: ModelSpec, recipe: Recipe, groups: Sequence[Layers], length: Array):
        self._layers, self._recipe, self._groups, self._length = spec.num_layers, recipe, groups, length
        self._infos: dict[int, PyTree] = {}
        self._waiting: dict[int, PyTree] = {}
        self._held = jnp.full((spec.num_layers, length.shape[0], spec.num_rows), LARGEST, jnp.int32)

    def after(self, cache: list[Tiers], found: Found) -> list[Tiers]:
        """The cache after one more layer: with the slots redistributed, when the budget wants that now."""
        budget, done = self._recipe.budget, len(self._infos) + 1
        if budget is None or budget.allocate is None:
            return cache
        self._infos[done - 1] = found.info
        self._waiting[done - 1] = found.waiting
        if done < self._layers and (budget.every is None or done % budget.every):
            return cache
        unseen = jax.tree.map(jnp.zeros_like, found.info)  # with it, all updates are one program
        for g, group in enumerate(self._groups):
            if not self._waiting.keys().isdisjoint(group.index):
                infos = [self._infos.get(layer, unseen) for layer in group.index]
                seen = jnp.asarray(sum(layer < done for layer in group.index), jnp.int32)
                index = jnp.asarray(group.index, jnp.int32)
                slots = _run_allocate(infos, seen, self._length, self._held[index], recipe=self._recipe)
                self._held = self._held.at[index].set(slots)
                cache[g] = _trim(cache[g], slots)
        if self._recipe.policy.settle is not None:
            for index, waiting in self._waiting.items():
                group, place = _place(self._groups, index)
                where = jnp.asarray(place, jnp.int32)
                cache[group] = _settle(cache[group], waiting, where, self._held[index], recipe=self._recipe)
        self._waiting.clear()
        return cache


@functools.partial(jax.jit, static_argnames=("recipe",))
def _run_allocate(
    infos: list[PyTree], seen: Int[Array, ""], length: Int[Array, " B"], held: Int[Array, "L B K"], *, recipe: Recipe
) -> Int[Array, "L B K"]:
    assert recipe.budget is not None and recipe.budget.allocate is not None
    return recipe.budget.allocate(infos, seen, length, held)


@mesh.program((mesh.cache, LAYERS), lambda tiers, slots: tiers, donate=(0,))
def _trim(tiers: Tiers, slots: Int[Array, "l B K"]) -> Tiers:
    """Trim the first tier's rows to their slots; other tiers hold what the first one gave up."""
    tier, *rest = tiers
    budget = jnp.where(slots < LARGEST, slots, tier.budget)
    return (tiers_.trim(tier._replace(budget=budget), slots), *rest)


@mesh.program((mesh.cache, ROWS, EVERYWHERE, ROWS), lambda tiers, *_: tiers, static=("recipe",), donate=(0,))
def _settle(tiers: Tiers, waiting: PyTree, place: Int[Array, ""], slots: Int[Array, "B K"], *, recipe: Recipe) -> Tiers:
    """Fill a layer's rows with what has waited for their slots."""
    assert recipe.policy.settle is not None
    olds = tuple(tiers_.layer(t, place) for t in tiers)
    views = recipe.policy.settle(olds, waiting, slots, recipe.kernels)
    return tuple(tiers_.with_layer(t, place, old, new) for t, old, new in zip(tiers, olds, views, strict=True))


def _fit(tiers: Tiers, length: Int[Array, " B"], recipe: Recipe) -> Tiers:
    """Leave pools the pages that they will need."""
    assert recipe.policy.fit is not None
    tiers, sizes = recipe.policy.fit(tiers, length)
    return tuple(
        _resize(t, size=n) if n * t.num_free.shape[0] < t.free.shape[0] else t
        for t, n in zip(tiers, sizes, strict=True)
    )


_resize = mesh.program((mesh.cache,), lambda tier: tier, static=("size",))(tiers_.resize)


@mesh.program((mesh.weights, SEQUENCES), lambda *_: SEQUENCES)
def _embed(model: Decoder, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    return model.embed(tokens)


@mesh.program((mesh.weights, SEQUENCES, SEQUENCES), lambda *_: SEQUENCES)
def _last_logits(model: Decoder, x: Float[Array, "B T D"], length: Int[Array, " B"]) -> Float[Array, "B V"]:
    return model.logits(jnp.take_along_axis(x, (length - 1)[:, None, None], axis=1)[:, 0])


@mesh.program(
    (mesh.weights, SEQUENCES, mesh.cache, SEQUENCES, EVERYWHERE, EVERYWHERE),
    lambda layer, x, tiers, *_: (SEQUENCES, tiers, ROWS),
    static=("spec", "recipe", "window", "rotary", "chunk"),
    donate=(1, 2),
)
def _prefill_layer(
    layer: Layer,
    x: Float[Array, "B T D"],
    tiers: Tiers,
    length: Int[Array, " B"],
    index: Int[Array, ""],
    place: Int[Array, ""],
    *,
    spec: ModelSpec,
    recipe: Recipe,
    window: int | None,
    rotary: RopeSpec,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "B T D"], Tiers, Found]:
    """One layer over the whole prompt: exact attention, then compression into the layer's rows."""
    q, key, value, gate = layer.project(x)
    k, v = layer.keys(key), layer.values(value)
    olds = tuple(tiers_.layer(t, place) for t in tiers)
    until, revised = None, ()
    if recipe.policy.revise is not None and isinstance(gate, Gate):
        k, v, until, revised = recipe.policy.revise(olds, k, v, gate, length, recipe.kernels)
        key, value = k, v
    pos = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    cos, sin = rope.angles(rotary, spec.head_dim, pos, length)  # B T H/2
    q, k = (rope.rotate(y, cos[:, :, None], sin[:, :, None]) for y in (q, k))
    q = gates.silence(spec.gate, q, spec.num_kv_heads)
    options = {"scale": spec.scale, "cap": spec.score_cap, "window": window, "until": until, "kernels": recipe.kernels}
    heads, lse = attention.prefill_attention(q, k, v, length, **options)
    key = key if rotates_at_read(spec, recipe) else k
    prompt = Prompt(
        *(q, k, v, key, value, lse, length, index, spec.num_layers, window, spec.scale, spec.score_cap),
        kernels=recipe.kernels,
        gate=gate,
        revised=revised,
    )
    views, found = recipe.policy.prefill(olds, prompt)
    tiers = tuple(tiers_.with_layer(t, place, old, new) for t, old, new in zip(tiers, olds, views, strict=True))
    return layer.finish(x, heads, chunk), tiers, found


def _decode_layer(
    layer: Layer,
    recipe: Recipe,
    spec: ModelSpec,
    index: int,
    x: Float[Array, "B D"],
    tiers: Tiers,
    pos: Array,
    active: Array,
) -> tuple[Float[Array, "B D"], Tiers]:
    """One layer for one token: insert, attend, observe."""
    policy, heads, rotary = recipe.policy, spec.num_kv_heads // spec.num_rows, spec.rotary(index)
    q, key, value, gate = layer.project(x)  # B N H, B K R
    q, k = q.reshape(*key.shape[:2], -1, spec.head_dim), layer.keys(key)
    here = pos[:, None, None]
    at_read = rotates_at_read(spec, recipe)
    own = Rotation(rope.frequencies(rotary, spec.head_dim, pos[:, None] + 1), rotary.attention_factor)
    turn = tuple(angle[:, :, 0] for angle in own.angles(here))  # B 1 H/2
    if not at_read:
        key = rope.rotate(k, *turn)
    token = Token(q, k, key, value, pos, active, index, gate, turn)
    tiers = policy.insert(tiers, token)
    length = functools.reduce(jnp.add, (tier.length for tier in tiers))

    place = lambda at: at if recipe.positions is None else recipe.positions(at, pos, length)
    query_place = place(jnp.broadcast_to(here, (*key.shape[:2], 1)))
    rotation = (
        own
        if recipe.positions is None
        else _in_cache(spec.head_dim, rotary, sum(tier.capacity for tier in tiers), length)
    )
    query = gates.silence(spec.gate, rope.rotate(q, *rotation.angles(query_place)), 1)
    window = spec.window(index)
    mean, probs = attention.decode(
        attention.spread(query, heads),
        tiers,
        recipe.stores,
        attention.Read(
            scale=spec.scale,
            cap=spec.score_cap,
            after=None if window is None else jnp.broadcast_to(query_place[..., 0] - window, key.shape[:2]),
            place=None if recipe.positions is None else place,
            expand=layer.expand(rotation) if at_read else None,
            select=None if recipe.select is None else functools.partial(recipe.select, pos=pos),
            kernels=recipe.kernels,
        ),
        with_probabilities=policy.observe is not None,
    )
    if policy.observe is not None:
        tiers = policy.observe(tiers, token, probs)
    out = layer.heads(mean.astype(x.dtype))
    return layer.finish(x, out.reshape(x.shape[0], spec.num_heads, spec.head_dim)), tiers


def _in_cache(head_dim: int, rotary: RopeSpec, capacity: int, length: Int[Array, "B K"]) -> Rotation:
    """How queries and keys turn at places in the cache.

    They are below its capacity: a table, which equal layers and all steps share, saves a sine and a cosine per number.
    """
    of = functools.partial(rope.frequencies, rotary, head_dim)
    if rotary.follows_length:  # as long as the cache is
        return Rotation(of(length), rotary.attention_factor)
    size = jnp.asarray(capacity)
    table = rope.angles(rotary, head_dim, jnp.arange(capacity), size)
    return Rotation(of(size)[None, None], rotary.attention_factor, table)


@mesh.program((mesh.cache, EVERYWHERE), lambda *_: ROWS)
def positions(tier: Tier, place: Int[Array, ""] | int) -> Int[Array, "B K S"]:
    """Position of every slot of one of the tier's layers, -1 where it is empty."""
    return tiers_.positions(tiers_.layer(tier, place))


def decode_step(
    model: Decoder,
    recipe: Recipe,
    cache: Cache,
    token: Int[Array, " B"],
    pos: Int[Array, " B"],
    active: Bool[Array, " B"] | None = None,
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

    The cache has room for the `lengths.new` tokens that `init_cache` was told of; methods that append drop what comes
    after them.

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
        return _step(model, cache, token, pos, active, recipe=recipe)


@mesh.spread((mesh.weights, mesh.cache, SEQUENCES, SEQUENCES, SEQUENCES), lambda model, cache, *_: (SEQUENCES, cache))
def _step(
    model: Decoder, cache: Cache, token: Int[Array, " B"], pos: Int[Array, " B"], active: Array, *, recipe: Recipe
) -> tuple[Float[Array, "B V"], Cache]:
    x, cache = _read_token(model, recipe, cache, token, pos, active)
    return model.logits(x), cache


def _read_token(
    model: Decoder, recipe: Recipe, cache: Cache, token: Int[Array, " B"], pos: Int[Array, " B"], active: Array
) -> tuple[Float[Array, "B D"], Cache]:
    """The last layer's output for one more token of each sequence, and the cache with that token in it."""
    spec, groups = model.spec, layer_groups(model.spec)
    x = model.embed(token)
    filled = [recipe.policy.reserve(tiers, active) for tiers in cache]
    for index, layer in enumerate(model.layers):
        group, place = _place(groups, index)
        olds = tuple(tiers_.layer(t, place) for t in filled[group])
        x, views = _decode_layer(layer, recipe, spec, index, x, olds, pos, active)
        filled[group] = tuple(
            tiers_.with_layer(t, place, old, new) for t, old, new in zip(filled[group], olds, views, strict=True)
        )
    return x, tuple(filled)


@mesh.program(
    (mesh.weights, mesh.cache, *(SEQUENCES,) * 4, STEPS),
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
      recipe, measure: static; `(model, last layer's output [B D], entry of given) -> arrays` is collected every step.

    Returns:
      Logits after each sequence's last token, the cache, and what was measured, `[Q ...]`.
    """

    def step(carry: tuple[Cache, Array], inputs: tuple[Array, Array, PyTree]) -> tuple[tuple[Cache, Array], PyTree]:
        (cache, last), (i, token, entry) = carry, inputs
        x, cache = _read_token(model, recipe, cache, token, length + i, i < count)
        measured = () if measure is None else measure(model, x, entry)
        return (cache, jnp.where((i == count - 1)[:, None], x, last)), measured

    last = jnp.zeros((tokens.shape[0], model.spec.embed_dim), model.dtype)
    steps = (jnp.arange(tokens.shape[1]), tokens.T, given)
    (cache, last), measured = jax.lax.scan(step, (cache, last), steps)
    return jnp.where((count > 0)[:, None], model.logits(last), logits), cache, measured


class State(NamedTuple):
    """What the decode loop carries."""

    cache: Cache
    token: Int[Array, " B"]  # chosen and not yet read
    pos: Int[Array, " B"]  # its position
    done: Bool[Array, " B"]  # the sequence has produced a stop token
    step: Int[Array, ""]  # tokens chosen so far
    seen: Bool[Array, "B V"] | None  # for the repetition penalty


def first_token(
    logits: Float[Array, "B V"],
    cache: Cache,
    length: Int[Array, " B"],
    chooser: sampling.Chooser,
    stop: Int[Array, " E"],
    seen: Bool[Array, "B V"] | None,
    *,
    mode: sampling.Mode,
) -> State:
    """The loop's state after prefill, with the first token chosen."""
    # The cache stays outside: what goes through jit without donation is copied.
    return State(cache, *_first_token(logits, length, chooser, stop, seen, mode=mode))


@functools.partial(jax.jit, static_argnames=("mode",))
def _first_token(logits, length, chooser, stop, seen, *, mode):
    step = jnp.zeros((), jnp.int32)
    token = sampling.choose(logits, chooser, step, mode=mode, seen=seen)
    return token, length, jnp.isin(token, stop), step + 1, _mark(seen, token)


def _parts_of_state(state: State) -> State:
    each = dict.fromkeys(("token", "pos", "done", "seen"), SEQUENCES)
    return State(cache=mesh.cache(state.cache), step=EVERYWHERE, **each)  # pyright: ignore[reportArgumentType]


def _parts_of_chooser(chooser: sampling.Chooser) -> sampling.Chooser:
    each = dict.fromkeys(chooser._fields, EVERYWHERE)
    return sampling.Chooser(**(each | {"key": SEQUENCES}))  # pyright: ignore[reportArgumentType]


@mesh.program(
    (mesh.weights, _parts_of_state, _parts_of_chooser, EVERYWHERE, EVERYWHERE),
    lambda model, state, *_: (state, EVERYWHERE),
    static=("recipe", "mode", "chunk"),
    donate=(1,),
)
def decode_loop(
    model: Decoder,
    state: State,
    chooser: sampling.Chooser,
    stop: Int[Array, " E"],
    limit: Int[Array, ""],
    *,
    recipe: Recipe,
    mode: sampling.Mode,
    chunk: int,
) -> tuple[State, Int[Array, "B chunk"]]:
    """Generate up to `chunk` tokens per sequence, fewer when `limit` tokens are chosen or all sequences have stopped.

    Args:
      model: the decoder.
      state: from `first_token` or an earlier call; consumed.
      chooser: sampling parameters.
      stop: ids that end a sequence.
      limit: stop when this many tokens have been chosen in all.
      recipe, mode: static.
      chunk: size of the result, static.

    Returns:
      The new state and the chosen tokens, -1 where a sequence had stopped.
    """

    running = lambda state: add(jnp.sum(~state.done, dtype=jnp.int32), DATA) > 0  # on any device

    def body(carry: tuple[State, Array, Array, Array]) -> tuple[State, Array, Array, Array]:
        state, out, i, _ = carry
        logits, cache = decode_step(model, recipe, state.cache, state.token, state.pos, ~state.done)
        token = sampling.choose(logits, chooser, state.step, mode=mode, seen=state.seen)
        out = out.at[:, i].set(jnp.where(state.done, -1, token))
        done = state.done | jnp.isin(token, stop)
        pos = state.pos + jnp.where(state.done, 0, 1)
        token = jnp.where(state.done, state.token, token)
        state = State(cache, token, pos, done, state.step + 1, _mark(state.seen, token))
        return state, out, i + 1, running(state)

    def more(carry: tuple[State, Array, Array, Array]) -> Array:
        state, _, i, running = carry
        return (i < chunk) & (state.step < limit) & running

    out = jnp.full((state.token.shape[0], chunk), -1, jnp.int32)
    state, out, *_ = jax.lax.while_loop(more, body, (state, out, jnp.zeros((), jnp.int32), running(state)))
    return state, gather(out, 0, DATA)


def _mark(seen: Bool[Array, "B V"] | None, token: Int[Array, " B"]) -> Bool[Array, "B V"] | None:
    return None if seen is None else seen.at[jnp.arange(token.shape[0]), token].set(True)
