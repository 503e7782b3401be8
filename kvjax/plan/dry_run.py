"""Models and caches without arrays: what a method would do and its cache would cost, from a `config.json` alone."""

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kvjax.cache import layout
from kvjax.cache.layout import Cache
from kvjax.cache.tier import Bytes
from kvjax.checkpoint import hf, orbax, shipped
from kvjax.errors import InputError
from kvjax.files.gguf import is_gguf
from kvjax.files.text import read_json
from kvjax.generation import prefill
from kvjax.generation.accounting import footprint
from kvjax.generation.allocate import init_cache
from kvjax.generation.checks import check_frequencies
from kvjax.generation.model import Model
from kvjax.generation.results import Compared
from kvjax.models.decoder import Decoder, native_dtype
from kvjax.models.hf_config import parse_config, read_config
from kvjax.models.quantized import asked
from kvjax.models.tokenizer import Tokenizer
from kvjax.policies.base import Recipe
from kvjax.policies.budgets import profile
from kvjax.policies.layers import layer_recipe, rotates_at_read
from kvjax.spec import Lengths, ModelSpec, readable

T = TypeVar("T")


class Plan(NamedTuple):
    """A recipe in force and the cache that it would allocate."""

    budget: list[int] | None  # slots per row of each layer for one prompt; None = decided by the policy alone
    decided: str  # "before the prompt"; "after the prompt" when `budget` is only where it starts; "by the model; ..."
    stores: list[str]  # number format of each tier
    fold: str  # which vector is cached per token
    rotate: str  # when cached keys are rotated
    bytes: dict[str, int]  # by part; `codes` are payload and slack together: how many slots fill depends on the run
    full_bytes: int  # in the model's dtype
    compared: Compared
    notes: list[str]  # what to know when reading it


def beyond(spec: ModelSpec, context: int, new: int) -> str:
    """The note on a plan of more tokens than a model is made for: what a cache takes does not depend on that."""
    return f"the model is made for {spec.max_position:,} tokens: planned as if it read {context:,} and {new:,} new ones"


def plan_cache(model: Model, recipe: Recipe, context: int, new: int, batch: int = 1) -> Plan:
    """Plan a cache for `batch` prompts of `context` tokens, each with room for `new` generated ones.

    >>> from kvjax import methods
    >>> model = abstract_model(None)
    >>> plan_cache(model, methods.snapkv(budget=128), context=1000, new=1).budget
    [128, 128, 128, 128, 128, 128]
    """
    spec = model.spec
    longest = context if recipe.positions is not None else context + new
    check_frequencies(spec, recipe, context, context + new - 1)
    lengths, whole = Lengths((context,) * batch, new, prefill.padded_length(context)), [context + new] * batch
    size, full, compared, _ = _counted(model, recipe, lengths, lambda cache: footprint(model, cache, whole))
    parts = {"codes": size.payload + size.slack, "scales": size.scales, "statistics": size.statistics}
    return Plan(
        budget=None
        if recipe.budget is None or recipe.policy.prompt_hooks.rewrite is not None
        else [_slots(spec, recipe, i, context) for i in range(spec.num_layers)],
        decided=_decided(recipe),
        stores=[store.name for store in recipe.stores],
        fold=_fold(spec),
        rotate=f"when {'read' if rotates_at_read(spec, recipe) else 'written'}",
        bytes=parts | {"tables": size.tables, "total": size.total},
        full_bytes=full,
        compared=compared,
        notes=[beyond(spec, context, new)] if longest > spec.max_position else [],
    )


def abstract_model(
    name: str | None, dtype: DTypeLike | None = None, ignore: Collection[str] = (), weights: str | None = None
) -> Model:
    """A model without weights, good for planning a cache and for making tokens of a text.

    Args:
      name: a checkpoint directory, converted or not, of which `config.json` is enough, or the path of such a file, or a
        GGUF file; None = the demo model.
      dtype: of weights and cache; None = `native_dtype`.
      ignore: config fields that may be ignored although kvjax does not know them.
      weights: "int8" or "int4", of matrices; None = as they are stored.
    """
    path = Path(shipped.find(name))
    if not path.exists():
        raise InputError(f"{path}: no such directory or config.json; a dry run downloads nothing")
    folder, spec = _read_spec(path, ignore)
    spec = profile.noted(asked(spec, weights), folder)
    label = "demo" if name is None else name
    return without_weights(spec, native_dtype() if dtype is None else dtype, Tokenizer.load(folder), label)


def without_weights(spec: ModelSpec, dtype: DTypeLike, tokenizer: Tokenizer | None, name: str) -> Model:
    """A model of which only the shape and the dtype may be looked at: the weights of one layer stand for all."""
    one = replace(spec, num_layers=1)
    decoder = nnx.eval_shape(lambda: Decoder(one, dtype=dtype, rngs=nnx.Rngs(0)))
    decoder.spec = spec
    return Model(decoder, tokenizer, (), name)


def read_spec(path: Path, ignore: Collection[str] = ()) -> ModelSpec:
    """The model in a checkpoint directory, converted or not, in a GGUF file, or of a `config.json`."""
    folder, spec = _read_spec(path, ignore)
    return profile.noted(spec, folder)


def _read_spec(path: Path, ignore: Collection[str]) -> tuple[Path, ModelSpec]:
    path = hf.local(path) if path.is_dir() or is_gguf(path) else path
    if is_gguf(path):
        return path, read_config(path, ignore)
    folder, file = (path, path / "config.json") if path.is_dir() else (path.parent, path)
    converted = orbax.is_orbax(folder) and file == folder / "config.json"
    if converted:
        return folder, orbax.read_spec(folder, ignore)
    try:
        content = read_json(file)
    except InputError as error:
        if path.is_dir():
            raise
        raise InputError(f"{error}: give the directory of a checkpoint, or its config.json") from None
    return folder, parse_config(content, ignore)


def _slots(spec: ModelSpec, recipe: Recipe, layer: int, context: int) -> int:
    """Slots of a layer's row for a prompt."""
    window, own = spec.window(layer), layer_recipe(spec, recipe, layer)
    peers = layout.layers_with(spec, window)
    slots = own.slots(peers.index(layer), len(peers), readable(context, window))
    return slots if window is None else min(slots, window)


def _decided(recipe: Recipe) -> str:
    if recipe.policy.prompt_hooks.rewrite is not None:
        return "by the model; bytes are those while the prompt is read"
    return "before the prompt" if recipe.budget is None or recipe.budget.allocate is None else "after the prompt"


class CacheSize(NamedTuple):
    """An empty cache; `bytes.slack` is all that may hold codes."""

    bytes: Bytes
    slots: int  # of all rows, layers and tiers


def cache_size(model: Model, recipe: Recipe, lengths: Lengths) -> CacheSize:
    """The cache that `init_cache` would allocate."""
    slots = lambda cache: sum(tier.free.shape[0] * tier.page for tiers in cache for tier in tiers)
    return _counted(model, recipe, lengths, lambda cache: CacheSize(footprint(model, cache, ()).bytes, slots(cache)))


def _counted(model: Model, recipe: Recipe, lengths: Lengths, count: Callable[[Cache], T]) -> T:
    """What is counted of the cache that `init_cache` would allocate; it is empty."""
    counted: list[T] = []

    def trace() -> None:
        cache = init_cache(model.decoder, recipe, lengths)
        with jax.ensure_compile_time_eval():  # counting reads the filled slots: none, so far
            empty = [tuple(t._replace(length=jnp.zeros(t.length.shape, jnp.int32)) for t in tiers) for tiers in cache]
        counted.append(count(tuple(empty)))

    try:
        jax.eval_shape(trace)  # traced, and thrown away
    except OverflowError:
        raise InputError("a cache of this size has more pages than its tables can number: plan a smaller one") from None
    return counted[0]


def _fold(spec: ModelSpec) -> str:
    if spec.latent is None:
        return "identity"
    keys, values = zip(*spec.latent.ranks, strict=True)
    spans = (f"{name} {min(r)} to {max(r)}" for name, r in (("keys", keys), ("values", values)))
    return f"low rank, a latent of {spec.latent.heads} heads: {', '.join(spans)} of {spec.latent.heads * spec.head_dim}"
