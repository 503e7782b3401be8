"""The demo model: its text, its tokenizer, its training and the shipped checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import kvjax
from kvjax import demo
from kvjax.checkpoint import hf
from kvjax.demo import export, lines, train, vocabulary
from kvjax.evaluation import runner
from kvjax.evaluation.tasks import make_task
from kvjax.tokenizer import Tokenizer

SEEDS = st.integers(0, 2**32 - 1)
TINY = ["--layers", "2", "--width", "64", "--steps", "30", "--tokens-per-batch", "128", "--max-length", "32"]
TINY += ["--checkpoint-every", "3", "--log-every", "1"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = Tokenizer.load(demo.directory())
    assert found is not None
    return found


def test_shipped_tokenizer_is_the_built_one(tokenizer: Tokenizer) -> None:
    shipped = json.loads((demo.directory() / "tokenizer.json").read_text("utf-8"))
    assert shipped == json.loads(vocabulary.tokenizer().to_str())
    assert len(tokenizer) == vocabulary.SIZE <= 1200


@given(text=st.text())
@settings(deadline=None)
def test_any_text_survives(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids[0] == vocabulary.BOS
    assert vocabulary.EOS not in ids
    assert tokenizer.decode(ids) == text


@given(seed=SEEDS, count=st.integers(1, vocabulary.NUM_KEYS), questions=st.integers(1, 20))
@settings(deadline=None, max_examples=30)
def test_ids_are_the_tokens_of_the_text(tokenizer: Tokenizer, seed: int, count: int, questions: int) -> None:
    doc = lines.draw(lines.scoring_rng(seed), count, questions)
    ids = lines.ids(doc).tolist()
    assert [*tokenizer.encode(lines.text(doc)), vocabulary.EOS] == ids
    assert tokenizer.decode(ids) == lines.text(doc)
    asked = np.array(ids)[lines.weights(doc) == lines.ANSWER]
    assert [tokenizer.decode(both) for both in asked.reshape(-1, 2).tolist()] == lines.answers(doc)


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


def test_document_fits(tokenizer: Tokenizer) -> None:
    text, answers = lines.document(lines.scoring_rng(0), 100, 4)
    assert 100 - lines.LINE < len(tokenizer.encode(text)) + 1 <= 100
    assert len(answers) == 4
    with pytest.raises(ValueError, match="too few"):
        lines.document(lines.scoring_rng(0), 10, 4)


def test_data_is_a_function_of_seed_and_step() -> None:
    first, weight = lines.batch(lines.training_rng(3, 5), 4, 64)
    again, _ = lines.batch(lines.training_rng(3, 5), 4, 64)
    assert first.shape == weight.shape == (4, 65)
    np.testing.assert_array_equal(first, again)
    for other in (lines.training_rng(3, 6), lines.training_rng(4, 5), lines.scoring_rng(3, 5)):
        assert not np.array_equal(first, lines.batch(other, 4, 64)[0])
    assert ((first == vocabulary.LAST).sum(axis=1) == 1).all()
    assert (first[:, -1] == vocabulary.EOS).all() and (first[:, 0] == vocabulary.BOS).all()


def test_curriculum_covers_every_step() -> None:
    args = train.parse(["--out", "unused", "--steps", "100"])
    shapes = [train.shape(args, step) for step in range(100)]
    assert shapes[0][2] < 1.0 == shapes[-1][2]
    assert max(length for _, length, _ in shapes[-20:]) == 1024
    assert all(rows * length == args.tokens_per_batch for rows, length, _ in shapes)


def _command(out: Path) -> list[str]:
    return [sys.executable, "-m", "kvjax.demo.train", "--out", str(out), *TINY]


def _logged(out: Path) -> list[dict]:
    file = out / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_killed_training_resumes_to_the_same_weights(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(_command(killed), env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(_logged(killed)) < 7:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    assert not (killed / "hf").exists()
    subprocess.run(_command(killed), env=environment, check=True, capture_output=True)
    train.main(["--out", str(whole), *TINY])
    steady = [[{k: v for k, v in entry.items() if k != "seconds"} for entry in _logged(out)] for out in (killed, whole)]
    assert steady[0] == steady[1]
    assert [entry["step"] for entry in steady[0]] == [*range(1, 31)]
    got, expected = (load_file(out / "hf" / "model.safetensors") for out in (killed, whole))
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(got[name], tensor, err_msg=name)
    reread = export.tensors(hf.load(whole / "hf", jnp.float32))
    assert all(np.array_equal(reread[name], tensor) for name, tensor in expected.items())


@pytest.fixture(scope="module")
def model() -> kvjax.Model:
    return kvjax.load()


def exact(model: kvjax.Model, tokens: int, samples: int, recipe=None) -> float:
    """Share of the questions of `kvjax.evaluate --tasks lines` that are answered."""
    task = make_task("lines")
    drawn = task.samples(runner.request(model, samples=samples, lengths=(tokens,), form="short"))
    texts = [sample.context + sample.question for sample in drawn]
    out = kvjax.generate(model, texts, recipe, max_new_tokens=lines.ANSWER_TOKENS)
    return float(np.mean([task.metric(s.text, sample) for s, sample in zip(out.sequences, drawn, strict=True)]))


def test_shipped_model_finds_lines(model: kvjax.Model) -> None:
    assert model.spec.group_size > 1 and model.spec.max_position == 2048
    assert exact(model, tokens=512, samples=32) >= 0.95


def test_shipped_model_ends_its_answer(model: kvjax.Model) -> None:
    prompt, answer = lines.prompt(lines.scoring_rng(2), 200)
    given = kvjax.generate(model, [prompt]).sequences[0]
    assert given.text == answer + "\n"
    assert given.finish_reason == "stop"


def test_a_cache_without_the_line_does_not_answer(model: kvjax.Model) -> None:
    recipe = kvjax.methods.streaming_llm(budget="10%")
    assert exact(model, tokens=256, samples=32, recipe=recipe) < 0.5


def test_shipped_files_are_small_and_complete() -> None:
    files = [file for file in demo.directory().iterdir() if file.is_file()]
    names = {file.name for file in files}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names >= {"generation_config.json", "README.md"}
    assert sum(file.stat().st_size for file in files) <= 16e6
