"""Gates that tell what to keep: the paper's formula in numpy, what is kept by it, their file, their training."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import kvjax
from kvjax import methods
from kvjax.checkpoint import identity, keep_gate, shipped
from kvjax.errors import InputError
from kvjax.generation.model import Model
from kvjax.models.keep import EPS, SINKS, WIDTH, gated
from kvjax.retrofit import __main__ as command
from kvjax.retrofit import keep
from tests.lib import oracle
from tests.lib.matrix import text
from tests.test_replay import Replayed, scored

MODELS = {
    "gqa": dict(),
    "mqa": dict(num_kv_heads=1, qk_norm=True, tie_embeddings=True),
    "windowed": dict(windows=(12, None, None)),
}
PROMPTS = (text(75, 0), text(16, 0), text(33, 0), text(1, 0))


def rms(y: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return y / np.sqrt((y * y).mean() + EPS) * scale


def worth(gate, x: np.ndarray) -> np.ndarray:
    """`[K]`, what a gate says of one token, in loops: a softmax over the token's key and the sinks, the key's part."""
    p = {name: np.asarray(leaf[...], np.float64) for name, leaf in vars(gate).items() if hasattr(leaf, "shape")}
    rows, group = p["offset"].shape
    wq, bq = p["query"].reshape(-1, rows, group, WIDTH), p["query_bias"].reshape(rows, group, WIDTH)
    wk, out = p["key"].reshape(-1, rows, WIDTH), np.zeros(rows)
    for row, g in np.ndindex(rows, group):
        key, query = rms(x @ wk[:, row], p["key_scale"]), rms(x @ wq[:, row, g] + bq[row, g], p["query_scale"])
        own = np.exp(key @ query / np.sqrt(WIDTH) + p["offset"][row, g])
        out[row] += own / (own + sum(np.exp(p["sinks"][row, s] @ query / np.sqrt(WIDTH)) for s in range(SINKS))) / group
    return out


class Foretold(oracle.Oracle):
    """A decoder that says what its gates do of a prompt's tokens."""

    def scores(self, model, tokens: list[int]) -> list[np.ndarray]:
        """`[L'][K T]` of the layers that have a gate."""
        self.model, self.found = model, {}
        self.prefill(tokens, lambda layer, prompt: [])
        return [self.found[index] for index in gated(self.spec)]

    def _project(self, layer, x):
        if (gate := self.model.layers[layer].keep) is not None:
            read = self._norm(self.weights["layers"][layer]["attention_norm"], x)
            self.found[layer] = np.stack([worth(gate, token) for token in read], axis=1)
        return super()._project(layer, x)


@pytest.mark.parametrize("padded", [80, 1024])
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_the_definition(name, padded):
    """Of prompts of several lengths side by side, read at once and in parts."""
    model = oracle.with_gates(oracle.random_model(11, **MODELS[name]))
    got = scored(model, methods.fastkvzip(8, split="row"), PROMPTS, padded)
    assert len(got) == len(gated(model.spec))
    for b, prompt in enumerate(PROMPTS):
        for all_, want in zip(got, Foretold(model).scores(model, prompt), strict=True):
            np.testing.assert_allclose(all_[b, :, : len(prompt)], want, rtol=1e-5)


def test_the_best_of_all_layers_and_heads_are_kept():
    """Beside the first tokens and the newest ones; no token twice, or two would have one score in the first layer."""
    model, keep, sinks = oracle.with_gates(oracle.random_model(11)), 12, 4
    every = np.random.default_rng(0).permutation(97).tolist()
    for prompt, newest in ((every[:30], 1), (every[:90], 2)):
        _, cache = oracle.start(model, methods.fastkvzip(keep, recent=0.03, sinks=sinks), [prompt], 1)
        kept, n = oracle.kept_positions(model, cache)[0], len(prompt)
        scores = np.stack(Foretold(model).scores(model, prompt))[..., sinks : n - newest]
        best = np.argsort(-scores, axis=None)[: scores[..., 0].size * (keep - sinks - newest)]
        chosen = np.isin(np.arange(scores.size), best).reshape(scores.shape)
        own = [[(sinks + np.flatnonzero(row)).tolist() for row in layer] for layer in chosen]
        assert kept == [[[*range(sinks), *row, *range(n - newest, n)] for row in layer] for layer in own]


def test_a_model_without_gates_is_refused():
    model = Model(oracle.random_model(5, num_layers=1), None, (), "bare")
    with pytest.raises(InputError, match="no gate lies beside the model"):
        model.generate([text(20, 0)], "fastkvzip", 8, max_new_tokens=1)


@pytest.mark.parametrize(("name", "value"), [("recent", -0.1), ("recent", 1.5), ("sinks", -1), ("split", "column")])
def test_wrong_arguments_are_refused(name, value):
    with pytest.raises(InputError, match=f"{name}='?{value}"):
        methods.fastkvzip(**{name: value})


def arrays(spec) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in keep_gate.shapes(spec).items()}


def test_a_file_gives_back_what_was_written(tmp_path):
    spec = oracle.random_model(5, num_layers=2).spec
    gates = arrays(spec)
    keep_gate.write(tmp_path / "gate", gates, {"model": "some"})
    found = keep_gate.read(tmp_path / "gate", spec)
    assert found.keys() == gates.keys() and all((found[name] == gates[name]).all() for name in gates)


def damaged(spec, how: str) -> bytes:
    gates, header = arrays(spec), {"kvjax": json.dumps({"format": keep_gate.FORMAT})}
    if how == "cut":
        return safetensors.numpy.save(gates, header)[:-5]
    if how == "format":
        header = {"kvjax": json.dumps({"format": "gate 0"})}
    if how == "nan":
        gates["key"][0, 0, 0] = np.nan
    if how == "shape":
        gates["sinks"] = gates["sinks"][:1]
    if how == "name":
        gates["other"] = gates.pop("offset")
    return safetensors.numpy.save(gates, header)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("cut", "cannot be read"),
        ("format", "that this kvjax reads"),
        ("nan", "not a number"),
        ("shape", "another shape"),
        ("name", "another shape"),
    ],
)
def test_damaged_files_are_refused(tmp_path, how, says):
    spec = oracle.random_model(5, num_layers=2).spec
    (tmp_path / "gate").write_bytes(damaged(spec, how))
    with pytest.raises(InputError, match=rf"gate: .*{says}"):
        keep_gate.read(tmp_path / "gate", spec)


def test_gates_make_no_other_model():
    """A context of a model is one of the model with gates, too; and its logits are the same."""
    bare = oracle.random_model(5, num_layers=2)
    names = identity.of_model(bare), identity.of_model(oracle.with_gates(bare))
    assert names[0] == names[1]


def test_examples_are_what_projections_read_and_what_a_second_reading_needs():
    model, prompt = oracle.random_model(11), text(75, 0)
    found = keep.examples(Model(model, None, (), "random"), np.asarray(prompt))
    want = np.stack(Replayed(model).scores(prompt, keep.CHUNK, keep.FIRST, True))[..., keep.FIRST :]
    np.testing.assert_allclose(np.moveaxis(found.need, 1, 2), want, rtol=1e-5)
    layer = model.layers[0]
    assert layer.attention_norm is not None
    read = layer.attention_norm(model.embed(jnp.asarray(prompt)))[keep.FIRST :]
    np.testing.assert_allclose(found.x[0], read, rtol=2e-3, atol=2e-3)


def test_gates_learn_what_is_needed_and_the_model_stays(tmp_path, capsys):
    out = tmp_path / "gate.safetensors"
    flags = "--objective keep --texts 6 --length 128 --final-steps 40 --batch 256 --log-every 20".split()
    command.main([*flags, "--out", str(out)])
    said = capsys.readouterr().out
    model = kvjax.load(dtype=jnp.float32)
    untrained = jax.tree.map(np.asarray, keep_gate.read(out, model.spec))
    assert "of what texts need most" in said and float(said.split("most, ")[1].split("%")[0]) > 55  # by chance 20
    assert untrained.keys() == keep_gate.shapes(model.spec).keys()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--out gate --cr 8", "--cr is not for --objective keep"),
        ("", "--out FILE is needed"),
        ("--out gate --texts 1", "--texts 1 is less than 2"),
        ("--out gate --learning-rate 0", "--learning-rate 0.0 is not above 0"),
        ("--out gate --length 4096", "read twice it passes the context limit"),
        ("--out gate --texts 5000", "less than --texts 5000"),
        ("--out nowhere/gate", "cannot write"),
    ],
)
def test_training_flags_that_do_not_fit_are_refused(tmp_path, monkeypatch, flags, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=says):
        command.main(["--objective", "keep", *flags.split()])


def test_the_demo_model_comes_with_gates():
    model = kvjax.load(dtype=jnp.float32)
    assert (shipped.directory() / keep_gate.BESIDE).stat().st_size < 1e6
    assert all(layer.keep is not None for layer in model.decoder.layers)
