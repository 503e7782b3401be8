"""Retrofitting: the relaxed model against loops and finite differences, schedule and data, runs that are stopped."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import kvjax
from kvjax.checkpoint import orbax
from kvjax.errors import InputError
from kvjax.generate import main as generate
from kvjax.generation import prefill
from kvjax.generation.allocate import init_cache
from kvjax.models import rope
from kvjax.models.decoder import forward
from kvjax.retrofit import __main__ as command
from kvjax.retrofit import data, objective, train, weights
from kvjax.retrofit.objective import PackedBatch, Relax
from kvjax.retrofit.schedule import Schedule
from kvjax.spec import Gate, GateSpec, RopeSpec
from kvjax.training import attention
from pallas_kernels import segment_merge
from tests.lib.killing import CPU, kill
from tests.lib.matrix import CAPPED, slow
from tests.lib.oracle import random_model

DMC = GateSpec("dmc", rate=2.0, window=5)
DMS = GateSpec("dms", rate=2.0, window=5, scale=100.0)
GATES = (DMC, dataclasses.replace(DMC, window=0), DMS)
TINY = ["--cr", "2", "--fade-steps", "4", "--ramp-steps", "6", "--final-steps", "4", "--learning-rate", "1e-3"]
TINY += ["--length", "32", "--batch", "2", "--micro-batch", "1", "--log-every", "2", "--save-every", "2"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of tokens that the demo model has."""
    rng, file = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "documents.jsonl"
    lines = [json.dumps({"tokens": rng.integers(0, 4000, int(n)).tolist()}) for n in rng.integers(5, 60, 40)]
    file.write_text("\n".join(lines) + "\n")
    return file


def packed(rng: np.random.Generator, rows: int, length: int, vocabulary: int = 97) -> PackedBatch:
    ids = jnp.asarray(rng.integers(0, vocabulary, (rows, length + 1)), jnp.int32)
    return PackedBatch(ids, jnp.asarray(rng.random((rows, length + 1)) < 0.1))


# The relaxed model


@pytest.mark.parametrize("window", [1, 3, 12, 0])
def test_pooling_is_that_of_loops(window: int) -> None:
    rng = np.random.default_rng(window)
    x, weight = rng.normal(size=(2, 40, 3, 4)), rng.random((2, 40, 3)) + 0.1
    merge = np.where(rng.random((2, 40, 3)) < 0.5, rng.random((2, 40, 3)), rng.integers(0, 2, (2, 40, 3)))
    merge[:, :, 2] = 1  # one long segment
    pool = jax.jit(segment_merge.pool, static_argnames="window")
    got = pool(*(jnp.asarray(y, jnp.float32) for y in (x, merge, weight)), window=window)
    for b, t, k in np.ndindex(2, 40, 3):
        carried, top, bottom = 1.0, np.zeros(4), 0.0
        for by in range(min(window or 40, t + 1)):
            top, bottom = (
                top + carried * weight[b, t - by, k] * x[b, t - by, k],
                bottom + carried * weight[b, t - by, k],
            )
            carried *= merge[b, t - by, k] if t - by > 0 else 0.0
        np.testing.assert_allclose(got[b, t, k], top / bottom, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("gate", slow(GATES, GATES[1:2]), ids=["dmc", "unlimited", "dms"])
def test_gradients_are_those_of_finite_differences(gate: GateSpec) -> None:
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        numbers = [jnp.asarray(rng.normal(size=(1, 14, 2, 6))) for _ in range(3)]
        numbers += [jnp.asarray(rng.normal(size=(1, 14, 2)) * 0.3), jnp.asarray(rng.random((1, 14, 2)) + 0.2)]
        starts = jnp.asarray(rng.random((1, 14)) < 0.1)
        angles = rope.rotation(RopeSpec(), 6, jnp.asarray(14)).angles(jnp.arange(14))
        cos, sin = (x.astype(jnp.float64)[:, None] for x in angles)
        heads = jnp.asarray(rng.normal(size=(1, 14, 2, 6)))
        turn = lambda x: jnp.concatenate([x[..., :3] * cos - x[..., 3:] * sin, x[..., 3:] * cos + x[..., :3] * sin], -1)
        relax = Relax(jax.random.key(0), 0.5)

        @jax.jit
        def value(q, k, v, logit, weight):
            seen = objective.see(gate, Gate(logit, weight), k, v, starts, relax)
            free = gate.window if gate.objective == "dms" else 0
            return jnp.sum(heads * attention.attention(turn(q), turn(seen.k), seen.v, bias=seen.bias, free=free))

        grads = jax.jit(jax.grad(value, argnums=range(5)))(*numbers)
        for i, (x, grad) in enumerate(zip(numbers, grads, strict=True)):
            step = jnp.asarray(rng.normal(size=x.shape)) * 1e-6
            moved = [value(*numbers[:i], x + sign * step, *numbers[i + 1 :]) for sign in (1, -1)]
            assert float(jnp.sum(grad * step)) == pytest.approx(float(moved[0] - moved[1]) / 2, rel=1e-4, abs=1e-12)


def test_penalty_pulls_below_the_target_only() -> None:
    model, batch = random_model(0, gate=dataclasses.replace(DMC, offset=0.0)), packed(np.random.default_rng(0), 2, 48)
    merged = jax.jit(lambda model: objective.run(model, batch, None)[1])(model)
    rate = 1 / (1 - float(merged.mean()))
    assert 1.2 < rate < 4
    loss = lambda model, target: objective.losses(model, batch, target, Relax(jax.random.key(0))).penalty
    penalty = jax.jit(jax.value_and_grad(loss))
    below, above = penalty(model, jnp.float32(1.05)), penalty(model, jnp.float32(50.0))
    assert below[0] == 0 and all(not np.any(leaf) for leaf in jax.tree.leaves(below[1]))
    assert above[0] > 0 and any(np.any(leaf) for leaf in jax.tree.leaves(above[1]))


def test_noise_and_the_straight_gradient() -> None:
    logits = jnp.full((4, 20_000, 2), -5.0)
    starts = jnp.zeros(logits.shape[:2], bool).at[:, 7].set(True)
    alpha, hard, stays = objective.decide(Gate(logits), starts, Relax(jax.random.key(0)))
    assert float((alpha > 0.5).mean()) == pytest.approx(1 / (1 + np.exp(5)), rel=0.1)  # sigmoid(-5)
    np.testing.assert_allclose(hard, np.round(alpha), atol=1e-6)
    assert not np.any(alpha[:, [0, 7]]) and not np.any(stays[:, [0, 7]])
    np.testing.assert_allclose(jnp.exp(stays), 1 - alpha, atol=1e-6)


@pytest.mark.parametrize("gate", slow(GATES, GATES[1:2]), ids=["dmc", "unlimited", "dms"])
def test_hard_decisions_are_those_of_the_cache(gate: GateSpec) -> None:
    """The training form with hard gates and the prefill of a prompt give the same logits."""
    open_ = dataclasses.replace(gate, offset=0.3 if gate.objective == "dmc" else 3.0)
    model = random_model(3, gate=open_, num_layers=2, score_cap=2.0, score_scale=0.5)
    ids = np.random.default_rng(2).integers(0, 97, (2, 64))
    batch = PackedBatch(jnp.asarray(np.pad(ids, ((0, 0), (0, 1))), jnp.int32), jnp.zeros((2, 65), bool))
    x, merged = jax.jit(lambda model: objective.run(model, batch, None))(model)
    assert 0.1 < float(merged.mean()) < 0.9
    lengths, recipe = kvjax.Lengths((64, 64), 1, 64), kvjax.methods.make(gate.objective, None, {"capacity": "100%"})
    logits, _ = prefill.prefill(
        model, recipe, jnp.asarray(ids, jnp.int32), jnp.asarray([64, 64]), init_cache(model, recipe, lengths)
    )
    np.testing.assert_allclose(logits, model.logits(x[:, -1]), rtol=1e-4, atol=1e-4)


def test_a_faded_model_is_one_with_closed_gates() -> None:
    plain = random_model(4, num_layers=2, **CAPPED)
    params, batch = weights.of_model(plain), packed(np.random.default_rng(4), 1, 32)
    spec = dataclasses.replace(plain.spec, gate=DMC)
    closed = weights.to_model(weights.begin_gates(params, spec), spec, jnp.float32)
    fade = jax.jit(lambda model, keep: objective.run(model, batch, None, fading=(DMC, keep))[0])
    logits = jax.jit(lambda model: forward(model, batch.ids[:, :-1]))
    np.testing.assert_allclose(plain.logits(fade(plain, jnp.float32(0))), logits(closed), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(plain.logits(fade(plain, jnp.float32(1))), logits(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("remat", slow([False, True], (False,)))
def test_the_loss_of_many_tokens_is_that_of_few_at_a_time(monkeypatch: pytest.MonkeyPatch, remat: bool) -> None:
    model, base = random_model(5, gate=DMC), random_model(6)
    batch, relax = packed(np.random.default_rng(5), 2, 40), Relax(jax.random.key(1))
    for teacher in (None, base):
        loss = lambda remat: jax.jit(
            lambda model, base: objective.losses(model, batch, jnp.float32(2), relax, base=base, remat=remat)
        )
        whole = loss(False)(model, teacher)
        with monkeypatch.context() as patch:
            patch.setattr(objective, "LOGITS", 97 * 16)
            some = loss(remat)(model, teacher)
        np.testing.assert_allclose(some.total, whole.total, rtol=1e-5)
    logs = jax.nn.log_softmax(jax.jit(forward)(model, batch.ids[:, :-1]))
    closed = jax.jit(
        lambda model: objective.losses(model, batch._replace(starts=batch.starts | True), jnp.float32(2), relax)
    )
    wanted = -np.mean(np.take_along_axis(np.asarray(logs), np.asarray(batch.ids)[:, 1:, None], axis=-1))
    np.testing.assert_allclose(closed(model).text, wanted, rtol=1e-5)


# Schedule and data


def test_stages_and_what_they_aim_at() -> None:
    schedule = Schedule(10, 20, 8, 4.0, 1e-3, 1e-4)
    assert schedule.steps == 38
    assert [schedule.stage(step)[0] for step in (0, 9, 10, 29, 30, 37)] == ["fade"] * 2 + ["ramp"] * 2 + ["finish"] * 2
    assert [schedule.target(step) for step in (0, 10, 20, 30, 37)] == [1, 1, 2.5, 4, 4]
    assert [schedule.keep(step) for step in (0, 4, 8, 9)] == [1, 0.5, 0, 0]
    assert schedule.learning_rate(25) == schedule.learning_rate(30) == 1e-3
    assert schedule.learning_rate(38) == pytest.approx(1e-4)
    assert [step for step in range(38) if schedule.begins(step)] == [0, 10, 30]
    assert [step for step in range(38) if schedule.passes(step, 2.5)] == [19]


def test_documents_are_packed_and_every_epoch_sees_them_all(texts: Path) -> None:
    model = kvjax.load(dtype=jnp.float32)
    stream = data.read([texts], model, 32)
    documents = [json.loads(line)["tokens"] for line in texts.read_text().splitlines()]
    assert stream.tokens.tolist() == [i for document in documents for i in document]
    assert np.flatnonzero(stream.starts).tolist() == np.cumsum([0, *map(len, documents)])[:-1].tolist()
    each = (len(stream.tokens) - 1) // 32
    steps = [data.batch(stream, 0, step, 1, 32) for step in range(2 * each)]
    for epoch in (steps[:each], steps[each:]):
        seen = sorted(tuple(np.asarray(batch.ids)[0].tolist()) for batch in epoch)
        assert seen == sorted(tuple(stream.tokens[i * 32 : i * 32 + 33].tolist()) for i in range(each))
    assert not np.array_equal(steps[0].ids, steps[each].ids)
    both = data.batch(stream, 0, 1, 2, 32)
    np.testing.assert_array_equal(both.ids, np.concatenate([steps[2].ids, steps[3].ids]))


def test_text_becomes_tokens_and_ends(tmp_path: Path) -> None:
    model = kvjax.load(dtype=jnp.float32)
    (tmp_path / "a.txt").write_text("river: 217 130\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "river: 217 130\n"}) + "\n\n")
    stream = data.read([tmp_path / "a.txt", tmp_path / "b.jsonl"], model, 4)
    ids = [*model.tokenizer.encode("river: 217 130\n"), model.stop[0]]
    assert stream.tokens.tolist() == ids * 2 and np.flatnonzero(stream.starts).tolist() == [0, len(ids)]


# The command


def run(out: Path, texts: Path, *flags: str) -> None:
    command.main(["--out", str(out), "--data", str(texts), *TINY, *flags])


def logged(out: Path) -> list[dict]:
    lines = (out / "run" / "log.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def same(first: Path, second: Path) -> None:
    assert logged(first) == logged(second)
    models = [orbax.load(out, np.float32) for out in (first, second)]
    for a, b in zip(*map(jax.tree.leaves, models), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_stopped_run_goes_on(tmp_path: Path, texts: Path, shallow: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    flags = ("--model", str(shallow))
    run(whole, texts, *flags, "--export", "1.5")
    for _ in range(2):
        run(stopped, texts, *flags, "--minutes", "0")
        assert not orbax.is_orbax(stopped)
    assert "start the same command again" in capsys.readouterr().out
    run(stopped, texts, *flags)
    same(stopped, whole)
    assert [entry["step"] for entry in logged(whole)] == list(range(2, 15, 2))
    assert [entry["stage"] for entry in logged(whole)] == ["fade"] * 2 + ["ramp"] * 3 + ["finish"] * 2
    assert all((whole / "run" / f"{name}.png").stat().st_size > 1000 for name in ("curves", "rates"))
    for made in (whole, whole / "rate1.5"):
        spec = orbax.read_spec(made)
        assert spec.gate is not None and spec.gate.objective == "dmc" and spec.gate.window == 12
        slots = np.asarray(json.loads((made / "kvjax.json").read_text())["slots"])
        assert slots.shape == (2, 2) and spec.gate.rate == pytest.approx(1 / slots.mean(), rel=1e-2)
    with pytest.raises(InputError, match="another seed"):
        run(whole, texts, *flags, "--seed", "1")
    run(whole, texts, *flags)  # is complete
    norm = load_file(shallow / "model.safetensors")
    changed = shutil.copytree(shallow, tmp_path / "changed")
    save_file(norm | {"model.norm.weight": norm["model.norm.weight"] * 2}, changed / "model.safetensors")
    record = whole / "run" / "run.json"
    kept = record.read_text()
    record.write_text(kept.replace(str(shallow), str(changed)))
    with pytest.raises(InputError, match="another weights"):
        run(whole, texts, "--model", str(changed))
    record.write_text(kept)
    shutil.rmtree(whole / "run")
    with pytest.raises(InputError, match="is a checkpoint already"):
        run(whole, texts, *flags)
    capsys.readouterr()
    generate(["--model", str(whole), "--prompt", "river: 217 130", "--max-new-tokens", "2", "--json"])
    assert json.loads(capsys.readouterr().out)["method"] == "dmc"


@pytest.mark.parametrize(
    ("rate", "least", "most"),
    [
        (lambda offset: 6 - (offset - 5) / 2, 3.96, 4.04),  # closes steadily
        (lambda offset: 6 if offset < 5.7 else 2, 2, 2),  # at once: not above what was asked for
        (lambda offset: 3.0, 3, 3),  # too little is left alone
        (lambda offset: 6.0, 6, 6),  # no offset helps
    ],
)
def test_gates_are_closed_until_their_rate_is_the_target(rate, least: float, most: float) -> None:
    merged = lambda offset: np.full((2, 2), 1 - 1 / rate(offset))
    offset, found = train.calibrated(merged, dataclasses.replace(DMC, rate=4.0))
    assert least - 1e-6 <= 1 / (1 - found.mean()) <= most + 1e-6
    assert offset >= DMC.offset and 1 / (1 - merged(offset).mean()) == pytest.approx(1 / (1 - found.mean()))
    assert (offset == DMC.offset) == (rate(DMC.offset) <= 4)


def test_a_retrofitted_model_is_retrofitted_further() -> None:
    """It keeps its gates, and the target grows from its own rate."""
    options = lambda *flags: command.options(command.parser().parse_args(["--out", "o", "--data", "d", *TINY, *flags]))
    gate = dataclasses.replace(options().gate, rate=1.5)
    further = train.continued(options("--fade-steps", "0"), gate, "m")
    assert [further.schedule.target(step) for step in (0, 3, 6, 9)] == [1.5, 1.75, 2, 2]
    for flags, message in (
        ([], "give --fade-steps 0"),
        (["--fade-steps", "0", "--window", "4"], "with window 12, not 4"),
        (["--fade-steps", "0", "--cr", "1.4"], "ask for more than 1.4"),
        (["--fade-steps", "0", "--export", "1.2"], "ask for more than 1.2"),
    ):
        with pytest.raises(InputError, match=message):
            train.continued(options(*flags), gate, "m")
    model = random_model(7, gate=gate)
    params = weights.of_model(model)
    state = train.Step(further, model.spec, None).begin(train.TrainState(params, ()), 0)
    assert all(state.params[path] is leaf for path, leaf in params.items())
    plain = train.Step(further, dataclasses.replace(model.spec, gate=None), None).begin(train.TrainState(params, ()), 0)
    assert not np.any(plain.params["layers.0.attention.k.kernel"].reshape(-1, model.spec.head_dim)[:, -1])


def test_another_model_can_be_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--out", "o", "--data", "d", *TINY, "--fade-steps", "0", "--distill", "--teacher", "other"]
    options = command.options(command.parser().parse_args(flags))
    gated, other = random_model(8, gate=DMC), random_model(9)
    step = lambda model: train.Step(options, gated.spec, train.teacher(options, gated.spec, weights.of_model(model)))
    monkeypatch.setattr(train, "load", lambda name, **_: kvjax.Model(other, None, (), name))
    taken = {path: jnp.array(leaf) for path, leaf in weights.of_model(gated).items()}  # a step consumes them
    state, batch = train.TrainState(taken, ()), data.PackedBatch(*packed(np.random.default_rng(0), 1, 32))
    run = step(gated)
    _, losses = run(run.begin(state, 0), batch, 0)
    relax = Relax(jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 1)[0])
    wanted = jax.jit(objective.losses)(gated, batch, jnp.float32(1), relax, base=other)
    np.testing.assert_allclose(losses.text, wanted.text, rtol=1e-4)


def test_an_adapter_alone_is_trained(tmp_path: Path, texts: Path, shallow: Path) -> None:
    flags = ("--model", str(shallow), "--objective", "dms", "--adapter", "--fade-steps", "0", "--window", "8")
    run(tmp_path, texts, *flags)
    model, source = orbax.load(tmp_path, np.float32), kvjax.load(shallow, dtype=jnp.float32).decoder
    gate = model.spec.gate
    assert gate is not None and gate.offset >= 5  # closed where the rate had passed its target
    assert gate == GateSpec("dms", gate.rate, 8, None, gate.offset, 100.0)
    for layer, before in zip(model.layers, source.layers, strict=True):
        np.testing.assert_array_equal(layer.attention.q.kernel[...], before.attention.q.kernel[...])
        assert np.any(layer.adapter.kernel[...])


WRONG = {
    "empty": (b"", "is empty"),
    "latin": (b"caf\xe9 " * 99, "not UTF-8"),
    "short": (b"river", "less than a sequence"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_data_is_one_line(tmp_path: Path, name: str) -> None:
    content, message = WRONG[name]
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        run(tmp_path / "out", tmp_path / "a.txt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not JSON"),
        ("[" * 100_000, "line 1 is nested too deeply"),
        ('{"tokens": [' + "9" * 5_000 + "]}", "line 1 has an integer of too many digits"),
        ('{"words": "a"}', "line 1: is neither"),
        ('{"tokens": [1, true]}', "line 1: is neither"),
        ('{"tokens": [1, 99999]}', "not in the vocabulary"),
        ('{"text": ""}', "line 1: is neither"),
        ('{"text": " "}', "line 1 is empty"),
        ('{"text": "\\ud800"}', "line 1: has half a surrogate"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=message):
        run(tmp_path / "out", tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cr", "0.5"], "--cr 0.5"),
        (["--cr", "nan"], "--cr nan"),
        (["--batch", "3", "--micro-batch", "2"], "multiple"),
        (["--save-every", "3"], "multiple"),
        (["--adapter"], "--objective dms"),
        (["--neuron", "32"], "32 coordinates"),
        (["--export", "5"], "--export 5"),
        (["--export", "2", "--ramp-steps", "0"], "without a ramp"),
        (["--ramp-steps", "0", "--final-steps", "0"], "never trained"),
        (["--objective", "dms", "--window", "31"], "would ever lose one"),
        (["--objective", "dms", "--adapter"], "leave --fade-steps out"),
        (["--teacher", "demo"], "is for --distill"),
        (["--seed", "-1"], "--seed -1"),
        (["--final-learning-rate", "-1"], "not above 0"),
        (["--out", __file__], "is a file"),
        (["--length", "5000"], "context limit"),
        (["--learning-rate", "0"], "not above 0"),
        (["--data", "/nowhere.txt"], "cannot read /nowhere.txt"),
    ],
)
def test_wrong_flags_are_one_line(tmp_path: Path, texts: Path, flags: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(tmp_path / "out", texts, *flags)


def test_a_config_gives_flags(tmp_path: Path, texts: Path) -> None:
    config = tmp_path / "retrofit.toml"
    config.write_text(f'data = ["{texts}"]\nout = "{tmp_path / "out"}"\ncr = 3.0\nremat = false\ndistill = true\n')
    p = command.parser()
    args = p.parse_args(["--config", str(config)])
    flags = command.command.config_flags(config, command.command.read_config(config), p, args)
    options = command.options(p.parse_args([*flags, "--cr", "2"]))
    assert options.files == (texts,) and options.gate.rate == 2 and options.distill and not options.remat


def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(
    tmp_path: Path, texts: Path, shallow: Path
) -> None:
    flags = ("--model", str(shallow), "--fade-steps", "0", "--final-learning-rate", "1e30", "--save-every", "4")
    with pytest.raises(InputError, match=r"after 8 steps .* not finite.* the last checkpoint is that of step 4"):
        run(tmp_path, texts, *flags)
    before = logged(tmp_path)
    assert [entry["step"] for entry in before] == [2, 4, 6]
    with pytest.raises(InputError, match="after 8 steps"):  # it goes on from the fourth step, and ends there again
        run(tmp_path, texts, *flags)
    assert logged(tmp_path) == before and not orbax.is_orbax(tmp_path)


@pytest.mark.slow
def test_killed_training_ends_with_the_same_weights(tmp_path: Path, texts: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    flags = ["--data", str(texts), *TINY, "--ramp-steps", "40", "--distill"]
    line = lambda out: [sys.executable, "-m", "kvjax.retrofit", "--out", str(out), *flags]
    subprocess.run(line(whole), env=CPU, check=True, capture_output=True)
    kill(line(killed), killed / "run" / "log.jsonl", range(1, 23))
    subprocess.run(line(killed), env=CPU, check=True, capture_output=True)
    same(killed, whole)
