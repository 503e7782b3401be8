"""Text in, text out: the library's main function and what it reports."""

import functools
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

import jax
import numpy as np

from kvjax.cache import layout, pages
from kvjax.cache.layout import Cache
from kvjax.generation import decode, prefill, stopping
from kvjax.generation import sampling as choosing
from kvjax.generation.accounting import footprint, forced, full_slots
from kvjax.generation.allocate import allocate, init_cache
from kvjax.generation.checks import check_list, check_options, check_texts
from kvjax.generation.model import Model, Texts, encode_continuation, encode_prompt, not_finite
from kvjax.generation.results import Continuation, Generation, Logprobs, Timing
from kvjax.generation.sampling import Sampling
from kvjax.generation.steps import drain
from kvjax.generation.stopping import Stops
from kvjax.generation.timing import Stopwatch
from kvjax.parallel import mesh as meshes
from kvjax.parallel.collectives import DATA
from kvjax.parallel.mesh import EVERYWHERE, SEQUENCES
from kvjax.policies.base import Recipe
from kvjax.spec import Lengths, PyTree

CHUNK = 16  # tokens per call of the compiled loop: text appears in pieces of this many tokens
RANKS = 8  # a step of the number of most likely tokens that are told
T = TypeVar("T")
Tokens = Generator[tuple[int, int], None, T]  # (sequence, token) as they appear, and what is returned then
Pieces = Generator[str, None, T]


def run(tokens: Tokens[T], on_token: Callable[[int, int], None] | None) -> T:
    """What a generator of tokens returns; they go to `on_token` on the way."""
    return drain(tokens, None if on_token is None else lambda chosen: on_token(*chosen))


def pieces(model: Model, tokens: Tokens[T], stop: Sequence[str]) -> Pieces[T]:
    """The text of one sequence as its tokens appear; their ids where there is no tokenizer."""
    text = None if model.tokenizer is None else stopping.Text(model.tokenizer, stopping.stops(model, stop))
    while True:
        try:
            _, token = next(tokens)
        except StopIteration as end:
            if text and (rest := text.held):
                yield rest
            return end.value
        if piece := text.push(token) if text else f"{token} ":
            yield piece


def generate(
    model: Model,
    prompts: Texts,
    recipe: Recipe,
    *,
    questions: Texts | None,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str],
    logprobs: int | None,
    prefill_chunk: int,
    max_length: int | None,
) -> Tokens[Generation]:
    """`Model.generate` with everything said."""
    stops = stopping.stops(model, stop)
    check_list("prompts", prompts)
    if questions is not None:
        check_list("questions", questions)
    ids = [encode_prompt(model, prompt) for prompt in prompts]
    after = [[] for _ in ids] if questions is None else [encode_continuation(model, question) for question in questions]
    check_options(model.spec, recipe, new=max_new_tokens, max_length=max_length, sampling=sampling, logprobs=logprobs)
    check_texts(model.spec, recipe, ids, after, max_new_tokens, max_length)
    count, (ids, after) = len(ids), even(model, ids, after)
    whole = [prompt + question for prompt, question in zip(ids, after, strict=True)]
    with Stopwatch() as watch:
        new = max_new_tokens + max(map(len, after))
        logits, cache = read_prompts(model, recipe, ids, new, prefill_chunk, max_length)
        answer, cache, _ = read_continuations(model, recipe, logits, cache, ids, after)
        jax.block_until_ready((answer, cache))
        prefill_s = watch.lap()
        cache, sequences = yield from decode_texts(
            model, recipe, whole, count, max_new_tokens, answer, cache, sampling, stops, logprobs
        )
        decode_s = watch.lap()
    lengths = [max_length or len(prompt) + max_new_tokens for prompt in whole[:count]]
    seconds = prefill_s, decode_s, watch.compile_s
    return report(model, recipe, sequences, answer, cache, lengths, seconds)


def report(
    model: Model,
    recipe: Recipe,
    sequences: list[Continuation],
    logits: jax.Array,
    cache: Cache,
    lengths: list[int],
    seconds: tuple[float, float, float],
) -> Generation:
    """What is said of a generation.

    Args:
      model, recipe: what generated.
      sequences: that were generated.
      logits: after each prompt; those of others are left out.
      cache: with the generated tokens.
      lengths: tokens of the sequences that a full cache of their size would be for.
      seconds: of reading, decoding and compiling.
    """
    count, held, (prefill_s, decode_s, compile_s) = len(sequences), footprint(model, cache, lengths), seconds
    decoded = sum(len(sequence.tokens) - 1 for sequence in sequences)  # the first token comes from prefill
    return Generation(
        sequences=sequences,
        bytes=held.bytes,
        full_bytes=held.full_bytes,
        compared=held.compared,
        slots=held.slots[:count],
        full_slots=[full_slots(model.spec, s.prompt_tokens + len(s.tokens) - 1) for s in sequences],
        timing=Timing(prefill_s, decode_s, decoded / decode_s if decoded else 0.0, compile_s),
        logits=meshes.read(logits)[:count],
        cache=cache,
        recipe=recipe,
        forced=forced(cache),
    )


def warm_up(model: Model, recipe: Recipe, max_length: int, new: int, batch: int, questions: bool) -> float:
    """`Model.warm_up` with everything said: a prompt of one token, of which two are generated."""
    check_options(model.spec, recipe, new=new, max_length=max_length)
    ids = [[0]] * batch
    ids, after = even(model, ids, [[0]] * batch if questions else [[]] * batch)
    with Stopwatch() as watch:
        logits, cache = read_prompts(model, recipe, ids, min(new, max_length - 2), max_length=max_length)
        logits, cache, _ = read_continuations(model, recipe, logits, cache, ids, after)
        cache, _ = run(decode_texts(model, recipe, ids, batch, 2, logits, cache, Sampling(), Stops(())), None)
        _ = footprint(model, cache, ()), forced(cache)  # what is said of it
        watch.lap()
    return watch.compile_s


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
            batch = len(generation.sequences)  # all of which read the same context
            rows = [meshes.read(layout.positions(each, place)) for each in chosen]
            rows = [np.broadcast_to(x, (batch, *x.shape[1:])) if len(x) == 1 else x for x in rows]
            rows = rows or [np.zeros((*meshes.read(tiers[0].length).shape[1:], 0), np.int32)]
            layers[layer] = np.concatenate(rows, axis=-1)[: len(generation.sequences)]
    widest = max(layer.shape[-1] for layer in layers)
    padded = [np.pad(x, ((0, 0), (0, 0), (0, widest - x.shape[-1])), constant_values=-1) for x in layers]
    return np.stack(padded, axis=1)


def check_recipe(model: Model, recipe: Recipe) -> None:
    """Raise `InputError` for a recipe that cannot keep this model's vectors, without allocating anything."""
    check_options(model.spec, recipe)
    each = meshes.shape_of(model.decoder)[DATA]
    jax.eval_shape(lambda: init_cache(model.decoder, recipe, Lengths((1,) * each, 1, 64)))


def read_prompts(
    model: Model,
    recipe: Recipe,
    ids: Sequence[Sequence[int]],
    new: int,
    chunk: int = prefill.CHUNK,
    max_length: int | None = None,
) -> tuple[jax.Array, Cache]:
    """Logits after each prompt and a cache with room for `new` more tokens; its shapes for `max_length`, if given."""
    padded = prefill.padded_length(max(map(len, ids)) if max_length is None else max_length)
    lengths = Lengths(tuple(map(len, ids)), new, padded, total=max_length)
    cache = allocate(model.decoder, recipe, lengths)
    length = np.asarray(lengths.prompt, np.int32)
    tokens, length = (meshes.place(model.mesh, SEQUENCES, x) for x in (pad(ids, lengths.padded), length))
    return prefill.prefill(model.decoder, recipe, tokens, length, cache, chunk, fit=max_length is None)


def read_continuations(
    model: Model,
    recipe: Recipe,
    logits: jax.Array,
    cache: Cache,
    ids: Sequence[Sequence[int]],
    after: Sequence[Sequence[int]],
    given: PyTree = (),
    measure: decode.Measure | None = None,
    shared: Cache = (),
) -> tuple[jax.Array, Cache, PyTree]:
    """Read what follows the prompts through the cache that `prefill` made; see `decode.feed`."""
    if measure is None and not any(after):
        return logits, cache, ()
    counted = ([len(x) for x in xs] for xs in (ids, after))
    arrays = (pad(after, fed_length(after)), *(np.asarray(numbers, np.int32) for numbers in counted))
    tokens, length, count = (meshes.place(model.mesh, SEQUENCES, x) for x in arrays)
    return decode.feed(
        model.decoder, cache, logits, tokens, length, count, given, shared, recipe=recipe.structure, measure=measure
    )


def fed_length(after: Sequence[Sequence[int]]) -> int:
    """Tokens that continuations are padded to."""
    return pages.ladder(max(1, *map(len, after)), steps=1, smallest=64)


def even(model: Model, *texts: list[list[int]]) -> tuple[list[list[int]], ...]:
    """Lists of sequences with some of one token added, so that the devices have equally many."""
    more = -len(texts[0]) % meshes.shape_of(model.decoder)[DATA]
    return tuple(text + [[0]] * more for text in texts)


def pad(ids: Sequence[Sequence[int]], width: int) -> np.ndarray:
    tokens = np.zeros((len(ids), width), np.int32)
    for row, sequence in zip(tokens, ids, strict=True):
        row[: len(sequence)] = sequence
    return tokens


def decode_texts(
    model: Model,
    recipe: Recipe,
    ids: list[list[int]],
    count: int,
    new: int,
    logits: jax.Array,
    cache: Cache,
    sampling: Sampling,
    stops: Stops,
    logprobs: int | None = None,
    shared: Cache = (),
) -> Tokens[tuple[Cache, list[Continuation]]]:
    """Run the compiled loop in chunks until the first `count` sequences have stopped or are long enough."""
    here = functools.partial(meshes.place, model.mesh)
    chooser, ends = choosing.chooser(sampling, len(ids)), decode.ends(stops.ids, new, len(ids))
    pause = here(EVERYWHERE, stopping.completing(model, stops.strings))
    marks = np.zeros((len(ids), model.spec.vocab_size), bool)
    for row, prompt in zip(marks, ids, strict=True):
        row[prompt] = True
    seen = here(SEQUENCES, marks)
    length = here(SEQUENCES, np.asarray([len(prompt) for prompt in ids], np.int32))
    top = None if logprobs is None else min(-(-max(logprobs, 1) // RANKS) * RANKS, model.spec.vocab_size)
    state = decode.first_token(logits, cache, length, chooser, ends, seen)
    tokens: list[list[int]] = [[] for _ in range(count)]
    ended = np.arange(len(ids)) >= count
    tokenizer = model.tokenizer if stops.strings else None
    texts = [] if tokenizer is None else [stopping.Text(tokenizer, stops) for _ in tokens]
    ranks: list[list[tuple[np.ndarray, ...]]] = [[] for _ in tokens]

    def collect(chunk: jax.Array, ranked: Sequence[jax.Array]) -> Tokens[None]:
        said = [meshes.read(x) for x in ranked]
        for at, column in enumerate(meshes.read(chunk)[:count].T):
            for i, token in enumerate(map(int, column)):
                if token == decode.NOT_FINITE:
                    raise not_finite(model, i)
                if token == decode.ENDED or ended[i]:
                    continue
                tokens[i].append(token)
                ranks[i].append(tuple(x[i, at] for x in said))
                if texts:
                    texts[i].push(token)
                ended[i] = token in stops.ids or len(tokens[i]) == new or bool(texts and texts[i].stopped)
                yield i, token

    first = () if top is None else decode.ranked(logits, state.token, top)
    yield from collect(state.token[:, None], [x[:, None] for x in first])
    # What has been read back tells when to stop: one transfer per chunk.
    while not ended.all():
        if texts:
            state = state._replace(done=here(SEQUENCES, meshes.read(state.done) | ended))
        state, chunk, ranked = decode.decode_loop(
            model.decoder, state, chooser, ends, shared, pause, recipe=recipe.structure, chunk=CHUNK, top=top
        )
        yield from collect(chunk, ranked)
    sequences = [_sequence(model, *each, stops) for each in zip(ids[:count], tokens, strict=True)]
    if logprobs is not None:
        sequences = [s._replace(logprobs=_logprobs(said, logprobs)) for s, said in zip(sequences, ranks, strict=True)]
    return state.cache, sequences


def _logprobs(said: Sequence[tuple], count: int) -> Logprobs:
    chosen, ids, top = map(np.stack, zip(*said, strict=True))
    return Logprobs(chosen, ids[:, :count], top[:, :count])


def _sequence(model: Model, prompt: list[int], new: list[int], stops: Stops) -> Continuation:
    text = None if model.tokenizer is None else model.tokenizer.decode(new)
    at = -1 if text is None else stops.find(text)
    ended = at >= 0 or new[-1] in stops.ids
    return Continuation(len(prompt), new, text if text is None or at < 0 else text[:at], "stop" if ended else "length")
