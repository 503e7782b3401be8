"""Teacher forcing: how a model with a compressed cache judges a given continuation.

A prompt is compressed at prefill; its continuation is read token by token through the cache, as if it had been
generated. The distribution of the first token comes from prefill's exact attention, all others from the cache.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from kvjax.errors import InputError
from kvjax.generation.accounting import footprint
from kvjax.generation.checks import check_texts
from kvjax.generation.decode import Measure
from kvjax.generation.generate import even, fed_length, read_continuations, read_prompts
from kvjax.generation.model import Model, Texts, encode_continuation, encode_prompt, not_finite
from kvjax.generation.results import Footprint, Judgement
from kvjax.methods import full
from kvjax.models.decoder import Decoder
from kvjax.parallel import mesh
from kvjax.policies.base import Recipe
from kvjax.spec import PyTree


def log_likelihood(
    model: Model,
    prompts: Texts,
    continuations: Texts,
    recipe: Recipe,
) -> tuple[list[Judgement], Footprint]:
    """`Model.log_likelihood` with everything said."""
    ids, after = _ids(model, recipe, prompts, continuations, unread=1)
    fed = [text[:-1] for text in after]
    targets = np.zeros((fed_length(fed), len(ids)), np.int32)
    for column, text in enumerate(after):
        targets[: len(text) - 1, column] = text[1:]
    first, rest, reading = _read(model, recipe, ids, fed, targets, _judge)
    start = _judge_first(first, jnp.asarray([text[0] for text in after], jnp.int32))
    judged = []
    for i, text in enumerate(fed):
        logprobs, likeliest = (np.append(a[i], b[: len(text), i]) for a, b in zip(start, rest, strict=True))
        _check_finite(model, i, logprobs)
        judged.append(Judgement(logprobs, bool(likeliest.all())))
    return judged, reading


def references(
    model: Model,
    prompts: Texts,
    continuations: Texts,
) -> np.ndarray:
    """`Model.references`."""
    ids, after = _ids(model, full(), prompts, continuations)
    outputs = _read(model, full(), ids, after, (), _output)[1]
    for i, text in enumerate(after):
        _check_finite(model, i, outputs[: len(text), i])
    return outputs


def divergence(
    model: Model,
    prompts: Texts,
    continuations: Texts,
    recipe: Recipe,
    reference: np.ndarray,
    source: Decoder,
) -> tuple[list[np.ndarray], Footprint]:
    """`Model.divergence` with everything said."""
    ids, after = _ids(model, recipe, prompts, continuations)
    _, outputs, reading = _read(model, recipe, ids, after, (), _output)
    size = len(even(model, ids, after)[0])
    place = lambda x, decoder: _place(model, np.asarray(x, decoder.dtype), size)
    pairs = place(reference, source), place(outputs, model.decoder)
    values = mesh.read(_diverge(source, model.decoder, *pairs))
    found = [values[: len(text), i] for i, text in enumerate(after)]
    for i, each in enumerate(found):
        _check_finite(model, i, each)
    return found, reading


def _check_finite(model: Model, i: int, values: np.ndarray) -> None:
    """Raise `InputError` where a sequence's logits were not finite."""
    if not np.isfinite(values).all():
        raise not_finite(model, i)


def _ids(
    model: Model,
    recipe: Recipe,
    prompts: Texts,
    continuations: Texts,
    unread: int = 0,
) -> tuple[list[list[int]], list[list[int]]]:
    ids = [encode_prompt(model, prompt) for prompt in prompts]
    after = [encode_continuation(model, text) for text in continuations]
    check_texts(model.spec, recipe, ids, after, unread=unread)
    if not all(after):
        raise InputError("a continuation is empty")
    return ids, after


def _read(
    model: Model, recipe: Recipe, ids: list[list[int]], after: list[list[int]], given: PyTree, measure: Measure
) -> tuple[Array, PyTree, Footprint]:
    """Prefill, then feed; logits after the prompts, what was measured `[Q B ...]`, and what it cost."""
    lengths = [len(prompt) + len(text) for prompt, text in zip(ids, after, strict=True)]
    ids, after = even(model, ids, after)
    logits, cache = read_prompts(model, recipe, ids, max(map(len, after)))
    given = jax.tree.map(lambda x: _place(model, x, len(ids)), given)
    _, cache, measured = read_continuations(model, recipe, logits, cache, ids, after, given, measure)
    held = footprint(model, cache, lengths)
    held = held._replace(slots=held.slots[: len(lengths)])
    measured = jax.tree.map(lambda x: mesh.read(x)[:, : len(lengths)], measured)
    return jnp.asarray(mesh.read(logits)[: len(lengths)]), measured, held


def _place(model: Model, x: np.ndarray, batch: int) -> Array:
    """What is given for each step `[Q B ...]`, with zeros for sequences that were added."""
    padded = np.pad(x, [(0, 0), (0, batch - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])
    return mesh.place(model.mesh, mesh.STEPS, padded)


def _output(model: Decoder, x: Float[Array, "B D"], given: PyTree) -> Float[Array, "B D"]:
    return x


def _judge(
    model: Decoder, x: Float[Array, "B D"], target: Int[Array, " B"]
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    return _judge_first(model.logits(x), target)


@jax.jit
def _judge_first(logits: Float[Array, "B V"], target: Int[Array, " B"]) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """Log-probability of a token, and whether it is the most likely one; NaN where any logit is not finite."""
    logprob = jnp.take_along_axis(_log_softmax(logits), target[:, None], axis=-1)[:, 0]
    return logprob, logits.argmax(axis=-1) == target


@mesh.program((mesh.weights, mesh.weights, mesh.STEPS, mesh.STEPS), lambda *_: mesh.STEPS)
def _diverge(
    source: Decoder, model: Decoder, reference: Float[Array, "Q B D"], outputs: Float[Array, "Q B D"]
) -> Float[Array, "Q B"]:
    """KL divergence of what a model's norm and head make of its outputs from what the source's make of its own."""

    def step(pair: tuple[Float[Array, "B D"], Float[Array, "B D"]]) -> Float[Array, " B"]:
        p, q = (_log_softmax(each.logits(x)) for each, x in zip((source, model), pair, strict=True))
        return jnp.sum(jnp.exp(p) * (p - q), axis=-1)

    return jax.lax.map(step, (reference, outputs))


def _log_softmax(logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    finite = jnp.isfinite(logits).all(axis=-1, keepdims=True)
    return jnp.where(finite, jax.nn.log_softmax(logits), jnp.nan)
