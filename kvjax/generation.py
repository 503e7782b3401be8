"""Text in, text out: the library's main function and what it reports."""

import dataclasses
import operator
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from kvjax import checkpoint, decode, demo, sampling
from kvjax.cache import tier as tiers_
from kvjax.cache.budget import LARGEST
from kvjax.cache.policy import Recipe
from kvjax.cache.tier import Bytes
from kvjax.decode import Cache
from kvjax.errors import InputError
from kvjax.methods import full
from kvjax.models.decoder import Decoder
from kvjax.models.hf_config import read_generation_config
from kvjax.sampling import Sampling
from kvjax.spec import Lengths, ModelSpec
from kvjax.tokenizer import Tokenizer

CHUNK = 16  # tokens per call of the compiled loop: text appears in pieces of this many tokens


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded checkpoint: weights, tokenizer (None where there is none), ids that end a text."""

    decoder: Decoder
    tokenizer: Tokenizer | None
    stop: tuple[int, ...]
    name: str

    @property
    def spec(self) -> ModelSpec:
        """Shape and mathematics of the decoder."""
        return self.decoder.spec


class Continuation(NamedTuple):
    """One generated sequence."""

    prompt_tokens: int
    tokens: list[int]  # generated, with the stop token if one was generated
    text: str | None  # None without a tokenizer
    finish_reason: str  # "stop" or "length"


class Timing(NamedTuple):
    """Wall-clock time [seconds], compilation apart."""

    prefill_s: float
    decode_s: float
    decode_tokens_per_s: float
    compile_s: float


class Generation(NamedTuple):
    """What `generate` returns."""

    sequences: list[Continuation]
    bytes: Bytes  # allocated for the cache
    full_bytes: int  # that a full cache needs for the same prompts and new tokens
    slots: list[list[int | float]]  # kept slots per layer, per sequence, averaged over heads
    timing: Timing
    logits: np.ndarray  # [B V] after each prompt's last token
    cache: Cache
    recipe: Recipe


def load(name: str | Path | None = None, *, dtype: DTypeLike | None = None, ignore_config: Sequence[str] = ()) -> Model:
    """Load a checkpoint.

    Args:
      name: a Hugging Face directory, an Orbax directory made by `kvjax.convert`, or a hub id; None = the demo model.
      dtype: of weights, activations and cache; None = float32 on CPU, bfloat16 elsewhere.
      ignore_config: config fields that may be ignored although kvjax does not know them.

    >>> import kvjax
    >>> model = kvjax.load()
    >>> model.spec.num_kv_heads
    2
    """
    path = demo.directory() if name is None else name
    decoder, directory = checkpoint.load_model(str(path), dtype, ignore_config)
    label = "demo" if name is None else str(name)
    return Model(decoder, Tokenizer.load(directory), read_generation_config(directory), label)


def generate(
    model: Model,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    recipe: Recipe | None = None,
    *,
    max_new_tokens: int = 64,
    how: Sampling | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> Generation:
    """Generate a continuation of each prompt with a compressed cache.

    Args:
      model: from `load`.
      prompts: texts, or token ids.
      recipe: from a factory in `kvjax.methods`; None = the full cache.
      max_new_tokens: most tokens to generate for each prompt.
      how: how tokens are chosen; None = greedy.
      on_token: called as `(sequence, token)` as tokens appear.

    >>> import kvjax
    >>> model = kvjax.load()
    >>> out = kvjax.generate(model, [[1, 2, 3]], kvjax.methods.h2o(budget=16), max_new_tokens=4)
    >>> len(out.sequences[0].tokens) <= 4
    True
    """
    recipe, how = recipe or full(), how or Sampling()
    if isinstance(prompts, str):
        raise InputError("prompts is one text: give a list of prompts")
    ids = [tokens(model, prompt) for prompt in prompts]
    _check(model.spec, recipe, ids, max_new_tokens)
    how.check()
    lengths = Lengths(tuple(map(len, ids)), max_new_tokens, decode.padded_length(max(map(len, ids))))
    with _Stopwatch() as watch:
        logits, cache = _prefill(model, recipe, ids, lengths)
        jax.block_until_ready((logits, cache))
        prefill_s = watch.lap()
        cache, chosen = _decode(model, recipe, ids, lengths, logits, cache, how, on_token)
        decode_s = watch.lap()
    decoded = sum(len(new) - 1 for new in chosen)  # the first token comes from prefill
    spec, itemsize = model.spec, jnp.dtype(model.decoder.dtype).itemsize
    per_token = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * itemsize
    return Generation(
        sequences=[_sequence(model, prompt, new) for prompt, new in zip(ids, chosen, strict=True)],
        bytes=cache_bytes(cache),
        full_bytes=per_token * sum(n + max_new_tokens for n in lengths.prompt),
        slots=_slots(spec, recipe, cache),
        timing=Timing(prefill_s, decode_s, decoded / decode_s if decoded else 0.0, watch.compile_s),
        logits=np.asarray(logits),
        cache=cache,
        recipe=recipe,
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


def cache_bytes(cache: Cache) -> Bytes:
    """Allocated bytes of a cache by part."""
    parts = [tiers_.nbytes(tier) for tiers in cache for tier in tiers]
    return Bytes(*(sum(column) for column in zip(*parts, strict=True)))


def cached_positions(model: Model, generation: Generation) -> np.ndarray:
    """Positions of the kept tokens, `[B L K S]`, -1 = empty; the slots of several tiers stand side by side."""
    layers: list[np.ndarray] = [np.zeros(0)] * model.spec.num_layers
    for group, tiers in zip(decode.layer_groups(model.spec, generation.recipe), generation.cache, strict=True):
        for place, layer in enumerate(group.index):
            rows = [tiers_.positions(tiers_.layer(tier, place)) for tier in tiers]
            layers[layer] = np.concatenate([np.asarray(row) for row in rows], axis=-1)
    widest = max(layer.shape[-1] for layer in layers)
    padded = [np.pad(x, ((0, 0), (0, 0), (0, widest - x.shape[-1])), constant_values=-1) for x in layers]
    return np.stack(padded, axis=1)


def _check(spec: ModelSpec, recipe: Recipe, ids: Sequence[Sequence[int]], new: int) -> None:
    """Raise `InputError` for what cannot be generated."""
    if not ids:
        raise InputError("there is no prompt")
    if isinstance(new, bool) or not isinstance(new, int) or not 1 <= new <= LARGEST:
        raise InputError(f"max-new-tokens {new} is not a whole number from 1 to {LARGEST}")
    for prompt in ids:
        if not prompt:
            raise InputError("the prompt is empty")
        for i in prompt:
            if not 0 <= i < spec.vocab_size:
                raise InputError(f"token id {i} is not in the vocabulary (0 to {spec.vocab_size - 1})")
        if len(prompt) > spec.max_position:
            raise InputError(f"the prompt has {len(prompt)} tokens, the context limit is {spec.max_position}")
        reach = len(prompt) + new
        if recipe.positions is not None and recipe.budget is not None:  # places in the cache, not positions
            reach = min(reach, int(recipe.budget.slots(0, spec.num_layers, len(prompt))))
        if reach > spec.max_position:
            raise InputError(
                f"prompt ({len(prompt)} tokens) and max-new-tokens ({new}) pass the context limit"
                f" ({spec.max_position}): ask for at most {spec.max_position - len(prompt)} new tokens"
            )


def _prefill(model: Model, recipe: Recipe, ids: list[list[int]], lengths: Lengths) -> tuple[jax.Array, Cache]:
    tokens = np.zeros((len(ids), lengths.padded), np.int32)
    for row, prompt in zip(tokens, ids, strict=True):
        row[: len(prompt)] = prompt
    cache = decode.init_cache(model.decoder, recipe, lengths)
    length = jnp.asarray(lengths.prompt, jnp.int32)
    return decode.prefill(model.decoder, recipe, jnp.asarray(tokens), length, cache)


def _decode(
    model: Model,
    recipe: Recipe,
    ids: list[list[int]],
    lengths: Lengths,
    logits: jax.Array,
    cache: Cache,
    how: Sampling,
    on_token: Callable[[int, int], None] | None,
) -> tuple[Cache, list[list[int]]]:
    """Run the compiled loop in chunks until every sequence has stopped or is long enough."""
    chooser, stop = sampling.chooser(how, len(ids)), jnp.asarray(model.stop, jnp.int32)
    seen = None
    if how.repetition_penalty != 1:
        marks = np.zeros((len(ids), model.spec.vocab_size), bool)
        for row, prompt in zip(marks, ids, strict=True):
            row[prompt] = True
        seen = jnp.asarray(marks)
    length, limit = jnp.asarray(lengths.prompt, jnp.int32), jnp.asarray(lengths.new, jnp.int32)
    state = decode.first_token(logits, cache, length, chooser, stop, seen, mode=how.mode)
    tokens: list[list[int]] = [[] for _ in ids]

    def collect(chunk: jax.Array) -> None:
        for column in np.asarray(chunk).T:
            for i, token in enumerate(column):
                if token >= 0:
                    tokens[i].append(int(token))
                    if on_token is not None:
                        on_token(i, int(token))

    collect(state.token[:, None])
    # What has been read back tells when to stop: one transfer per chunk.
    while any(len(new) < lengths.new and new[-1] not in model.stop for new in tokens):
        state, chunk = decode.decode_loop(
            model.decoder, state, chooser, stop, limit, recipe=recipe, mode=how.mode, chunk=CHUNK
        )
        collect(chunk)
    return state.cache, tokens


def _sequence(model: Model, prompt: list[int], new: list[int]) -> Continuation:
    text = None if model.tokenizer is None else model.tokenizer.decode(new)
    return Continuation(len(prompt), new, text, "stop" if new[-1] in model.stop else "length")


def _slots(spec: ModelSpec, recipe: Recipe, cache: Cache) -> list[list[int | float]]:
    """Kept slots `[B][L]`, averaged over heads; whole numbers where the heads agree."""
    layers: list[np.ndarray] = [np.zeros(0)] * spec.num_layers
    for group, tiers in zip(decode.layer_groups(spec, recipe), cache, strict=True):
        kept = np.sum([np.asarray(tier.length) for tier in tiers], axis=0).mean(axis=-1)  # l B
        for place, layer in enumerate(group.index):
            layers[layer] = kept[place]
    return [[int(x) if x == int(x) else float(x) for x in row] for row in np.stack(layers, axis=1)]


class _Stopwatch:
    """Wall-clock laps without the time that JAX spends on tracing and compiling."""

    def __enter__(self) -> "_Stopwatch":
        self.compile_s = 0.0
        self._spans: list[tuple[float, float]] = []
        jax.monitoring.register_event_time_span_listener(self._listen)
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        jax.monitoring.unregister_event_time_span_listener(self._listen)

    def _listen(self, event: str, start_time: float, end_time: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            self._spans.append((start_time, end_time))

    def lap(self) -> float:
        """Seconds since the last lap."""
        now, compiling, reached = time.perf_counter(), 0.0, 0.0
        for start, end in sorted(self._spans):  # spans of nested functions overlap
            compiling += max(end - max(start, reached), 0.0)
            reached = max(reached, end)
        lap = max(now - self._start - compiling, 0.0)
        self.compile_s += compiling
        self._start, self._spans = now, []
        return lap
