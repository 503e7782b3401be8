"""Weights of few bits: products against numpy, and models against those whose weights have the same numbers."""

import dataclasses
import json
from dataclasses import replace

import golden
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file

import kvjax
from kvjax.checkpoint import hf, orbax
from kvjax.checkpoint.convert import convert
from kvjax.checkpoint.identity import fingerprint
from kvjax.checkpoint.load import load_model
from kvjax.checkpoint.lorc import ranks
from kvjax.errors import InputError
from kvjax.models import quantized
from kvjax.models.decoder import Decoder, forward
from kvjax.models.named import NAMED
from kvjax.models.quantized import Quantized
from kvjax.parallel import mesh
from kvjax.plan import estimate
from kvjax.plan.__main__ import main
from kvjax.plan.chips import find
from kvjax.plan.settings import Setting
from kvjax.spec import WEIGHT_BITS, ModelSpec

FORMATS = ("int8", "int4")
FAMILIES = ("llama", "llama_tied", "falcon_7b", "gpt_oss")


def unpacked(matrix: Quantized) -> np.ndarray:
    """The numbers of a matrix in float64, from the layout that the module's docstring gives."""
    inputs_last = lambda x: np.asarray(x) if matrix.axis == -1 else np.swapaxes(np.asarray(x), -1, -2)
    codes, scale = inputs_last(matrix.codes[...]), inputs_last(matrix.scale[...]).astype(np.float64)
    codes = codes.reshape(*scale.shape, -1)
    if matrix.zero is None:
        found = (codes.astype(np.float64) - 128) * scale[..., None]
    else:
        zero = inputs_last(matrix.zero[...]).astype(np.float64)
        found = np.concatenate([codes & 15, codes >> 4], axis=-1) * scale[..., None] + zero[..., None]
    return inputs_last(found.reshape(*scale.shape[:-1], -1))


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def dense(model: Decoder) -> Decoder:
    """The model whose weights are the numbers that the codes of another stand for."""
    wanted, tree = hf.abstract(dataclasses.replace(model.spec, weights=None), model.dtype)
    found, _ = hf.by_path(model)
    matrices = {"embedding": model.embedding, "head.kernel": model.head and model.head.kernel}
    for i, layer in enumerate(model.layers):
        a, mlp = layer.attention, layer.mlp
        matrices |= {f"layers.{i}.attention.{name}.kernel": getattr(a, name).kernel for name in "qkvo"}
        for name in ("gate", "up", "down"):
            module, leaf = getattr(mlp, name), "kernel" if model.spec.experts is None else "kernels"
            matrices |= {f"layers.{i}.mlp.{name}.{leaf}": getattr(module, leaf)} if module is not None else {}
    assert all(isinstance(x, Quantized) for x in matrices.values() if x is not None)
    arrays = {path: jnp.asarray(unpacked(x), model.dtype) for path, x in matrices.items() if x is not None}
    return jax.tree.unflatten(tree, [arrays[path] if path in arrays else found[path] for path in wanted])


def checkpoint(name: str, path) -> str:
    """A tiny checkpoint whose matrices can be cut into groups."""
    if not name.startswith("llama"):
        return str(golden.write_checkpoint(name, path))
    config = golden.load("llama_gqa").config | {"intermediate_size": 64, "tie_word_embeddings": name == "llama_tied"}
    weights = {
        key: draw(*(64 if size == 48 else size for size in value.shape)) * 0.2
        for key, value in golden.load("llama_gqa").weights.items()
        if not (key == "lm_head.weight" and name == "llama_tied")
    }
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(weights, path / "model.safetensors")
    return str(path)


def same(one: Decoder, other: Decoder) -> None:
    (first, _), (second, _) = hf.by_path(one), hf.by_path(other)
    assert one.spec == other.spec and first.keys() == second.keys()
    for path, leaf in first.items():
        assert leaf.dtype == second[path].dtype
        np.testing.assert_array_equal(leaf, second[path], err_msg=path)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("block", [96 * 7, 2**20])
def test_products_are_those_of_the_numbers(weights, axis, block, monkeypatch):
    monkeypatch.setitem(quantized._BLOCK, "cpu", block)
    drawn = jnp.asarray(draw(*((96, 40) if axis == -2 else (40, 96))))
    matrices = [Quantized(drawn, weights, axis), Quantized(2 * drawn[::-1], weights, axis)]
    x = draw(2, 5, 96)
    for i, matrix in enumerate(matrices):
        numbers = unpacked(matrix)
        expected = x.astype(np.float64) @ (numbers if axis == -2 else numbers.T)
        np.testing.assert_allclose(jax.jit(lambda x, m: x @ m)(x, matrix), expected, atol=2e-5)
        chosen = jax.jit(lambda x, m, i: quantized.product(x, m, i))(x, matrices, jnp.asarray(i))
        np.testing.assert_allclose(chosen, expected, atol=2e-5)
        half = jnp.asarray(x, jnp.bfloat16) @ matrix
        far = np.abs(np.asarray(half, np.float64) - expected).max()
        assert half.dtype == jnp.bfloat16 and far < 0.01 * np.abs(expected).max()
        np.testing.assert_allclose(quantized.numbers(matrix, jnp.float32), numbers, atol=1e-6)


@pytest.mark.parametrize("shape, axis", [((96, 40), -2), ((40, 96), -1), ((3, 64, 40), -2)])
def test_numbers_are_near_those_that_were_given(shape, axis):
    given = draw(*shape)
    grouped = lambda x: (np.swapaxes(x, -1, -2) if axis == -2 else x).reshape(-1, 32)
    exact = Quantized(jnp.asarray(given), "int8", axis)
    missed, most = np.abs(grouped(unpacked(exact) - given)), np.abs(grouped(given)).max(axis=-1, keepdims=True)
    assert (missed <= most / 127 * (0.5 + 127 / 256)).all()  # half a step, and what bfloat16 takes of the largest
    coarse = Quantized(jnp.asarray(given), "int4", axis)
    missed, span = grouped(unpacked(coarse) - given), np.ptp(grouped(given), axis=-1, keepdims=True)
    nearest = np.square(span / 15).mean() / 12  # what rounding to sixteen numbers of a group's range loses
    assert np.square(missed).mean() < 0.9 * nearest
    for weights, matrix in (("int8", exact), ("int4", coarse)):
        encoded = quantized.encode(given, WEIGHT_BITS[weights], axis)
        assert all(np.array_equal(encoded[name], getattr(matrix, name)[...]) for name in encoded)


def test_numbers_of_sixteen_steps_are_kept_and_equal_ones_too():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (64, 8))
    codes[[0, 1, 32, 33]] = [[0], [15], [0], [15]]
    given = codes * 0.25 - 2.0
    np.testing.assert_array_equal(unpacked(Quantized(jnp.asarray(given, jnp.float32), "int4", -2)), given)
    for value in (0.0, -1.5):
        for weights in FORMATS:
            found = unpacked(Quantized(jnp.full((32, 4), value), weights, -2))
            np.testing.assert_allclose(found, value, rtol=2**-8)  # of bfloat16


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_models_compute_with_the_numbers_of_their_codes(name, weights, tmp_path):
    path = checkpoint(name, tmp_path / "model")
    model = load_model(path, jnp.float32, weights=weights)[0]
    assert model.spec.weights == weights and model.dtype == jnp.float32
    plain, tokens = dense(model), jnp.arange(1, 13)[None] * 7 % 97
    np.testing.assert_allclose(forward(model, tokens), forward(plain, tokens), atol=2e-4)
    kept = np.asarray(forward(load_model(path, jnp.float32)[0], tokens))
    far = np.median(np.abs(kept - forward(plain, tokens))) / kept.std()
    assert 0 < far < {"int8": 0.02, "int4": 0.3}[weights], far


@pytest.mark.parametrize("weights", FORMATS)
def test_token_vectors_are_made_some_at_a_time(weights, monkeypatch):
    table = Quantized(jnp.asarray(draw(97, 64)), weights, -1)
    index = np.random.default_rng(0).integers(0, 97, (2, 11))
    monkeypatch.setattr(quantized, "_ROWS", 8)
    found = quantized.rows(table, jnp.asarray(index), jnp.float32)
    np.testing.assert_allclose(found, unpacked(table)[index], atol=1e-6)


@pytest.mark.parametrize("weights", FORMATS)
def test_a_cache_is_decoded_with_them(weights, tmp_path):
    path = checkpoint("llama_tied", tmp_path / "model")
    model = kvjax.load(path, weights=weights)
    plain = dataclasses.replace(model, decoder=dense(model.decoder))
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11]]
    one, other = (m.generate(prompts, "h2o", 6, max_new_tokens=8) for m in (model, plain))
    assert [s.tokens for s in one.sequences] == [s.tokens for s in other.sequences]
    assert weights in repr(model) and weights not in repr(plain)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_matrices_are_encoded_from_what_is_stored(dtype, tmp_path):
    path = golden.write_checkpoint("falcon_7b", tmp_path / "model", dtype)
    one, other = (load_model(str(path), to, weights="int4")[0] for to in (jnp.float32, jnp.bfloat16))
    found, _ = hf.by_path(other)
    for name, leaf in hf.by_path(one)[0].items():
        if name.endswith((".codes", ".scale", ".zero")) and "norm" not in name:
            np.testing.assert_array_equal(leaf, found[name], err_msg=name)
    assert one.dtype == jnp.float32 and other.dtype == jnp.bfloat16


def test_a_group_has_one_device():
    sharded = ModelSpec(97, 64, 2, 4, 2, 32, 128, 64, weights="int4")
    assert mesh.axes(mesh.Size(1, 2), sharded) == (1, 2, 1)
    with pytest.raises(InputError, match="128 inputs of a matrix in int4 are groups of 32, which 8 devices"):
        mesh.axes(mesh.Size(1, 8), sharded)
    with mesh.on(mesh.imagined(mesh.Size(1, 2), sharded)):
        split = mesh.weights(
            hf.abstract(sharded, jnp.float32)[1].unflatten(hf.abstract(sharded, jnp.float32)[0].values())
        )
    specs, _ = hf.by_path(split)
    for leaf in ("codes", "scale", "zero"):
        assert specs[f"layers.0.mlp.down.kernel.{leaf}"] == P(("heads", "copies"))
        assert specs[f"layers.0.attention.q.kernel.{leaf}"] == P(None, "heads")
    assert specs["layers.0.attention_norm.scale"] == P()


@pytest.mark.parametrize(
    "name, weights, words",
    [
        ("llama_gqa", "int4", "matrices of 48 inputs cannot be cut into groups of 32"),
        ("falcon_7b", "int3", "expected one of int8, int4"),
    ],
)
def test_what_cannot_be_is_refused(name, weights, words, tmp_path):
    path = golden.write_checkpoint(name, tmp_path / "model")
    with pytest.raises(InputError, match=words) as error:
        kvjax.load(path, weights=weights)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, weights", [("llama_tied", "int8"), ("falcon_7b", "int4"), ("gpt_oss", "int4")])
def test_a_conversion_holds_what_loading_makes(name, weights, tmp_path):
    source, small = checkpoint(name, tmp_path / "source"), tmp_path / "small"
    convert(source, small, weights=weights)
    expected = load_model(source, jnp.float32, weights=weights)[0]
    same(load_model(str(small), jnp.float32)[0], expected)
    assert orbax.read_spec(small) == expected.spec
    convert(source, tmp_path / "plain")
    same(load_model(str(tmp_path / "plain"), jnp.float32, weights=weights)[0], expected)
    convert(str(tmp_path / "plain"), tmp_path / "again", weights=weights)
    same(load_model(str(tmp_path / "again"), jnp.float32)[0], expected)
    convert(str(small), tmp_path / "half", "bfloat16")
    half, _ = hf.by_path(load_model(str(tmp_path / "half"), jnp.float32)[0])
    for path, leaf in hf.by_path(expected)[0].items():
        if path.endswith(quantized.LEAVES):
            np.testing.assert_array_equal(half[path], leaf)
    assert fingerprint(small) == fingerprint(tmp_path / "again") != fingerprint(tmp_path / "plain")


def test_codes_that_are_damaged_are_found(tmp_path):
    convert(checkpoint("falcon_7b", tmp_path / "source"), tmp_path / "small", weights="int4")
    file = max((tmp_path / "small" / "params").rglob("*"), key=lambda file: file.is_file() and file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match="checksum is another"):
        load_model(str(tmp_path / "small"), jnp.float32)


def test_weights_of_few_bits_are_not_made_twice_nor_trained(tmp_path):
    source, small = checkpoint("llama_tied", tmp_path / "source"), tmp_path / "small"
    convert(source, small, weights="int8")
    for refused in (
        lambda: load_model(str(small), weights="int4"),
        lambda: convert(str(small), tmp_path / "other", weights="int4"),
        lambda: convert(str(small), tmp_path / "other"),
    ):
        with pytest.raises(InputError, match="int8") as error:
            refused()
        assert "\n" not in str(error.value)
    about = json.loads((small / orbax.ABOUT).read_text())
    (small / orbax.ABOUT).write_text(json.dumps(about | {"weights": "int3"}))
    with pytest.raises(InputError, match="weights = 'int3', expected one of int8, int4"):
        load_model(str(small))


def test_low_rank_factors_stay_numbers(tmp_path):
    source, small = checkpoint("llama_tied", tmp_path / "source"), tmp_path / "small"
    convert(source, small, low_rank=ranks.LowRankOptions(ranks.parse("keep=50%"), None, "plain"), weights="int4")
    model, _ = load_model(str(small), jnp.float32)
    found, _ = hf.by_path(model)
    assert found["layers.0.attention.k.down"].dtype == jnp.float32
    assert found["layers.0.attention.q.kernel.codes"].dtype == jnp.uint8
    assert np.isfinite(forward(model, jnp.arange(12)[None])).all()


@pytest.mark.parametrize("weights", FORMATS)
def test_a_plan_counts_the_bytes_of_codes_and_the_products_of_numbers(weights):
    kept = replace(NAMED["llama-3.2-1b"], num_layers=2, vocab_size=1024, embed_dim=256, mlp_dim=512)
    recipe = kvjax.methods.full()
    plan = lambda spec: Setting(spec, "float32", recipe, 256, 16, 1, "gpu")
    model = Decoder(quantized.asked(kept, weights), dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert sum(estimate.weights(plan(model.spec))) == sum(x.nbytes for x in jax.tree.leaves(model))
    few, many = (estimate.bound(plan(spec), find("l4")._replace(flops=1)) for spec in (model.spec, kept))
    assert few.limit == many.limit == "compute" and few.step_s == many.step_s


def test_llama_8b_with_its_whole_context_fits_into_16_gb(capsys):
    line = ["--model", "llama-3.1-8b", "--context", "131072", "--estimate", "--json"]

    def plan(*flags: str) -> dict:
        main([*line, *flags])
        return json.loads(capsys.readouterr().out)["plans"][0]

    for chip, dtype in (("v5e", "bfloat16"), ("t4", "float16")):
        on = ("--chip", chip, "--dtype", dtype, "--method", "snapkv", "--budget", "20%", "--store", "int4")
        assert plan(*on, "--weights", "int4")["fits"] and not plan(*on)["fits"]
