"""The demo model's training: its course, its decoder, and runs that are stopped and killed."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from kvjax.checkpoint import hf
from kvjax.corpus import data, documents, tokens
from kvjax.demo import course, curves, model, score, train
from kvjax.errors import InputError
from kvjax.models import decoder
from kvjax.spec import RopeSpec
from kvjax.tasks import lines as demo_lines
from kvjax.tasks import vocabulary as v
from tests.lib.killing import CPU, kill

TEXT = "The text of the tests.\nIt has a few lines, and none of them is a needle.\n" * 9
TINY = ["--steps", "6", "--block", "1", "--checkpoint-every", "1", "--tokens-per-batch", "128", "--max-length", "64"]
TINY += ["--layers", "2", "--width", "32", "--heads", "2", "--kv-heads", "1", "--mlp", "32"]


@pytest.fixture(autouse=True)
def small_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents from a text that takes no time to read."""
    small = documents.Source(TEXT, [TEXT], np.array([len(TEXT)]))
    monkeypatch.setattr(documents, "source", lambda split: small)


# The course


def test_course_grows_with_accuracy_and_in_time() -> None:
    last = len(course.COURSE) - 1
    for stage, here in enumerate(course.COURSE[:-1]):
        assert course.advance(stage, here.target, 0.0) == stage + 1
        assert course.advance(stage, here.target - 0.01, 0.0) == stage
        assert course.advance(stage, 0.0, here.end) == stage + 1
    assert course.advance(last, 1.0, 1.0) == last
    assert max(course.COURSE[-1].lengths) == model.CONTEXT
    assert all(max(a.lengths) <= max(b.lengths) for a, b in itertools.pairwise(course.COURSE))
    assert course.looked_up({kind: 1.0 for kind in data.KINDS if data.KINDS[kind].looks_up}) == 1.0
    assert course.looked_up({"text": 1.0}) == 0.0


def test_shapes_have_the_tokens_of_a_batch() -> None:
    shapes = {course.shape(0, step, len(course.COURSE) - 1, 8192, 4096) for step in range(50)}
    assert len(shapes) > 3 and all(rows * length == 8192 for rows, length in shapes)


# The model and its training


@pytest.fixture(scope="module")
def small() -> decoder.Decoder:
    spec = model.make_spec(layers=2, width=64, heads=4, kv_heads=2, head_dim=32, mlp=64, theta=1e4, tie=True)
    return model.initial(spec, 0)


def test_logits_are_the_decoders(small: decoder.Decoder) -> None:
    ids = jax.random.randint(jax.random.key(0), (2, 512), 0, tokens.SIZE)
    blocks = nnx.jit(lambda decoder: model.forward(decoder, ids))(small)
    whole = nnx.jit(lambda model: decoder.forward(model, ids))(small)
    np.testing.assert_allclose(blocks, whole, atol=1e-4)


def test_kinds_are_measured_apart(small: decoder.Decoder) -> None:
    batch = data.batch(data.held_out_rng(0, 0), 12, 64)
    value, sums = model.loss(small, batch)
    sums = np.asarray(sums)
    assert float(value) == pytest.approx(sums[:, 2].sum() / sums[:, 3].sum(), rel=1e-5)
    asked = (batch.weight[:, 1:] == demo_lines.ANSWER).sum(axis=1)
    for kind in range(len(data.KINDS)):
        assert sums[kind, 0] == asked[batch.kind == kind].sum()


def test_bigram_knows_more_than_a_unigram() -> None:
    text = np.tile(np.arange(10, 20, dtype=np.uint16), 50)
    assert score.bigram_loss(text, text[:100]) < 1.0
    assert -np.log(score.unigram(text)[text[:100]]).mean() > 3.0


def _logged(out: Path) -> list[dict]:
    lines = (out / "log.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def _same(first: Path, second: Path) -> None:
    assert _logged(first) == _logged(second)
    got, expected = (load_file(out / "hf" / "model.safetensors") for out in (first, second))
    assert got.keys() == expected.keys()
    assert all(np.array_equal(got[name], tensor) for name, tensor in expected.items())


def test_stopped_training_goes_on_in_its_stage(tmp_path: Path) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    train.main(["--out", str(whole), *TINY])
    for _ in range(3):
        train.main(["--out", str(stopped), *TINY, "--minutes", "0"])
    train.main(["--out", str(stopped), *TINY])
    _same(stopped, whole)
    stages = [entry["stage"] for entry in _logged(whole)]
    assert stages == sorted(stages) and stages[0] == 0 < stages[3]
    loaded = hf.load(whole / "hf", jnp.float32)
    assert load_file(whole / "hf" / "model.safetensors")["model.norm.weight"].dtype == jnp.bfloat16
    assert loaded.spec.tie_embeddings and loaded.spec.max_position == 4096
    with pytest.raises(InputError, match="seed"):
        train.main(["--out", str(whole), *TINY, "--seed", "1"])
    curves.main([str(whole)])
    assert (whole / "curves.png").stat().st_size > 1000


def test_another_model_is_continued(tmp_path: Path) -> None:
    """With another rotary base: in the last stage, from its weights, and for its tokens from their vectors."""
    first, second = tmp_path / "first", tmp_path / "second"
    train.main(["--out", str(first), *TINY])
    again = [*TINY, "--start", str(first / "hf"), "--theta", "20000"]
    train.main(["--out", str(second), *again])
    assert {entry["stage"] for entry in _logged(second)} == {len(course.COURSE) - 1}
    source = hf.load(first / "hf", jnp.float32)
    spec = dataclasses.replace(source.spec, rope=RopeSpec(theta=20000.0))
    begin = model.continued(spec, 0, first / "hf")
    assert begin.spec.rope.theta == 20000.0
    for got, expected in zip(jax.tree.leaves(begin), jax.tree.leaves(source), strict=True):
        np.testing.assert_array_equal(got, expected)
    with pytest.raises(InputError, match="another architecture"):
        model.continued(dataclasses.replace(spec, mlp_dim=24), 0, first / "hf")


def test_a_token_without_a_namesake_gets_a_vector_like_its_kinds(tmp_path: Path) -> None:
    train.main(["--out", str(tmp_path), *TINY])
    file = tmp_path / "hf" / "tokenizer.json"
    written = json.loads(file.read_text())
    names = written["model"]["vocab"]
    for number in range(v.NUM_NUMBERS // 2):  # half of the numbers have other names there
        names[f"<{number}>"] = names.pop(f"\u0120{v.FIRST_NUMBER + number}")
    file.write_text(json.dumps(written))
    source = hf.load(tmp_path / "hf", jnp.float32)
    begin = model.continued(source.spec, 0, tmp_path / "hf").embedding[...]
    same = (np.asarray(begin) == np.asarray(source.embedding[...])).all(axis=1)
    new, numbers = np.flatnonzero(~same), np.arange(v.NUMBER, v.SIZE)
    assert new.tolist() == numbers[: v.NUM_NUMBERS // 2].tolist()
    known = np.asarray(source.embedding[...])[numbers[v.NUM_NUMBERS // 2 :]]
    drawn = np.asarray(begin)[new]
    assert np.abs(drawn.mean(axis=0) - known.mean(axis=0)).max() < 5 * known.std() / len(new) ** 0.5
    np.testing.assert_allclose(drawn.std(), known.std(), rtol=0.1)


@pytest.mark.slow
def test_killed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    flags = [*TINY, "--steps", "40", "--checkpoint-every", "2"]
    command = lambda out: [sys.executable, "-m", "kvjax.demo.train", "--out", str(out), *flags]
    subprocess.run(command(whole), env=CPU, check=True, capture_output=True)
    kill(command(killed), killed / "log.jsonl", range(2, 38))
    subprocess.run(command(killed), env=CPU, check=True, capture_output=True)
    _same(killed, whole)


def test_presets_fit_into_sixteen_megabytes() -> None:
    for preset in train.PRESETS:
        args = train.parse(["--out", "unused", "--preset", preset])
        spec = model.make_spec(
            args.layers, args.width, args.heads, args.kv_heads, args.head_dim, args.mlp, args.theta, args.tie
        )
        shapes = nnx.state(nnx.eval_shape(lambda spec=spec: decoder.Decoder(spec, rngs=nnx.Rngs(0))))
        assert 2 * sum(leaf.size for leaf in jax.tree.leaves(shapes)) + len(tokens.tokenizer().to_str()) < 16e6
