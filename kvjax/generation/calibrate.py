"""How a model's rows share a budget, measured on a few texts: a profile, see `kvjax.policies.budgets.profile`."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from kvjax.cache import layout
from kvjax.cache.layout import layer_groups
from kvjax.checkpoint.lorc import calibration
from kvjax.corpus import sources
from kvjax.errors import InputError
from kvjax.generation.allocate import init_cache
from kvjax.generation.model import Model
from kvjax.generation.prefill import padded_length, prefill
from kvjax.methods import resolve
from kvjax.parallel import mesh
from kvjax.policies.base import Recipe
from kvjax.policies.budgets.profile import METHOD, TEXTS, check_measure
from kvjax.spec import Lengths, ProfileSpec, readable

LEVELS = (0.05, 0.1, 0.2, 0.3, 0.5)
LEAST = 128  # tokens of a text


def calibrate(
    model: Model,
    method: str | None = None,
    texts: Sequence[Sequence[int]] | None = None,
    counted: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> ProfileSpec:
    """See `Model.calibrate`; `counted` shows how far it is."""
    texts = sample(model) if texts is None else texts
    name = METHOD if method is None else method
    recipes = [resolve(model.spec, name, f"{100 * level:g}%") for level in LEVELS]
    for recipe in recipes:
        check_measure(name, recipe.budget)
    rounds = [(recipe, text) for recipe in recipes for text in texts]
    found = np.stack([kept(model, recipe, text) for recipe, text in counted(rounds)])
    shares = found.reshape(len(recipes), len(texts), *found.shape[1:]).mean(axis=1)
    return ProfileSpec(LEVELS, tuple(tuple(map(tuple, level)) for level in shares.tolist()))


def sample(model: Model, text: str | None = None) -> list[list[int]]:
    """Texts of up to 1,024 tokens: parts of one; None = documentation and generated sentences, no task's."""
    if model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer.json to calibrate on a text")
    text = sources.haystack("training") if text is None else text
    parts = calibration.cut(text, model.tokenizer, model.spec.max_position)[:TEXTS].tolist()
    if len(parts[0]) < LEAST:
        raise InputError(f"the text has {len(parts[0])} tokens: shares are measured on at least {LEAST}")
    return parts


def kept(model: Model, recipe: Recipe, text: Sequence[int]) -> Float[np.ndarray, "L K"]:
    """The share of what can be read of a text that each row keeps."""
    lengths = Lengths((len(text),), new=1, padded=padded_length(len(text)))
    tokens = np.zeros((1, lengths.padded), np.int32)
    tokens[0, : len(text)] = text
    with mesh.on(model.mesh):
        cache = init_cache(model.decoder, recipe, lengths)
        _, cache = prefill(model.decoder, recipe, jnp.asarray(tokens), jnp.asarray(lengths.prompt, jnp.int32), cache)
        found = np.zeros((model.spec.num_layers, model.spec.num_rows))
        for group, (tier, *_) in zip(layer_groups(model.spec), cache, strict=True):
            found[list(group.index)] = mesh.read(layout.held(tier))[:, 0] / readable(len(text), group.window)
    return found
