"""Samples of one prompt, and log-probabilities of tokens."""

import numpy as np
import pytest

from kvjax.errors import InputError
from kvjax.generation.sampling import Sampling
from tests.lib.matrix import VARIANTS, model_of, quick, reference, text
from tests.test_context import APPENDING, model, recipe, tokens

TEXT, OTHER = text(40, 0), text(7, 9)
DRAWN = Sampling(temperature=2.0, top_k=50, repetition_penalty=1.2, seed=11)


@pytest.mark.parametrize("method", quick(VARIANTS, ("full", "h2o", "adakv", "mikv", "dmc")))
def test_samples_are_questions_that_are_empty(method):
    """Each with a seed of its own; methods that only append draw what `generate` draws with it."""
    own, how = model(model_of(method)), recipe(method)
    out = own.generate([TEXT], how, n=3, max_new_tokens=6, sampling=DRAWN)
    context = own.read(TEXT, how)
    for i, drawn in enumerate(tokens(out)):
        seeded = DRAWN._replace(seed=DRAWN.seed + i)
        assert tokens(context.ask([[]], max_new_tokens=6, sampling=seeded)) == [drawn]
        if method in APPENDING:
            assert tokens(own.generate([TEXT], how, max_new_tokens=6, sampling=seeded)) == [drawn]
    assert len({*map(tuple, tokens(out))}) > 1


def test_samples_of_several_questions():
    context = model("gqa").read(TEXT)
    out = context.ask([[1], [2, 3]], n=2, max_new_tokens=4, sampling=DRAWN)
    assert tokens(out) == tokens(context.ask([[1], [1], [2, 3], [2, 3]], max_new_tokens=4, sampling=DRAWN))
    same = model("gqa").generate([TEXT], questions=[[2, 3]], n=2, max_new_tokens=4, sampling=DRAWN)
    assert [s.prompt_tokens for s in same.sequences] == [42, 42]


def test_log_probabilities_are_those_of_the_text():
    """By a softmax over the logits of a forward pass, whatever is done to choose a token."""
    own = model("gqa")
    out = own.generate([TEXT, OTHER], max_new_tokens=20, sampling=DRAWN, logprobs=3)
    assert tokens(out) == tokens(own.generate([TEXT, OTHER], max_new_tokens=20, sampling=DRAWN))
    for prompt, sequence in zip((TEXT, OTHER), out.sequences, strict=True):
        logits = np.asarray(reference(own.decoder, prompt + sequence.tokens), np.float64)
        logits = logits[len(prompt) - 1 : len(prompt) + len(sequence.tokens) - 1]
        wanted = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        best = np.argsort(-wanted, axis=-1)[:, :3]
        found = sequence.logprobs
        np.testing.assert_allclose(found.chosen, wanted[np.arange(20), sequence.tokens], atol=1e-3)
        np.testing.assert_allclose(found.top, np.take_along_axis(wanted, best, -1), atol=1e-3)
        assert np.array_equal(found.ids, best)


def test_log_probabilities_through_a_compressed_cache():
    """Those that `log_likelihood` gives; contexts and questions have them, and other numbers compile nothing."""
    own = model("gqa")
    out = own.generate([TEXT], "h2o", 16, max_new_tokens=20, logprobs=0)
    said = out.sequences[0].logprobs
    judged, _ = own.log_likelihood([TEXT], tokens(out), "h2o", 16)
    np.testing.assert_allclose(said.chosen, judged[0].logprobs, atol=1e-4)
    assert said.ids.shape == said.top.shape == (20, 0)
    more = own.generate([TEXT], "h2o", 16, max_new_tokens=20, logprobs=8)
    assert more.timing.compile_s == 0
    np.testing.assert_allclose(more.sequences[0].logprobs.top[:, 0], said.chosen, atol=1e-5)  # greedy
    grown, _ = own.read(TEXT, "h2o", 16).generate(max_new_tokens=20, logprobs=2)
    np.testing.assert_allclose(grown.sequences[0].logprobs.chosen, said.chosen, atol=1e-4)
    asked = own.read(TEXT).ask([[]], max_new_tokens=4, logprobs=2)
    full = own.generate([TEXT], max_new_tokens=4, logprobs=2)
    np.testing.assert_allclose(asked.sequences[0].logprobs.top, full.sequences[0].logprobs.top, atol=1e-4)


def test_what_cannot_be_sampled(capsys):
    own = model("gqa")
    for how, message in (
        ({"logprobs": -1}, "logprobs -1 is not"),
        ({"logprobs": 98}, "the vocabulary's 97"),
        ({"logprobs": True}, "logprobs True"),
        ({"n": 0}, "n 0 is not"),
    ):
        with pytest.raises(InputError, match=message):
            own.generate([TEXT], **how)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="n 2 is of one prompt"):
        own.generate([TEXT, OTHER], n=2)
    own.generate([TEXT], n=2, max_new_tokens=1)
    assert "all samples are alike" in capsys.readouterr().err
