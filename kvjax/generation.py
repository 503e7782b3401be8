"""Text in, text out: the library's main function and what it reports."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from kvjax import checkpoint, decode, demo, kernels, layout, prefilling, sampling
from kvjax import mesh as meshes
from kvjax.cache import learned, pages
from kvjax.cache import tier as tiers_
from kvjax.cache.budget import LARGEST
from kvjax.cache.policy import Recipe
from kvjax.cache.tier import Bytes
from kvjax.collectives import COPIES, DATA
from kvjax.errors import InputError
from kvjax.layout import Cache
from kvjax.mesh import EVERYWHERE, SEQUENCES
from kvjax.methods import make, of
from kvjax.models.decoder import Decoder
from kvjax.models.hf_config import Stop, read_generation_config
from kvjax.sampling import Sampling
from kvjax.spec import Lengths, ModelSpec, PyTree
from kvjax.stopwatch import Stopwatch
from kvjax.tokenizer import Tokenizer

Texts = Sequence[str] | Sequence[Sequence[int]]  # or token ids

HALF = 2  # bytes of a number that shares of the full cache count with, whatever a run computes in
CHUNK = 16  # tokens per call of the compiled loop: text appears in pieces of this many tokens


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded checkpoint: weights, tokenizer (None where there is none), ids that end a text, and who names them."""

    decoder: Decoder
    tokenizer: Tokenizer | None
    stop: tuple[int, ...]
    name: str
    stop_source: str = ""

    @property
    def spec(self) -> ModelSpec:
        """Shape and mathematics of the decoder."""
        return self.decoder.spec

    @property
    def mesh(self) -> jax.sharding.Mesh | None:
        """The devices that the weights are split over; None = one device."""
        return meshes.of(self.decoder)


class Continuation(NamedTuple):
    """One generated sequence."""

    prompt_tokens: int  # with the question
    tokens: list[int]  # generated, with the stop token if one was generated
    text: str | None  # None without a tokenizer
    finish_reason: str  # "stop" or "length"


class Timing(NamedTuple):
    """Wall-clock time [seconds], compilation apart."""

    prefill_s: float  # until the first generated token: prompts and questions
    decode_s: float
    decode_tokens_per_s: float
    compile_s: float


class Compared(NamedTuple):
    """A cache beside the full one [bytes]: numbers that no store encodes count two bytes in both.

    That is what they take in bfloat16, in which checkpoints come and accelerators compute. A run in float32 allocates
    twice that, and would flatter every store: of 32 bits four are an eighth, of 16 a quarter.
    """

    cache: int
    full: int  # for the same tokens

    @property
    def share(self) -> float:
        """What the cache takes of the full one."""
        return self.cache / self.full


class Generation(NamedTuple):
    """What `generate` returns."""

    sequences: list[Continuation]
    bytes: Bytes  # allocated for the cache, on all devices together
    full_bytes: int  # that a full cache needs for the same prompts and new tokens, in the model's dtype
    compared: Compared
    slots: list[list[int | float]]  # kept slots per layer, per sequence, averaged over heads
    full_slots: list[list[int]]  # the same of a full cache that has read as many tokens
    timing: Timing
    logits: np.ndarray  # [B V] after each prompt's last token
    cache: Cache
    recipe: Recipe
    forced: int = 0  # slots that a learned gate asked for in vain, over all rows; 0 for other methods

    @property
    def device_bytes(self) -> int:
        """Allocated for the cache on each device."""
        return self.bytes.total // meshes.count(self.cache)


def load(
    name: str | Path | None = None,
    *,
    dtype: DTypeLike | None = None,
    ignore_config: Sequence[str] = (),
    mesh: str | None = None,
) -> Model:
    """Load a checkpoint.

    Args:
      name: a Hugging Face directory, an Orbax directory made by `kvjax.convert`, a hub id, or a shipped checkpoint:
        `demo` (None as well) or `demo-dmc`.
      dtype: of weights, activations and cache; None = float32 on CPU, bfloat16 elsewhere.
      ignore_config: config fields that may be ignored although kvjax does not know them.
      mesh: "data=2,model=4" takes 2 times 4 devices: sequences are split over 2, weights and key/value heads over 4.
        What is computed with the model runs on them. None = one device.

    >>> import kvjax
    >>> model = kvjax.load()
    >>> model.spec.num_kv_heads
    2
    """
    return load_from(name, dtype=dtype, ignore_config=ignore_config, mesh=mesh)[0]


def load_from(
    name: str | Path | None,
    *,
    dtype: DTypeLike | None = None,
    ignore_config: Sequence[str] = (),
    mesh: str | None = None,
) -> tuple[Model, Path]:
    """Like `load`, and the directory that the checkpoint's files are in."""
    size = None if mesh is None else meshes.parse(mesh)
    decoder, directory = checkpoint.load_model(str(demo.find(name)), dtype, ignore_config, size)
    label = "demo" if name is None else str(name)
    tokenizer = Tokenizer.load(directory)
    stop = find_stop(directory, decoder.spec.vocab_size, tokenizer)
    return Model(decoder, tokenizer, stop.ids, label, stop.source), directory


def find_stop(directory: Path, vocab_size: int, tokenizer: Tokenizer | None) -> Stop:
    """The ids that end a text: of generation_config.json, else of config.json, else of tokenizer_config.json."""
    stop = read_generation_config(directory, vocab_size)
    end = None if tokenizer is None else tokenizer.end
    if stop.ids or end is None:
        return stop
    if end >= vocab_size:
        raise InputError(
            f"{directory / 'tokenizer_config.json'}: eos_token has the id {end}, which is not in the vocabulary of the "
            f"model (0 to {vocab_size - 1}), and no other file names the end of a text: set eos_token_id in config.json"
        )
    return Stop((end,), "tokenizer_config.json")


def generate(
    model: Model,
    prompts: Texts,
    recipe: Recipe | None = None,
    *,
    questions: Texts | None = None,
    max_new_tokens: int = 64,
    how: Sampling | None = None,
    on_token: Callable[[int, int], None] | None = None,
    prefill_chunk: int = prefilling.CHUNK,
) -> Generation:
    """Generate a continuation of each prompt with a compressed cache.

    Args:
      model: from `load`.
      prompts: texts, or token ids.
      recipe: from a factory in `kvjax.methods`; None = the full cache, or what a retrofitted model was made for.
      questions: what follows each prompt, texts or token ids, "" = nothing; read token by token after the prompt has
        been compressed, so that the method cannot know what will be asked.
      max_new_tokens: most tokens to generate for each prompt.
      how: how tokens are chosen; None = greedy.
      on_token: called as `(sequence, token)` as tokens appear.
      prefill_chunk: tokens of a device's prompts that a layer reads at once, but for attention; fewer need less memory.

    >>> import kvjax
    >>> model = kvjax.load()
    >>> out = kvjax.generate(model, [[1, 2, 3]], kvjax.methods.h2o(budget=16), max_new_tokens=4)
    >>> len(out.sequences[0].tokens) <= 4
    True
    """
    recipe, how = recipe or make(of(model.spec)), how or Sampling()
    if isinstance(prompts, str):
        raise InputError("prompts is one text: give a list of prompts")
    ids = [tokens(model, prompt) for prompt in prompts]
    after = [[] for _ in ids] if questions is None else [continued(model, question) for question in questions]
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or not 1 <= max_new_tokens <= LARGEST:
        raise InputError(f"max-new-tokens {max_new_tokens} is not a whole number from 1 to {LARGEST}")
    check(model.spec, ids, after)
    for prompt, question in zip(ids, after, strict=True):
        _check_new(model.spec, recipe, len(prompt), len(question), max_new_tokens)
        layout.check_turn(model.spec, recipe, len(prompt), len(prompt) + len(question) + max_new_tokens - 1)
    how.check()
    kernels.check(recipe.kernels)
    count, (ids, after) = len(ids), even(model, ids, after)
    whole = [prompt + question for prompt, question in zip(ids, after, strict=True)]
    with Stopwatch() as watch:
        logits, cache = prefill(model, recipe, ids, max_new_tokens + max(map(len, after)), prefill_chunk)
        answer, cache, _ = feed(model, recipe, logits, cache, ids, after)
        jax.block_until_ready((answer, cache))
        prefill_s = watch.lap()
        cache, chosen = _decode(model, recipe, whole, count, max_new_tokens, answer, cache, how, on_token)
        decode_s = watch.lap()
    whole = whole[:count]
    lengths = [len(prompt) + max_new_tokens for prompt in whole]
    decoded = sum(len(new) - 1 for new in chosen)  # the first token comes from prefill
    return Generation(
        sequences=[_sequence(model, prompt, new) for prompt, new in zip(whole, chosen, strict=True)],
        bytes=cache_bytes(cache),
        full_bytes=full_bytes(model, lengths),
        compared=compare(model, cache, lengths),
        slots=kept_slots(model.spec, recipe, cache)[:count],
        full_slots=[full_slots(model.spec, len(p) + len(new) - 1) for p, new in zip(whole, chosen, strict=True)],
        timing=Timing(prefill_s, decode_s, decoded / decode_s if decoded else 0.0, watch.compile_s),
        logits=meshes.read(answer)[:count],
        cache=cache,
        recipe=recipe,
        forced=learned.forced(cache),
    )


def tokens(model: Model, prompt: str | Sequence[int]) -> list[int]:
    """Token ids of a prompt, with what the tokenizer puts around a text."""
    if not isinstance(prompt, str):
        try:
            return [operator.index(i) for i in prompt]
        except TypeError:
            raise InputError(f"prompt {prompt!r} is not a text or a list of token ids") from None
    if model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer.json: give token ids instead (--prompt-tokens 1,2,3)")
    if not prompt:
        raise InputError("the prompt is empty")
    return model.tokenizer.encode(prompt)


def continued(model: Model, text: str | Sequence[int]) -> list[int]:
    """Token ids of what follows a prompt."""
    if isinstance(text, str) and not text:
        return []
    if isinstance(text, str) and model.tokenizer is not None:
        return model.tokenizer.encode(text, special=False)
    return tokens(model, text)


def cache_bytes(cache: Cache, itemsize: int | None = None) -> Bytes:
    """Bytes of a cache by part, on all devices together, as allocated; `itemsize` as in `tier.nbytes`."""
    copies = meshes.shape_of(cache)[COPIES]
    parts = [tiers_.nbytes(tier, meshes.read(tier.length), itemsize) for tiers in cache for tier in tiers]
    return Bytes(*(copies * sum(column) for column in zip(*parts, strict=True)))


def full_bytes(model: Model, lengths: Sequence[int]) -> int:
    """Bytes that a full cache needs for sequences of these lengths [tokens], in the model's dtype.

    A layer with a sliding window needs no more tokens than the window.
    """
    spec, itemsize = model.spec, jnp.dtype(model.decoder.dtype).itemsize
    tokens = sum(sum(full_slots(spec, n)) for n in lengths)
    return 2 * spec.num_kv_heads * spec.head_dim * itemsize * tokens


def full_slots(spec: ModelSpec, length: int) -> list[int]:
    """Slots of a row in each layer that a full cache fills with so many tokens; no more than a sliding window reads."""
    return [min(length, spec.window(i) or length) for i in range(spec.num_layers)]


def compare(model: Model, cache: Cache, lengths: Sequence[int]) -> Compared:
    """A cache of sequences of these lengths [tokens] beside their full one."""
    full = full_bytes(model, lengths) * HALF // jnp.dtype(model.decoder.dtype).itemsize
    return Compared(cache_bytes(cache, HALF).total, full)


def cached_positions(model: Model, generation: Generation, tier: int | None = None) -> np.ndarray:
    """Positions of the kept tokens, `[B L K S]`, -1 = empty; the slots of several tiers stand side by side.

    Args:
      model: what generated.
      generation: whose cache it is.
      tier: one tier only, an index into the recipe's `stores`.
    """
    layers: list[np.ndarray] = [np.zeros(0)] * model.spec.num_layers
    for group, tiers in zip(layout.layer_groups(model.spec), generation.cache, strict=True):
        for place, layer in enumerate(group.index):
            chosen = tiers if tier is None else tiers[tier : tier + 1]
            rows = [meshes.read(layout.positions(each, place)) for each in chosen]
            rows = rows or [np.zeros((*meshes.read(tiers[0].length).shape[1:], 0), np.int32)]
            layers[layer] = np.concatenate(rows, axis=-1)[: len(generation.sequences)]
    widest = max(layer.shape[-1] for layer in layers)
    padded = [np.pad(x, ((0, 0), (0, 0), (0, widest - x.shape[-1])), constant_values=-1) for x in layers]
    return np.stack(padded, axis=1)


def check_recipe(model: Model, recipe: Recipe) -> None:
    """Raise `InputError` for a recipe that cannot keep this model's vectors, without allocating anything."""
    kernels.check(recipe.kernels)
    each = meshes.shape_of(model.decoder)[DATA]
    jax.eval_shape(lambda: layout.init_cache(model.decoder, recipe, Lengths((1,) * each, 1, 64)))


def check(spec: ModelSpec, ids: Sequence[Sequence[int]], after: Sequence[Sequence[int]]) -> None:
    """Raise `InputError` for prompts, and what follows them, that cannot be read."""
    if not ids:
        raise InputError("there is no prompt")
    if len(after) != len(ids):
        raise InputError(f"{len(after)} texts follow {len(ids)} prompts: give one for each")
    for prompt, text in zip(ids, after, strict=True):
        if not prompt:
            raise InputError("the prompt is empty")
        for i in (*prompt, *text):
            if not 0 <= i < spec.vocab_size:
                raise InputError(f"token id {i} is not in the vocabulary (0 to {spec.vocab_size - 1})")
        if len(prompt) + len(text) > spec.max_position:
            raise InputError(
                f"the prompt has {len(prompt) + len(text)} tokens, the context limit is {spec.max_position}"
            )


def _check_new(spec: ModelSpec, recipe: Recipe, prompt: int, question: int, new: int) -> None:
    """Raise `InputError` for more tokens than can be generated after a prompt and a question of these lengths."""
    length = prompt + question
    reach = length + new
    if recipe.positions is not None and recipe.budget is not None:  # places in the cache, not positions
        extra = 0 if recipe.budget.room is None else int(recipe.budget.room(prompt))
        reach = min(reach, int(recipe.budget.slots(0, spec.num_layers, prompt)) + extra)
    if reach > spec.max_position:
        raise InputError(
            f"prompt ({length} tokens) and max-new-tokens ({new}) pass the context limit"
            f" ({spec.max_position}): ask for at most {spec.max_position - length} new tokens"
        )


def prefill(
    model: Model, recipe: Recipe, ids: Sequence[Sequence[int]], new: int, chunk: int = prefilling.CHUNK
) -> tuple[jax.Array, Cache]:
    """Logits after each prompt and a cache with room for `new` more tokens."""
    lengths = Lengths(tuple(map(len, ids)), new, prefilling.padded_length(max(map(len, ids))))
    cache = layout.allocate(model.decoder, recipe, lengths)
    length = np.asarray(lengths.prompt, np.int32)
    tokens, length = (meshes.place(model.mesh, SEQUENCES, x) for x in (_padded(ids, lengths.padded), length))
    return prefilling.prefill(model.decoder, recipe, tokens, length, cache, chunk)


def feed(
    model: Model,
    recipe: Recipe,
    logits: jax.Array,
    cache: Cache,
    ids: Sequence[Sequence[int]],
    after: Sequence[Sequence[int]],
    given: PyTree = (),
    measure: decode.Measure | None = None,
) -> tuple[jax.Array, Cache, PyTree]:
    """Read what follows the prompts through the cache that `prefill` made; see `decode.feed`."""
    if measure is None and not any(after):
        return logits, cache, ()
    counted = ([len(x) for x in xs] for xs in (ids, after))
    arrays = (_padded(after, fed_length(after)), *(np.asarray(numbers, np.int32) for numbers in counted))
    tokens, length, count = (meshes.place(model.mesh, SEQUENCES, x) for x in arrays)
    return decode.feed(model.decoder, cache, logits, tokens, length, count, given, recipe=recipe, measure=measure)


def fed_length(after: Sequence[Sequence[int]]) -> int:
    """Tokens that continuations are padded to."""
    return pages.ladder(max(1, *map(len, after)), steps=8, smallest=8)


def even(model: Model, *texts: list[list[int]]) -> tuple[list[list[int]], ...]:
    """Lists of sequences with some of one token added, so that the devices have equally many."""
    more = -len(texts[0]) % meshes.shape_of(model.decoder)[DATA]
    return tuple(text + [[0]] * more for text in texts)


def _padded(ids: Sequence[Sequence[int]], width: int) -> np.ndarray:
    tokens = np.zeros((len(ids), width), np.int32)
    for row, sequence in zip(tokens, ids, strict=True):
        row[: len(sequence)] = sequence
    return tokens


def _decode(
    model: Model,
    recipe: Recipe,
    ids: list[list[int]],
    count: int,
    new: int,
    logits: jax.Array,
    cache: Cache,
    how: Sampling,
    on_token: Callable[[int, int], None] | None,
) -> tuple[Cache, list[list[int]]]:
    """Run the compiled loop in chunks until the first `count` sequences have stopped or are long enough."""
    here = functools.partial(meshes.place, model.mesh)
    chooser, stop = sampling.chooser(how, len(ids)), here(EVERYWHERE, np.asarray(model.stop, np.int32))
    seen = None
    if how.repetition_penalty != 1:
        marks = np.zeros((len(ids), model.spec.vocab_size), bool)
        for row, prompt in zip(marks, ids, strict=True):
            row[prompt] = True
        seen = here(SEQUENCES, marks)
    length = here(SEQUENCES, np.asarray([len(prompt) for prompt in ids], np.int32))
    limit = here(EVERYWHERE, np.asarray(new, np.int32))
    state = decode.first_token(logits, cache, length, chooser, stop, seen, mode=how.mode)
    tokens: list[list[int]] = [[] for _ in range(count)]

    def collect(chunk: jax.Array) -> None:
        for column in meshes.read(chunk)[:count].T:
            for i, token in enumerate(column):
                if token == decode.NOT_FINITE:
                    raise not_finite(model, i)
                if token != decode.ENDED:
                    tokens[i].append(int(token))
                    if on_token is not None:
                        on_token(i, int(token))

    collect(state.token[:, None])
    # What has been read back tells when to stop: one transfer per chunk.
    while any(len(chosen) < new and chosen[-1] not in model.stop for chosen in tokens):
        state, chunk = decode.decode_loop(
            model.decoder, state, chooser, stop, limit, recipe=recipe, mode=how.mode, chunk=CHUNK
        )
        collect(chunk)
    return state.cache, tokens


def _sequence(model: Model, prompt: list[int], new: list[int]) -> Continuation:
    text = None if model.tokenizer is None else model.tokenizer.decode(new)
    return Continuation(len(prompt), new, text, "stop" if new[-1] in model.stop else "length")


def not_finite(model: Model, i: int) -> InputError:
    """What is said of a sequence that no token can be chosen for."""
    return InputError(
        f"{model.name}: the logits of sequence {i + 1} are not finite: its weights are damaged, or too large for"
        f" {jnp.dtype(model.decoder.dtype).name}"
    )


def kept_slots(spec: ModelSpec, recipe: Recipe, cache: Cache) -> list[list[int | float]]:
    """Kept slots `[B][L]`, averaged over heads; whole numbers where the heads agree."""
    layers: list[np.ndarray] = [np.zeros(0)] * spec.num_layers
    for group, tiers in zip(layout.layer_groups(spec), cache, strict=True):
        kept = np.sum([meshes.read(tier.length) for tier in tiers], axis=0).mean(axis=-1)  # l B
        for place, layer in enumerate(group.index):
            layers[layer] = kept[place]
    return [[int(x) if x == int(x) else float(x) for x in row] for row in np.stack(layers, axis=1)]
