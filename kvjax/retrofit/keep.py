"""Train the gates of Fast KVzip (`kvjax.models.keep`): the model is frozen, and reads each text once.

    s = KVzip+'s score of a token: what the text needs of it when it is read again
    target = s / (s + threshold)          in 0 to 1, in the order of s; 1/2 where a share of all tokens would be kept
    loss = cross-entropy of the gate's score against the target, summed over heads

Source: Fast KVzip (arXiv 2601.17668), Janghyun1230/FastKVzip `prefill/optim.py`; KVzap (arXiv 2601.07891) for KVzip+.
Differs: targets are KVzip+'s, about the threshold that a budget would have, where the paper has KVzip's as they are;
  Adam instead of SGD with momentum; the offset counts once.
"""

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from kvjax.cache.layout import Tiers, layer_groups, locate
from kvjax.checkpoint import hf, keep_gate
from kvjax.checkpoint.identity import fingerprint
from kvjax.corpus import sources
from kvjax.errors import InputError
from kvjax.generation import prefill
from kvjax.generation.model import Model, load_from
from kvjax.models.decoder import Layer, normed
from kvjax.models.keep import KeepGate, gated
from kvjax.policies import score
from kvjax.policies.base import CachePolicy, PrefillOutput, Recipe
from kvjax.retrofit import data
from kvjax.retrofit.options import KeepOptions
from kvjax.spec import Prompt

Gates = dict[str, Array]  # of all layers, as in `kvjax.checkpoint.keep_gate`
CHUNK, FIRST = 2048, 4  # tokens that are read again together; those that are in every softmax, and always kept
LETTERS = 8  # of a token, more than any of prose has on average
SHARE = 0.2  # of the tokens that are above the threshold
HELD_OUT = 8  # one text of so many


class Examples(NamedTuple):
    """What gates read of texts, and what the texts need of it; L are the layers that have a gate."""

    x: Float[np.ndarray, "L n D"]  # float16
    need: Float[np.ndarray, "L n K"]  # KVzip+'s score


class Learned(NamedTuple):
    """How far a training is."""

    step: int
    loss: float  # mean over the steps since the last one [nats per token and row]
    agreement: float  # of the best tokens of texts that were held out, how many the gates name, too


def train(
    options: KeepOptions, out: Path, show: Callable[[Learned], None], reading: Callable[[Any], Any] = iter
) -> Learned:
    """Train the gates of a model and write them to the file `out`.

    Args:
      options: how.
      out: the file: see `kvjax.checkpoint.keep_gate`.
      show: called every few steps.
      reading: shows how many of the texts have been read.
    """
    model, directory = load_from(options.model, dtype=jnp.float32, ignore_config=options.ignore)
    rows = texts(model, options)
    read = [examples(model, row) for row in reading(rows)]
    kept_out = max(1, len(read) // HELD_OUT)
    joined = lambda parts: Examples(*(np.concatenate(x, axis=1) for x in zip(*parts, strict=True)))
    gates, last = fit(model, joined(read[kept_out:]), joined(read[:kept_out]), options, show)
    about = {"model": fingerprint(directory), "texts": len(rows), "length": options.length, "steps": options.steps}
    keep_gate.write(out, {name: np.asarray(x) for name, x in gates.items()}, about)
    return last


def texts(model: Model, options: KeepOptions) -> Int[np.ndarray, "n T"]:
    """Texts of equal lengths from all over the data, drawn without replacement."""
    spec = model.spec
    if 2 * options.length > spec.max_position:
        raise InputError(f"--length {options.length}: read twice it passes the context limit ({spec.max_position})")
    if not options.files and model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer.json: give --data with tokens")
    files, length = options.files, options.length
    given: Any = data.read(files, model, length).tokens if files else sources.haystack("training")
    each = length if files else length * LETTERS
    there = len(given) // each
    if there < options.texts:
        raise InputError(f"the data has {there} texts of {options.length} tokens, less than --texts {options.texts}")
    drawn = np.random.default_rng(options.seed).permutation(there)[: options.texts]
    parts = [given[each * i : each * (i + 1)] for i in drawn]
    if not files and model.tokenizer is not None:
        parts = [model.tokenizer.encode(part)[:length] for part in parts]
    return np.asarray(parts, np.int32)


def examples(model: Model, text: Int[np.ndarray, " T"]) -> Examples:
    """What all gates read of a text, but for its first tokens, and what KVzip+ says of it."""
    t, spec = len(text), model.spec
    tokens = np.zeros((1, prefill.padded_length(t)), np.int32)
    tokens[0, :t] = text
    found = [(x[0, FIRST:t], need[0, :, FIRST:t].T) for x, need in _read(model, jnp.asarray(tokens), t)]
    x, need = (np.stack(part) for part in zip(*(found[i] for i in gated(spec)), strict=True))
    return Examples(x.astype(np.float16), need)


def _read(model: Model, tokens: Int[Array, "1 T"], t: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each layer: what its projections read `[1 T D]`, and KVzip+'s score `[1 K T]`."""
    spec, recipe, groups = model.spec, _replay(), layer_groups(model.spec)
    x, again, length = prefill._embed(model.decoder, tokens), prefill._embed(model.decoder, tokens), jnp.asarray([t])
    zero = jnp.asarray(0, jnp.int32)
    for index, layer in enumerate(model.decoder.layers):
        group = groups[locate(groups, index)[0]]
        read = np.asarray(_normed(layer, x))
        x, _, found, again = prefill._prefill_layer(
            layer, x, (), length, zero, zero, again,
            spec=spec, recipe=recipe, peers=group.peers, window=group.window, rotary=spec.rotary(index), chunk=t,
        )  # fmt: skip
        yield read, np.asarray(found.stats)


@jax.jit
def _normed(layer: Layer, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
    return normed(x, layer.attention_norm)


@functools.cache
def _replay() -> Recipe:
    """What reads prompts for their scores and keeps nothing."""
    rated = score.replayed(0, FIRST, weighted=True).prompt
    assert rated is not None

    def observed(tiers: Tiers, prompt: Prompt) -> tuple[Tiers, PrefillOutput]:
        return tiers, PrefillOutput(stats=rated(prompt))

    policy = CachePolicy((), lambda *_: (), observed, lambda tiers, _: tiers)
    return Recipe("replay", policy, replay=CHUNK)


def fit(
    model: Model, given: Examples, held_out: Examples, options: KeepOptions, show: Callable[[Learned], None]
) -> tuple[Gates, Learned]:
    """Gates that foretell what texts need of their tokens, from random ones."""
    like, tree = hf.by_path(nnx.eval_shape(lambda: KeepGate(model.spec, nnx.Rngs(0))))
    drawn = [hf.by_path(KeepGate(model.spec, nnx.Rngs(options.seed + i)))[0] for i in range(len(given.x))]
    gates = {name: jnp.stack([one[name] for one in drawn]) for name in like}
    optimize = optax.adam(1.0)
    state = optimize.init(gates)
    threshold = float(np.quantile(given.need, 1 - SHARE))

    @jax.jit
    def scores(gates: Gates, x: Float[Array, "L n D"]) -> Float[Array, "L n K"]:
        one = lambda own, x: jax.tree.unflatten(tree, [own[name] for name in like])(x)
        return jax.vmap(one)(gates, x.astype(jnp.float32))

    def loss(gates: Gates, x: Float[Array, "L n D"], need: Float[Array, "L n K"]) -> Float[Array, ""]:
        target, p = need / (need + threshold), jnp.clip(scores(gates, x), 1e-6, 1 - 1e-6)
        return -(target * jnp.log(p) + (1 - target) * jnp.log(1 - p)).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(gates: Gates, state: Any, x: Array, need: Array, rate: Array) -> tuple[Gates, Any, Array]:
        value, slope = jax.value_and_grad(loss)(gates, x, need)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            changes, state = optimize.update(slope, state, gates)
        return jax.tree.map(lambda old, change: old + rate * change, gates, changes), state, value

    rng, values, last = np.random.default_rng(options.seed), [], Learned(0, 0.0, 0.0)
    for step in range(1, options.steps + 1):
        some = np.sort(rng.integers(given.x.shape[1], size=options.batch))
        rate = np.float32(learning_rate(options, step))
        gates, state, value = update(gates, state, given.x[:, some], given.need[:, some], rate)
        values.append(value)
        if step % options.log_every == 0 or step == options.steps:
            guessed = np.asarray(scores(gates, held_out.x))
            last, values = Learned(step, float(np.mean(values)), agreement(guessed, held_out.need)), []
            show(last)
    return gates, last


def learning_rate(options: KeepOptions, step: int) -> float:
    """That of a step, from 1 on: it rises in the first twentieth, and falls along a cosine."""
    risen = min(1.0, step / max(options.steps // 20, 1))
    return options.learning_rate * risen * (1 + math.cos(math.pi * step / options.steps)) / 2


def agreement(guessed: Float[np.ndarray, "L n K"], need: Float[np.ndarray, "L n K"]) -> float:
    """Of the share of tokens that are needed most, over all layers and heads, how many are among those guessed."""
    best = [x > np.quantile(x, 1 - SHARE) for x in (guessed, need)]
    return float((best[0] & best[1]).sum() / best[1].sum())
