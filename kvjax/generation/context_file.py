"""Contexts in files: safetensors, with what they belong to as JSON in the header.

Only what rows hold is written. Numbers lie there as unsigned integers of their size, whatever format they are of.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from kvjax.cache import pages
from kvjax.cache import tier as tiers_
from kvjax.cache.layout import Cache
from kvjax.cache.tier import Tier
from kvjax.checkpoint import digest, identity
from kvjax.errors import InputError
from kvjax.files import output
from kvjax.generation.allocate import allocate
from kvjax.generation.context import Context, check_one_device
from kvjax.generation.model import Model
from kvjax.generation.prefill import padded_length
from kvjax.methods import resolve
from kvjax.spec import Lengths

VERSION = 1
HEADER = "kvjax"
_POOL = ("k", "v", "pos", "score", "free")  # lead with the pages of a pool


def save(context: Context, path: Path, conversation: Mapping[str, Any] | None = None) -> None:
    """Write a context, and the conversation that it is of; a file is complete, or as it was before."""
    if context.named is None:
        raise InputError("a context whose method was given as a recipe cannot be saved: give the method by its name")
    cache = tuple(tuple(map(_held, tiers)) for tiers in context.cache)
    arrays = _arrays(cache) | {"logits": np.asarray(context.logits), "tokens": np.asarray(context.tokens, np.int32)}
    content = {name: x.view(_bits(x.dtype)) for name, x in arrays.items()}
    method, budget = context.named
    about = {
        "version": VERSION,
        "model": identity.of_model(context.model.decoder),
        "called": _called(context.model),
        "method": method,
        "budget": budget,
        "chat": context.chat,
        "prompt": context.prompt,
        "room": context.room,
        "pools": [[[tier.free.shape[0], tier.table.shape[-1]] for tier in tiers] for tiers in context.cache],
        "dtypes": {name: x.dtype.name for name, x in arrays.items()},
    }
    if conversation is not None:
        about["conversation"] = dict(conversation)
    about["digest"] = _digest(about, content)
    output.write(path, safetensors.numpy.save(content, {HEADER: json.dumps(about)}))


def load(model: Model, path: Path) -> tuple[Context, Any]:
    """Read a context that this model has made, and the conversation that it is of; None = of none.

    Raises:
      InputError: it is damaged, or of another model, and never read anew in silence.
    """
    check_one_device(model)
    about, content = _read(path)
    if about.get("version") != VERSION:
        raise InputError(f"{path}: is a context of another version of kvjax ({about.get('version')}, not {VERSION})")
    if about.pop("digest", "") != _digest(about, content):
        raise InputError(f"{path}: is damaged: it is not what was written")
    if about.get("model") != identity.of_model(model.decoder):
        raise InputError(f"{path}: was made by {about.get('called')}, which is not this model, {_called(model)}")
    try:
        named, prompt, room = (str(about["method"]), about["budget"]), int(about["prompt"]), int(about["room"])
        pools, dtypes, chat = about["pools"], about["dtypes"], bool(about["chat"])
        recipe = resolve(model.spec, *named)
        arrays = {name: x.view(jnp.dtype(dtypes[name])) for name, x in content.items()}
        tokens, logits = arrays.pop("tokens"), arrays.pop("logits")
        if logits.shape != (1, model.spec.vocab_size) or not 1 <= prompt <= tokens.size <= room:
            raise ValueError("its parts do not belong together")
        if (
            tokens.dtype != np.int32
            or tokens.ndim != 1
            or not 0 <= tokens.min() <= tokens.max() < model.spec.vocab_size
        ):
            raise ValueError("its tokens are not those of the model")
        lengths = Lengths((prompt,), max(room - prompt, 1), padded_length(prompt))
        expected = jax.eval_shape(lambda: allocate(model.decoder, recipe, lengths))
        cache = _assembled(expected, arrays, pools)
        context = Context(model, recipe, tuple(tokens.tolist()), jnp.asarray(logits), cache, prompt, room, named, chat)
        return context, about.get("conversation")
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: is not a context that this version can read ({error})") from None


def _called(model: Model) -> str:
    weights = "" if model.spec.weights is None else f" with weights in {model.spec.weights}"
    return f"{model.name} in {jnp.dtype(model.decoder.dtype).name}{weights}"


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        with safetensors.safe_open(path, "np") as file:
            about = json.loads((file.metadata() or {}).get(HEADER, "{}"))
            content = {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as a context ({error})") from None
    if not isinstance(about, dict) or not about:
        raise InputError(f"{path}: is not a context of kvjax")
    return about, content


def _digest(about: Mapping[str, Any], content: Mapping[str, np.ndarray]) -> str:
    parts = {name: [list(x.shape), digest.of_array(x)] for name, x in content.items()}
    return digest.of_bytes(json.dumps([dict(about), parts], sort_keys=True).encode())


def _held(tier: Tier) -> Tier:
    """The tier with those pages that its rows hold."""
    return tiers_.resize(tier, max(tier.free.shape[0] - int(tier.num_free[0]), 1))


def _arrays(cache: Cache) -> dict[str, np.ndarray]:
    leaves, _ = jax.tree.flatten_with_path(cache)
    return {_name(path): np.asarray(leaf) for path, leaf in leaves}


def _name(path: tuple[Any, ...]) -> str:
    return "cache." + jax.tree_util.keystr(path, simple=True, separator=".")


def _bits(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"u{dtype.itemsize}")


def _assembled(expected: Cache, arrays: dict[str, np.ndarray], pools: Any) -> Cache:
    """The cache of a file's arrays, with pools as large as they were."""
    leaves, structure = jax.tree.flatten_with_path(expected)
    if sorted(arrays) != sorted(_name(path) for path, _ in leaves):
        raise ValueError("it has other arrays than a cache of its method")
    found = jax.tree.unflatten(structure, [jnp.asarray(arrays[_name(path)]) for path, _ in leaves])
    return tuple(
        tuple(_checked(*each) for each in zip(*tiers, strict=True))
        for tiers in zip(found, expected, pools, strict=True)
    )


def _checked(tier: Tier, expected: Tier, pool: Sequence[int]) -> Tier:
    """A tier as it was allocated; raises `ValueError` where its arrays do not fit each other or its method."""
    size, page, width = tier.free.shape[0], tier.page, tier.table.shape[-1]
    for name, field, want in zip(Tier._fields, tier, expected, strict=True):
        for x, y in zip(jax.tree.leaves(field), jax.tree.leaves(want), strict=True):
            shape = (size, page, *y.shape[2:]) if name in _POOL else y.shape
            shape = {"free": (size,), "table": (*y.shape[:-1], width)}.get(name, shape)
            if x.shape != shape or x.dtype != y.dtype:
                raise ValueError(f"{name} is {x.dtype}{list(x.shape)}, not {y.dtype}{list(shape)}")
    if int(tier.length.max()) > tier.capacity or int(pool[1]) != width:
        raise ValueError("a row holds more than it can")
    if not size <= int(pool[0]) <= 2 * tier.table.size + pages.SMALLEST_PAGE:  # shapes are rounded up
        raise ValueError("its pool has other pages than its rows")
    return tiers_.resize(tier, int(pool[0]))
