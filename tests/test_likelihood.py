"""Questions after a compressed prompt, and teacher forcing, against steps by hand and a pass without cache."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy  # its parts are imported as they are used

import kvjax
from kvjax import METHODS, methods
from kvjax.errors import InputError
from kvjax.generation.model import Model
from tests.lib import oracle
from tests.lib.matrix import (
    BATCH,
    BUDGET,
    MODELS,
    assert_close,
    decoder,
    every_method,
    model_of,
    recipe_of,
    reference,
    text,
)

AFTER = (text(5, 2), text(3, 3), text(1, 4))  # what follows each prompt
LONGEST = 5
_slow = lambda model, method: (
    model in ("mqa", "windowed", "demo", "gated-dms")
    or (model, method) == ("gated", "h2o")
    or method in ("pyramidkv", "adakv", "tova", "oracle", "streaming_llm", "snapkv", "d2o")
)
CASES = [
    pytest.param(model, method, marks=[pytest.mark.slow] if _slow(model, method) else [])
    for model, method in [(model_of(name), name) for name in METHODS]
    + [(name, "h2o") for name in MODELS if name not in ("gqa", "gated-dms")]
]
every_case = pytest.mark.parametrize(("model", "method"), CASES)


def wrapped(name: str) -> Model:
    return Model(decoder(name), None, (), name)


def by_hand(name: str, method: str) -> np.ndarray:
    """Logits `[LONGEST + 1, B, V]`, one `decode_step` after the other; rows are given more tokens than they need."""
    teacher = np.zeros((len(BATCH), LONGEST), np.int32)
    for row, tokens in zip(teacher, AFTER, strict=True):
        row[: len(tokens)] = tokens
    return oracle.run(decoder(name), recipe_of(method, BUDGET), BATCH, teacher)[0]


@every_case
def test_a_question_is_read_through_the_compressed_cache(model, method):
    out = wrapped(model).generate(BATCH, recipe_of(method, BUDGET), questions=[*AFTER[:2], []], max_new_tokens=2)
    steps = by_hand(model, method)
    expected = np.stack([steps[5, 0], steps[3, 1], steps[0, 2]])
    assert_close(out.logits, expected, 0.02 if model.endswith("bf16") else 1e-4)
    assert [s.prompt_tokens for s in out.sequences] == [45, 33, 24]
    assert [s.tokens[0] for s in out.sequences] == expected.argmax(axis=-1).tolist()


@every_case
def test_log_likelihood_is_that_of_the_steps(model, method):
    judged, _ = wrapped(model).log_likelihood(BATCH, AFTER, recipe_of(method, BUDGET))
    steps = scipy.special.log_softmax(by_hand(model, method).astype(np.float64), axis=-1)
    for i, (judgement, tokens) in enumerate(zip(judged, AFTER, strict=True)):
        expected = [steps[t, i, token] for t, token in enumerate(tokens)]
        np.testing.assert_allclose(judgement.logprobs, expected, atol=0.05 if model.endswith("bf16") else 1e-3)


@every_method
def test_divergence_is_scipys(method):
    model = model_of(method)
    reference = wrapped(model).references(BATCH, AFTER)
    values, _ = wrapped(model).divergence(BATCH, AFTER, recipe_of(method, BUDGET), reference=reference)
    ours, full = (scipy.special.softmax(by_hand(model, m).astype(np.float64), axis=-1) for m in (method, "full"))
    for i, tokens in enumerate(AFTER):
        expected = scipy.stats.entropy(full[1 : len(tokens) + 1, i], ours[1 : len(tokens) + 1, i], axis=-1)
        np.testing.assert_allclose(values[i], expected, atol=1e-4, rtol=1e-3)


def test_the_full_caches_likelihood_is_the_forward_pass_without_cache():
    judged, reading = wrapped("gqa").log_likelihood(BATCH, AFTER)
    for judgement, prompt, tokens in zip(judged, BATCH, AFTER, strict=True):
        logits = scipy.special.log_softmax(reference(decoder("gqa"), prompt + tokens), axis=-1)
        expected = logits[np.arange(len(prompt) - 1, len(prompt) + len(tokens) - 1), tokens]
        np.testing.assert_allclose(judgement.logprobs, expected, atol=1e-4)
    assert reading.full_bytes == 2 * 2 * 2 * decoder("gqa").spec.head_dim * 4 * (
        sum(map(len, BATCH + AFTER)) - 3
    )  # the last is not read


def test_greedy_says_whether_every_token_is_the_likeliest():
    model = wrapped("gqa")
    greedy = [s.tokens for s in model.generate(BATCH, max_new_tokens=4).sequences]
    other = [[*tokens[:3], (tokens[3] + 1) % 97] for tokens in greedy]
    assert [j.greedy for j in model.log_likelihood(BATCH, greedy)[0]] == [True] * 3
    assert [j.greedy for j in model.log_likelihood(BATCH, other)[0]] == [False] * 3
    assert [j.greedy for j in model.log_likelihood(BATCH, [t[:1] for t in greedy])[0]] == [True] * 3


def test_the_full_cache_does_not_diverge_from_itself():
    model = wrapped("gqa")
    reference = model.references(BATCH, AFTER)
    values, _ = model.divergence(BATCH, AFTER, methods.full(), reference=reference)
    assert np.abs(np.concatenate(values)).max() == 0


def test_a_question_as_text_follows_without_special_tokens():
    model = kvjax.load(dtype=jnp.float32)
    whole = model.generate(["acorn: 217 130\n! acorn:"], max_new_tokens=2)
    split = model.generate(["acorn: 217 130\n"], questions=["! acorn:"], max_new_tokens=2)
    assert split.sequences == whole.sequences
    assert split.full_bytes == whole.full_bytes


@pytest.mark.parametrize(
    "prompts, after, message",
    [
        ([[1, 2]], [[1], [2]], "2 texts follow 1 prompts"),
        ([[1, 2]], [[97]], "token id 97 is not in the vocabulary"),
        ([[1] * 100], [[1] * 29], "has 129 tokens, the context limit is 128"),
        ([[1, 2]], [[]], "a continuation is empty"),
        ([[]], [[1]], "the prompt is empty"),
    ],
)
def test_what_cannot_be_read(prompts, after, message):
    with pytest.raises(InputError, match=message):
        wrapped("gqa").log_likelihood(prompts, after)


def test_a_question_counts_against_the_context_limit():
    with pytest.raises(
        InputError, match=r"prompt \(120 tokens\) and max-new-tokens \(9\) pass the context limit \(128\)"
    ):
        wrapped("gqa").generate([[1] * 100], questions=[[1] * 20], max_new_tokens=9)
