"""The shipped demo model, its lines and its tokenizer."""

import functools
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvjax
from kvjax.checkpoint import shipped
from kvjax.corpus import tokens
from kvjax.evaluation import runner
from kvjax.models.tokenizer import Tokenizer
from kvjax.policies import score
from kvjax.policies.base import Recipe
from kvjax.policies.budgets import budget as budgets
from kvjax.policies.select import retain
from kvjax.spec import Prompt
from kvjax.tasks import lines, vocabulary
from kvjax.tasks.registry import make_task

pytestmark = pytest.mark.usefixtures("optimized")  # long prompts: running takes more time than compiling
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = Tokenizer.load(shipped.directory())
    assert found is not None
    return found


def test_shipped_tokenizer_is_the_built_one(tokenizer: Tokenizer) -> None:
    found = json.loads((shipped.directory() / "tokenizer.json").read_text("utf-8"))
    assert found == json.loads(tokens.tokenizer().to_str())
    assert len(tokenizer) == tokens.SIZE


@given(text=st.text())
@settings(deadline=None)
def test_any_text_survives(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids[0] == vocabulary.BOS
    assert vocabulary.EOS not in ids
    assert tokenizer.decode(ids) == text


@given(seed=SEEDS, tokens=st.integers(48, 2048), questions=st.integers(1, 8))
@settings(deadline=None, max_examples=30)
def test_prompt_fits_and_holds_its_answer(tokenizer: Tokenizer, seed: int, tokens: int, questions: int) -> None:
    prompt, answer = lines.prompt(lines.scoring_rng(seed), tokens, questions)
    used = len(tokenizer.encode(prompt))
    assert used <= tokens
    assert used > tokens - lines.LINE or prompt.count("\n") == vocabulary.NUM_KEYS + questions - 1
    mark, key = prompt.splitlines()[-1].split()
    assert mark == "!"
    assert f"{key}{answer}" in prompt.splitlines()
    assert len(tokenizer.encode(prompt + answer)) == used + lines.ANSWER_TOKENS
    assert prompt.count("? ") == questions - 1


def test_a_document_needs_room() -> None:
    with pytest.raises(ValueError, match="too few"):
        lines.prompt(lines.scoring_rng(0), 10, 4)


@pytest.fixture(scope="module")
def model() -> kvjax.Model:
    return kvjax.load()


@functools.cache
def exact(model: kvjax.Model, length: int, samples: int, recipe=None, name: str = "lines") -> float:
    """Share of the questions of `kvjax.evaluate --tasks NAME` that are answered."""
    task = make_task(name)
    drawn = task.samples(runner.request(model, samples=samples, lengths=(length,), form="short"))
    texts = [sample.context + sample.question for sample in drawn]
    out = model.generate(texts, recipe, max_new_tokens=max(sample.new for sample in drawn))
    return float(np.mean([task.metric(s.text, sample) for s, sample in zip(out.sequences, drawn, strict=True)]))


def test_shipped_model_finds_lines(model: kvjax.Model) -> None:
    assert model.spec.group_size > 1 and model.spec.max_position == 4096
    assert exact(model, length=1024, samples=16) >= 0.97


@pytest.mark.parametrize("name", ["needle", "passkey", "niah_multikey", "variable_tracking"])
def test_shipped_model_finds_what_is_hidden_in_text(model: kvjax.Model, name: str) -> None:
    assert exact(model, length=1024, samples=16, name=name) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lines", "needle", "passkey"])
def test_shipped_model_looks_up_over_its_whole_context(model: kvjax.Model, name: str) -> None:
    assert exact(model, length=4096, samples=40, name=name) >= 0.95


def test_shipped_model_ends_its_answer(model: kvjax.Model) -> None:
    prompt, answer = lines.prompt(lines.scoring_rng(2), 200)
    given = model.generate([prompt]).sequences[0]
    assert given.text == answer + "\n"
    assert given.finish_reason == "stop"


def test_a_cache_without_the_line_does_not_answer(model: kvjax.Model) -> None:
    recipe = kvjax.methods.streaming_llm(budget="10%")
    assert exact(model, length=256, samples=32, recipe=recipe) < 0.5


def test_without_half_of_its_cache_the_shipped_model_forgets(model: kvjax.Model) -> None:
    """At least 30 points on lines: what is kept of the prompt is drawn by lot."""
    keep, amounts = budgets.uniform(), budgets.amounts("50%")
    lot = score.recency(0)._replace(prompt=lambda prompt: jax.random.uniform(jax.random.key(0), scores_of(prompt)))
    forgetful = Recipe("lot", retain(lot, keep, evict="before"), amounts=amounts)
    assert exact(model, length=1024, samples=16, recipe=forgetful) <= exact(model, length=1024, samples=16) - 0.3


def test_the_shipped_retrofitted_model_answers_from_a_third_of_the_bytes() -> None:
    retrofitted = kvjax.load("demo-dmc")
    assert retrofitted.spec.gate is not None and 3.8 < retrofitted.spec.gate.rate < 4.5
    assert exact(retrofitted, length=1024, samples=16, recipe=kvjax.methods.dmc()) >= 0.85
    prompt, answer = lines.prompt(lines.scoring_rng(4), 250)
    out = retrofitted.generate([prompt])
    assert out.sequences[0].text == answer + "\n"
    assert out.recipe.name == "dmc" and out.bytes.total < 0.5 * out.full_bytes
    files = [file for file in (shipped.directory() / "dmc").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 16e6


def scores_of(prompt: Prompt) -> tuple[int, int, int]:
    """The shape of a score: sequences, key/value heads, tokens."""
    return prompt.key.shape[0], prompt.key.shape[2], prompt.key.shape[1]


def test_shipped_files_are_small_and_complete() -> None:
    files = [file for file in shipped.directory().iterdir() if file.is_file()]
    names = {file.name for file in files}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names >= {"generation_config.json", "README.md"}
    assert sum(file.stat().st_size for file in files) <= 16e6
