"""Checkpoints in and out: Hugging Face safetensors, Orbax, conversion, and everything that is refused."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import golden
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file, save_file

import kvjax.convert
from kvjax.checkpoint import hf, mxfp4, names, orbax
from kvjax.checkpoint.convert import convert
from kvjax.checkpoint.load import load_model
from kvjax.errors import InputError
from kvjax.models.decoder import forward
from kvjax.models.hf_config import read_config
from kvjax.spec import GateSpec, LatentSpec

ROOT = Path(kvjax.convert.__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.fixture
def source(tmp_path):
    return golden.write_checkpoint("llama_gqa", tmp_path / "source")


@pytest.fixture
def sharded(tmp_path):
    return golden.write_checkpoint("llama_gqa", tmp_path / "sharded", shards=3)


def refusal(path, *words):
    """The message of the error for a checkpoint directory; it is one line and has every word."""
    with pytest.raises(InputError) as error:
        hf.load(path, jnp.float32)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def edit(path, **tensors):
    """Replace tensors in `model.safetensors`; `__` in a name is a dot, None removes the tensor."""
    content = load_file(path / "model.safetensors")
    for name, value in tensors.items():
        content[name.replace("__", ".")] = value
    save_file({name: value for name, value in content.items() if value is not None}, path / "model.safetensors")


def edit_index(path, **entries):
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    for name, shard in entries.items():
        index["weight_map"][name.replace("__", ".")] = shard
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if shard is not None}
    file.write_text(json.dumps(index))


def edit_config(path, **fields):
    config = json.loads((path / "config.json").read_text()) | fields
    (path / "config.json").write_text(json.dumps(config))


def assert_same(first, second):
    """Two decoders have the same tree, dtypes and weights."""
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


# --- the same numbers as transformers ---


@pytest.mark.parametrize("name", golden.NAMES)
def test_logits_and_greedy_tokens_are_those_of_transformers(tmp_path, name):
    expected = golden.load(name)
    model = hf.load(golden.write_checkpoint(name, tmp_path), jnp.float32)
    run = jax.jit(forward)
    logits = run(model, jnp.asarray(expected.prompt)[None])[0, -1]
    np.testing.assert_allclose(logits, expected.logits, atol=1e-4, rtol=0)
    tokens = np.concatenate([expected.prompt, expected.recomputed])
    first = len(expected.prompt)
    if model.spec.rope.type == "dynamic":  # every length has its own frequencies
        said = [int(run(model, jnp.asarray(tokens[:n])[None])[0, -1].argmax()) for n in range(first, len(tokens))]
    else:
        said = run(model, jnp.asarray(tokens)[None])[0, first - 1 : -1].argmax(-1).tolist()
    assert said == expected.recomputed.tolist()
    assert len(said) == 12


def test_the_golden_files_tell_the_models_apart(tmp_path):
    """Turning a feature off moves the logits, so that the comparison above sees every feature."""
    changes = {
        "llama3_scaling": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3}},
        "llama_linear": {"rope_scaling": None},
        "llama_dynamic": {"rope_scaling": None},
        "llama_yarn": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "mistral_window": {"sliding_window": None},
        "qwen2_window": {"use_sliding_window": False, "layer_types": None},
        "qwen2_tied": {"rope_theta": 1e4},
    }
    for name, change in changes.items():
        path = golden.write_checkpoint(name, tmp_path / name)
        edit_config(path, **change)
        expected = golden.load(name)
        logits = forward(hf.load(path, jnp.float32), jnp.asarray(expected.prompt)[None])[0, -1]
        assert np.abs(logits - expected.logits).max() > 1e-2, name


def test_the_text_part_of_a_model_that_reads_images_is_read(tmp_path):
    expected, run = golden.load("gemma3"), jax.jit(forward)
    path = golden.write_checkpoint("gemma3", tmp_path)
    outer = {"model_type": "gemma3", "text_config": expected.config, "vision_config": {}}
    (path / "config.json").write_text(json.dumps(outer))
    vision = {"vision_tower.norm.weight": np.ones(3, np.float32)}
    for prefix in ("language_model.model.", "model.language_model."):
        weights = {name.replace("model.", prefix, 1): one for name, one in expected.weights.items()}
        save_file(weights | vision, path / "model.safetensors")
        logits = run(hf.load(path, jnp.float32), jnp.asarray(expected.prompt)[None])[0, -1]
        np.testing.assert_allclose(logits, expected.logits, atol=1e-4, rtol=0)
    save_file(weights | vision | {"audio_tower.norm.weight": np.ones(3, np.float32)}, path / "model.safetensors")
    refusal(path, "audio_tower.norm.weight", "has no place")


def test_experts_in_mxfp4_are_read_as_the_numbers_they_are(tmp_path):
    path, rng = golden.write_checkpoint("gpt_oss", tmp_path), np.random.default_rng(0)
    weights, quantised = load_file(path / "model.safetensors"), {}
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, outer = weights.pop(name).shape
        blocks = rng.integers(0, 256, (experts, outer, inner // 32, 16), dtype=np.uint8)
        scales = rng.integers(118, 126, blocks.shape[:3], dtype=np.uint8)
        weights[name] = np.ascontiguousarray(mxfp4.numbers(blocks, scales))
        quantised |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(weights, path / "model.safetensors")
    plain = hf.load(path, jnp.float32)
    save_file(
        {n: w for n, w in weights.items() if f"{n}_blocks" not in quantised} | quantised, path / "model.safetensors"
    )
    edit_config(path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    assert_same(hf.load(path, jnp.float32), plain)
    edit(path, model__layers__0__mlp__experts__down_proj_scales=np.ones((4, 32, 2), np.uint8))
    refusal(path, "down_proj is missing")
    edit_config(path, quantization_config={"quant_method": "gptq"})
    refusal(path, "quantization_config", "mxfp4")


# --- reading Hugging Face directories ---


def test_shards_dtypes_and_links_give_the_same_model(tmp_path, source, sharded):
    model = hf.load(source, jnp.float32)
    assert_same(hf.load(sharded, jnp.float32), model)
    half = golden.write_checkpoint("llama_gqa", tmp_path / "half", np.float16)
    assert_same(hf.load(half, jnp.float32), model)
    brain = golden.write_checkpoint("llama_gqa", tmp_path / "brain", ml_dtypes.bfloat16)
    assert_same(hf.load(brain, jnp.bfloat16), hf.load(source, jnp.bfloat16))
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, shard in enumerate(SHARDS):  # as in the hub's cache
        (sharded / shard).rename(blobs / str(number))
        (sharded / shard).symlink_to(Path("..") / "blobs" / str(number))
    assert_same(hf.load(sharded, jnp.float32), model)


def test_weights_are_transposed_in_place(source):
    model, weights = hf.load(source, jnp.float32), golden.load("llama_gqa").weights
    layer = model.layers[1]
    np.testing.assert_array_equal(layer.mlp.up.kernel[...], weights["model.layers.1.mlp.up_proj.weight"].T)
    np.testing.assert_array_equal(layer.mlp_norm.scale[...], weights["model.layers.1.post_attention_layernorm.weight"])
    np.testing.assert_array_equal(model.embedding[...], weights["model.embed_tokens.weight"])
    assert model.spec == read_config(source)


def test_loading_reads_the_largest_first(source, monkeypatch):
    sizes, put = [], jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda array: sizes.append(array.size) or put(array))
    hf.load(source, jnp.float32)
    assert len(sizes) == 21 and sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("name", ["llama_biases", "qwen2_tied", "internlm2", "falcon_7b"])
def test_parts_are_the_model_in_its_order(tmp_path, name):
    path = golden.write_checkpoint(name, tmp_path)
    spec, calls = read_config(path), []
    weights = hf.locate(path, spec)
    parts = dict(hf.read_parts(weights, progress=lambda *numbers: calls.append(numbers)))
    assert list(parts) == ["embedding", *(f"layers.{i}" for i in range(spec.num_layers)), "head"]
    assert {part: list(arrays) for part, arrays in parts.items()} == hf.parts(weights)
    assert set(parts["embedding"]) == {"embedding"}
    norm = {f"norm.{leaf}" for leaf in ("scale", "bias")[: 2 if spec.norm == "layer" else 1]}
    assert set(parts["head"]) == norm | (set() if spec.tie_embeddings else {"head.kernel"})
    assert all(target.startswith("layers.1.") for target in parts["layers.1"])
    arrays = {target: array for part in parts.values() for target, array in part.items()}
    targets, tree = hf.abstract(spec, jnp.float32)
    assert_same(jax.tree.unflatten(tree, [jnp.asarray(arrays[target]) for target in targets]), hf.load(path, "float32"))
    sizes = [array.size for array in arrays.values()]
    assert calls == [(done, sum(sizes)) for done in np.cumsum(sizes)]


def test_chosen_parameters_are_read_in_the_order_asked_for(source):
    asked = ["layers.1.attention.v.kernel", "layers.0.attention.k.kernel"]
    found = list(hf.read(hf.locate(source, read_config(source)), asked, jnp.bfloat16))
    assert [target for target, _ in found] == asked
    expected = golden.load("llama_gqa").weights["model.layers.1.self_attn.v_proj.weight"].T
    np.testing.assert_array_equal(found[0][1], expected.astype(ml_dtypes.bfloat16))


def test_harmless_extra_tensors(source):
    model = hf.load(source, jnp.float32)
    edit(source, model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(4, np.float32))
    assert_same(hf.load(source, jnp.float32), model)


def test_wrong_tensors_are_named(source):
    original = (source / "model.safetensors").read_bytes()
    name, shape = "model.layers.1.mlp.up_proj.weight", (48, 32)
    weight = np.ones(shape, np.float32)
    cases = [
        ({name: None}, [name, "is missing", "1 of 21"]),
        ({"model.extra.weight": weight}, ["model.extra.weight", "has no place"]),
        ({name: np.ones((32, 48), np.float32)}, [name, "[32, 48]", "[48, 32]"]),
        ({name: np.ones(shape, np.float64)}, [name, "F64", "F32, F16, BF16"]),
        ({name: np.ones(shape, np.int8)}, [name, "I8"]),
        ({name: np.where(np.arange(32) == 3, np.nan, weight).astype(np.float32)}, [name, "NaN or infinite"]),
        ({name: np.where(np.arange(32) == 3, np.inf, weight).astype(np.float16)}, [name, "NaN or infinite"]),
        ({name: np.where(np.arange(32) == 3, -np.inf, weight).astype(np.float32)}, [name, "NaN or infinite"]),
        ({name: np.where(np.arange(32) == 3, np.nan, weight).astype(ml_dtypes.bfloat16)}, [name, "NaN or infinite"]),
        ({"lm_head.weight": None}, ["lm_head.weight", "is missing"]),
    ]
    for tensors, words in cases:
        (source / "model.safetensors").write_bytes(original)
        edit(source, **tensors)
        refusal(source, *words)


def test_a_packed_tensor_of_the_wrong_shape_is_named(tmp_path):
    path = golden.write_checkpoint("internlm2", tmp_path / "packed")
    edit(path, model__layers__0__attention__wqkv__weight=np.ones((79, 48), np.float32))
    refusal(path, "model.layers.0.attention.wqkv.weight", "[79, 48]", "[80, 48]")


@pytest.mark.parametrize("keep", [0, 6, 1000, -1])
def test_truncated_files(source, keep):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refusal(source, "model.safetensors", "truncated")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused(source, name):
    (source / "model.safetensors").rename(source / name)
    refusal(source, name, "runs the code", "safetensors")


def test_no_weights(source):
    (source / "model.safetensors").unlink()
    refusal(source, "model.safetensors", "model.safetensors.index.json")


@pytest.mark.parametrize(
    "shard", ["/etc/x.safetensors", "../x.safetensors", "a/x.safetensors", "..", "a\\x.safetensors"]
)
def test_shards_outside_the_directory(sharded, shard):
    edit_index(sharded, lm_head__weight=shard)
    refusal(sharded, repr(shard), "plain name")


def test_index_and_shards_must_agree(sharded):
    file = sharded / "model.safetensors.index.json"
    original, listed = file.read_text(), json.loads(file.read_text())["weight_map"]
    wrong = next(shard for shard in SHARDS if shard != listed["lm_head.weight"])
    edit_index(sharded, lm_head__weight=wrong)
    refusal(sharded, "lm_head.weight", wrong, "does not have it")
    file.write_text(original)
    edit_index(sharded, lm_head__weight=None)
    refusal(sharded, "lm_head.weight", "not listed")
    file.write_text(original)
    edit_index(sharded, lm_head__weight="pytorch_model.bin")
    refusal(sharded, "pytorch_model.bin", "plain name")
    file.write_text(json.dumps({"weight_map": [1]}))
    refusal(sharded, "weight_map")
    file.write_text(original)
    (sharded / SHARDS[1]).write_bytes((sharded / SHARDS[1]).read_bytes()[:-8])
    refusal(sharded, SHARDS[1], "truncated")
    (sharded / SHARDS[1]).unlink()
    refusal(sharded, SHARDS[1], "missing")


# --- one matrix or two ---


@pytest.mark.parametrize("name", ["qwen2_tied", "falcon_7b", "gemma2"])
def test_a_head_of_its_own_counts_whatever_the_config_says(tmp_path, name, capsys):
    path = golden.write_checkpoint(name, tmp_path / "source")
    spec = read_config(path)
    embedding = load_file(path / "model.safetensors")[names.source("embedding", spec)]
    tied = hf.load(path, jnp.float32)
    edit(path, lm_head__weight=embedding.astype(np.float16))  # they fit float16
    assert hf.load(path, jnp.float32).spec == tied.spec == spec and tied.head is None
    assert capsys.readouterr().err == ""
    head = embedding.copy()
    head[-1, -1] += 1
    edit(path, lm_head__weight=head)
    model = hf.load(path, jnp.float32)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{path}: config.json calls lm_head.weight tied" in said
    np.testing.assert_array_equal(model.head.kernel[...], head.T)
    np.testing.assert_array_equal(model.embedding[...], embedding)
    convert(str(path), tmp_path / "dst")
    convert(str(tmp_path / "dst"), tmp_path / "half", "bfloat16")
    about = (tmp_path / "half" / "kvjax.json").read_text()
    (tmp_path / "half" / "kvjax.json").write_text(about.replace('"tie_embeddings": false', '"tie_embeddings": 0'))
    with pytest.raises(InputError, match="tie_embeddings = 0, expected true or false"):
        orbax.load(tmp_path / "half")
    (tmp_path / "half" / "kvjax.json").write_text(about)
    for made, dtype in (("dst", jnp.float32), ("half", jnp.bfloat16)):
        assert orbax.read_spec(tmp_path / made) == model.spec
        np.testing.assert_array_equal(orbax.load(tmp_path / made).head.kernel[...], head.T.astype(dtype))


def test_a_tied_matrix_may_have_the_heads_name(tmp_path):
    path = golden.write_checkpoint("qwen2_tied", tmp_path / "source")
    model = hf.load(path, jnp.float32)
    embedding = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    edit(path, model__embed_tokens__weight=None, lm_head__weight=embedding)
    found = hf.load(path, jnp.float32)
    assert found.spec == model.spec
    assert_same(found, model)
    convert(str(path), tmp_path / "dst")
    np.testing.assert_array_equal(orbax.load(tmp_path / "dst").embedding[...], embedding)
    edit(path, lm_head__weight=None)
    with pytest.raises(InputError, match=r"model\.embed_tokens\.weight is missing"):
        hf.load(path, jnp.float32)


def test_a_single_file_beside_an_index_is_said(tmp_path, source, capsys):
    hf.load(source, jnp.float32)
    assert capsys.readouterr().err == ""
    (source / "model.safetensors.index.json").write_text("{}")
    hf.load(source, jnp.float32)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{source}: has both model.safetensors and model.safetensors.index.json" in said


# --- names ---


def test_resolve_local(source, monkeypatch):
    assert hf.resolve(str(source)) == source
    for name in ("/no/such/place", "./absent", "absent", "a/b/c"):
        with pytest.raises(InputError, match="no such directory"):
            hf.resolve(name)
    with pytest.raises(InputError, match="is a file"):
        hf.resolve(str(source / "config.json"))
    monkeypatch.chdir(source.parent.parent)  # an existing directory that looks like a hub id
    assert hf.resolve(f"{source.parent.name}/source") == Path(source.parent.name) / "source"


def test_resolve_hub(asked, monkeypatch, tmp_path):
    import huggingface_hub

    assert hf.resolve("org/model-1.0") == tmp_path
    assert asked["name"] == "org/model-1.0"
    assert "*.safetensors" in asked["allow_patterns"] and "*.json" in asked["allow_patterns"]
    assert not any("bin" in p or p.endswith(("pt", "pth", "*")) for p in asked["allow_patterns"])

    def offline(name, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot reach the hub\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match="org/model") as error:
        hf.resolve("org/model")
    assert "cannot reach the hub" in str(error.value) and "\n" not in str(error.value)


# --- Orbax ---


@pytest.mark.parametrize("name", ["llama_biases", "qwen2_tied", "internlm2", "falcon_40b"])
def test_a_converted_model_is_the_same(tmp_path, name):
    source = golden.write_checkpoint(name, tmp_path / "source", np.float16)
    (source / "tokenizer_config.json").write_text("{}")
    (source / "weights.bin").write_text("not copied")
    convert(str(source), tmp_path / "dst")
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        assert_same(orbax.load(tmp_path / "dst", dtype), hf.load(source, dtype))
    assert_same(orbax.load(tmp_path / "dst"), hf.load(source, jnp.float16))
    files = {file.name for file in (tmp_path / "dst").iterdir()}
    assert files == {"config.json", "tokenizer_config.json", "kvjax.json", "params"}
    about = json.loads((tmp_path / "dst" / "kvjax.json").read_text())
    assert about.pop("checksums").keys() == {"embedding"}
    assert about.pop("tie_embeddings") == read_config(source).tie_embeddings
    assert about == {"format": 2, "dtype": "float16", "source": "source", "ignore_config": []}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dst", "source"]


def test_convert_to_a_dtype(tmp_path, source):
    convert(str(source), tmp_path / "dst", "bfloat16")
    assert_same(orbax.load(tmp_path / "dst"), hf.load(source, jnp.bfloat16))


def test_arrays_larger_than_the_bytes_in_flight(tmp_path, source, monkeypatch):
    monkeypatch.setattr(orbax, "_IN_FLIGHT", 64)
    convert(str(source), tmp_path / "dst")
    assert_same(orbax.load(tmp_path / "dst", jnp.bfloat16), hf.load(source, jnp.bfloat16))


def test_every_part_is_a_checkpoint_and_small_neighbours_share_one(tmp_path, source, monkeypatch):
    every = {"embedding", "layers.0", "layers.1", "head"}  # of 12, 31, 31 and 13 kB
    for together, found in ((2**20, {"embedding"}), (40000, {"embedding", "layers.1"}), (0, every)):
        monkeypatch.setattr(orbax, "_TOGETHER", together)
        dst = tmp_path / str(together)
        convert(str(source), dst)
        assert {file.name for file in (dst / "params").iterdir()} == found
        assert_same(orbax.load(dst), hf.load(source, jnp.float32))


def test_parts_are_dropped_once_written_and_notes_are_taken_last(tmp_path, source, monkeypatch):
    given: list[weakref.ref] = []
    about = {"dtype": "float32"}

    def parts():
        for name, part in hf.read_parts(hf.locate(source, read_config(source))):
            part = {target: array * 2 for target, array in part.items()}
            given.extend(weakref.ref(array) for array in part.values())
            yield name, part
            del part
            assert all(array() is None for array in given)
        about["learned"] = "last"

    monkeypatch.setattr(orbax, "_TOGETHER", 0)
    orbax.save(tmp_path / "dst", source, parts(), about)
    assert json.loads((tmp_path / "dst" / "kvjax.json").read_text())["learned"] == "last"
    doubled = jax.tree.map(lambda array: array * 2, hf.load(source, jnp.float32))
    assert_same(orbax.load(tmp_path / "dst"), doubled)


def test_a_latent_is_part_of_the_model(tmp_path, source):
    convert(str(source), tmp_path / "dst")
    assert orbax.read_spec(tmp_path / "dst") == read_config(source)
    about = json.loads((tmp_path / "dst" / "kvjax.json").read_text())
    about["latent"] = {"heads": 2, "ranks": [[3, 4], [5, 6]]}
    (tmp_path / "dst" / "kvjax.json").write_text(json.dumps(about))
    latent = LatentSpec(heads=2, ranks=((3, 4), (5, 6)))
    assert orbax.read_spec(tmp_path / "dst") == dataclasses.replace(read_config(source), latent=latent)
    with pytest.raises(InputError, match="convert the source again"):  # its parameters are not low-rank
        orbax.load(tmp_path / "dst")


DMC = {"objective": "dmc", "rate": 2.0, "window": 12, "neuron": -1, "offset": 5.0, "scale": 1.0}
NOTES = [
    ({"format": True}, "format True, this kvjax reads 2"),
    ({"ignore_config": "bias"}, "ignore_config = 'bias', expected a list of names"),
    ({"ignore_config": [1]}, r"ignore_config = \[1\]"),
    ({"dtype": "int8"}, "dtype = 'int8'"),
    ({"dtype": 16}, "dtype = 16"),
    ({"dtype": "half a float"}, "dtype = 'half a float'"),
    ({"lorc": 1}, "lorc = 1"),
    ({"latent": 3}, "latent = 3, expected heads"),
    ({"latent": None}, "latent = None"),
    ({"latent": {"heads": 2}}, "latent = {'heads': 2}"),
    ({"latent": {"heads": True, "ranks": [[3, 4], [5, 6]]}}, "latent = "),
    ({"latent": {"heads": 3, "ranks": [[3, 4], [5, 6]]}}, "latent = .*of 2 in all"),
    ({"latent": {"heads": 2, "ranks": [[3, 4]]}}, "latent.ranks = .*expected 2 pairs of 1 to 16"),
    ({"latent": {"heads": 2, "ranks": [[3, 4], [5, 0]]}}, "latent.ranks"),
    ({"latent": {"heads": 2, "ranks": [[3, 4], [5, 17]]}}, "latent.ranks"),
    ({"latent": {"heads": 2, "ranks": [[3, 4], "56"]}}, "latent.ranks"),
    ({"gate": []}, r"gate = \[\], expected an object"),
    ({"gate": {}}, "gate.objective = None, expected dmc or dms"),
    ({"gate": DMC | {"depth": 1}}, "gate = .*expected an object with objective"),
    ({"gate": DMC | {"objective": "h2o"}}, "gate.objective = 'h2o'"),
    ({"gate": DMC | {"objective": ["dmc"]}}, "gate.objective = "),
    ({"gate": DMC | {"neuron": 99}}, "gate.neuron = 99, expected null or a coordinate of a head, -8 to 7"),
    ({"gate": DMC | {"neuron": -9}}, "gate.neuron = -9"),
    ({"gate": DMC | {"neuron": False}}, "gate.neuron = False"),
    ({"gate": DMC | {"window": -1}}, "gate.window = -1"),
    ({"gate": DMC | {"window": 2**31}}, "gate.window = 2147483648"),
    ({"gate": DMC | {"rate": 0}}, "gate.rate = 0"),
    ({"gate": DMC | {"offset": float("nan")}}, "gate.offset = nan"),
    ({"gate": DMC | {"offset": -(10**400)}}, "gate.offset = -1000"),
    ({"gate": DMC | {"scale": None}}, "gate.scale = None"),
]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A converted checkpoint, whose notes tests change, and the notes."""
    path = tmp_path_factory.mktemp("converted")
    convert(str(golden.write_checkpoint("llama_gqa", path / "source")), path / "dst")
    return path / "dst", json.loads((path / "dst" / "kvjax.json").read_text())


@pytest.mark.parametrize(("fields", "message"), NOTES)
def test_notes_that_no_conversion_writes_are_refused(converted, fields, message):
    path, notes = converted
    (path / "kvjax.json").write_text(json.dumps(notes | fields))
    with pytest.raises(InputError, match=f"kvjax.json: {message}.*convert the source again"):
        orbax.read_spec(path)


def test_a_gate_is_noted_with_what_it_has(converted):
    path, notes = converted
    (path / "kvjax.json").write_text(json.dumps(notes | {"gate": {"objective": "dms", "rate": 3, "window": 0}}))
    assert orbax.read_spec(path).gate == GateSpec("dms", 3.0, 0)


def test_load_model_takes_both(tmp_path, source):
    convert(str(source), tmp_path / "dst")
    first, where = load_model(str(source))
    second, there = load_model(str(tmp_path / "dst"))
    assert (where, there, first.dtype) == (source, tmp_path / "dst", jnp.float32)
    assert_same(first, second)
    assert load_model(str(source), jnp.bfloat16)[0].dtype == jnp.bfloat16
    with pytest.raises(InputError, match="no such directory"):
        load_model(str(tmp_path / "absent"))


def test_ignored_fields_are_remembered(tmp_path, source):
    edit_config(source, something_new=1)
    with pytest.raises(InputError, match="something_new"):
        convert(str(source), tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
    convert(str(source), tmp_path / "dst", ignore=["something_new"])
    assert_same(load_model(str(tmp_path / "dst"))[0], load_model(str(source), ignore=["something_new"])[0])


def test_a_damaged_conversion_is_refused(tmp_path, source):
    dst = tmp_path / "dst"
    convert(str(source), dst)
    about = (dst / "kvjax.json").read_text()
    (dst / "kvjax.json").write_text(about.replace('"format": 2', '"format": 1'))
    with pytest.raises(InputError, match=r"format 1, this kvjax reads 2; convert the source again"):
        orbax.load(dst)
    (dst / "kvjax.json").write_text(about)
    edit_config(dst, intermediate_size=64)
    with pytest.raises(InputError, match="convert the source again"):
        orbax.load(dst)
    edit_config(dst, intermediate_size=48, num_hidden_layers=3)
    with pytest.raises(InputError, match=r"has weights of 2 layers, config\.json gives 3"):
        orbax.load(dst)
    edit_config(dst, num_hidden_layers=2)
    orbax.load(dst)
    (dst / "params" / "stray").touch()
    with pytest.raises(InputError, match="params cannot be read"):
        orbax.load(dst)
    (dst / "params" / "stray").unlink()
    (part,) = (dst / "params").iterdir()
    part.rename(dst / "part")
    with pytest.raises(InputError, match="convert the source again"):
        orbax.load(dst)
    (dst / "params").rmdir()
    with pytest.raises(InputError, match="params"):
        orbax.load(dst)


def test_a_converted_checkpoint_in_another_dtype(tmp_path, source):
    first, second = tmp_path / "first", tmp_path / "second"
    convert(str(source), first)
    convert(str(first), second, "bfloat16")
    for got, want in zip(*map(jax.tree.leaves, (orbax.load(second), orbax.load(first, jnp.bfloat16))), strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(got, want)
    assert {path.name for path in second.iterdir()} == {path.name for path in first.iterdir()}
    with pytest.raises(InputError, match="already, in bfloat16"):
        convert(str(second), tmp_path / "third", "bfloat16")


def test_convert_refuses(tmp_path, source, monkeypatch):
    convert(str(source), tmp_path / "dst")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="exists already"):
        convert(str(source), tmp_path / "dst")
    with pytest.raises(InputError, match="converted checkpoint already"):
        convert(str(tmp_path / "dst"), tmp_path / "again")
    with pytest.raises(InputError, match="int8"):
        convert(str(source), tmp_path / "again", "int8")
    edit(source, lm_head__weight=np.full((97, 32), np.nan, np.float32))
    with pytest.raises(InputError, match=r"lm_head\.weight"):
        convert(str(source), tmp_path / "again")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file"):
        convert(str(source), tmp_path / "file" / "dst")
    (tmp_path / "file").unlink()
    golden.write_checkpoint("llama_gqa", source)

    def full(path, tree):
        raise ValueError("RESOURCE_EXHAUSTED: no space left [tensorstore_spec='...']\nmore")

    monkeypatch.setattr(ocp, "save", full)
    with pytest.raises(InputError, match=r"cannot be written \(RESOURCE_EXHAUSTED: no space left\)$"):
        convert(str(source), tmp_path / "again")
    assert sorted(tmp_path.rglob("*")) == before


MEMORY = """
import sys
from pathlib import Path
from kvjax.checkpoint import orbax
from kvjax.checkpoint.convert import convert
convert(sys.argv[2], Path(sys.argv[3])) if sys.argv[1] == "convert" else orbax.load(Path(sys.argv[3]))
status = Path("/proc/self/status").read_text().splitlines()  # getrusage's peak starts at the parent's
print(next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")))
"""


@pytest.mark.slow
def test_memory_is_bounded_by_parts(tmp_path):
    """At 500 MB in parts of at most 66 MB, against the same run with next to no weights.

    Allocations from 1 MB on go back to the system when freed, as those of larger models' arrays do by default.
    """
    environment = ENVIRONMENT | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    sizes = {"small": (64, 64, 2, 64), "large": (1024, 4096, 11, 32000)}
    peak = {}
    for name, (width, inner, layers, vocab) in sizes.items():
        path = tmp_path / name
        path.mkdir()
        fields = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocab}
        (path / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 16} | fields))
        spec, rng = read_config(path), np.random.default_rng(0)
        leaves = hf.abstract(spec, jnp.bfloat16)[0].items()
        weights = {}
        for target, leaf in leaves:
            shape = names.stored_shape(target, leaf.shape, spec)
            weight = rng.integers(-99, 99, shape, np.int8).astype(ml_dtypes.bfloat16)
            weights[names.source(target, spec)] = weight
        save_file(weights, path / "model.safetensors")
        size = sum(weight.nbytes for weight in weights.values())
        for step in ("convert", "load"):
            command = [sys.executable, "-c", MEMORY, step, str(path), str(tmp_path / f"{name}.dst")]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            peak[name, step] = int(done.stdout)
    part = 32000 * 1024 * 2  # bytes of the embedding
    assert size > 450e6
    converting, loading = (peak["large", step] - peak["small", step] for step in ("convert", "load"))
    assert part < converting < 2.5 * part, converting
    assert size < loading < size + 2.5 * part, loading


# --- the command line ---


def test_command_line(tmp_path, source, capfd):
    command = [sys.executable, "-W", "error", "-m", "kvjax.convert"]
    done = subprocess.run(
        [*command, source, tmp_path / "dst", "--dtype", "bfloat16"], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and done.stdout == ""
    assert orbax.load(tmp_path / "dst").dtype == jnp.bfloat16
    with pytest.raises(SystemExit) as status:
        kvjax.convert.main([str(tmp_path / "absent"), str(tmp_path / "other")])
    assert status.value.code == 2
    message = capfd.readouterr().err
    assert message.startswith(f"kvjax.convert: error: {tmp_path / 'absent'}") and message.count("\n") == 1


def test_a_shipped_checkpoint_is_converted_by_its_name(tmp_path):
    kvjax.convert.main(["demo", str(tmp_path / "demo")])
    assert kvjax.load(tmp_path / "demo").spec == dataclasses.replace(kvjax.load().spec, profile=None)


KILLER = """
import os, signal, sys, threading, time
from pathlib import Path
import kvjax.checkpoint.convert
import kvjax.checkpoint.orbax as orbax
import kvjax.convert
moment, src, dst = sys.argv[1], sys.argv[2], Path(sys.argv[3])
stage = dst.parent / f".{dst.name}.partial" / "stage"
def die():
    os.kill(os.getpid(), signal.SIGKILL)
orbax._TOGETHER = 0  # a checkpoint per part
read_parts, rename, written = kvjax.checkpoint.convert.hf.read_parts, Path.rename, stage / "params" / "layers.0"
def reading(*args):
    for name, part in read_parts(*args):
        if written.exists():
            die()
        yield name, part
def renaming(self, target):
    if moment == "before rename":
        die()
    result = rename(self, target)
    if moment == "after rename" and Path(target) == dst:
        die()
    return result
def watching():
    while not any(stage.glob("params/layers.1*/*")):
        time.sleep(0.0002)
    die()
if moment == "reading":
    kvjax.checkpoint.convert.hf.read_parts = reading
elif moment == "writing":
    threading.Thread(target=watching, daemon=True).start()
else:
    Path.rename = renaming
kvjax.convert.main([src, str(dst), *sys.argv[4:]])
"""


@pytest.mark.parametrize(
    "flags", [[], pytest.param(["--lorc", "keep=50%", "--lorc-basis", "plain"], marks=pytest.mark.slow)]
)
def test_killed_at_any_moment(tmp_path, source, flags):
    dst, stage = tmp_path / "dst", tmp_path / ".dst.partial" / "stage"
    kvjax.convert.main([str(source), str(tmp_path / "whole"), *flags])
    model = orbax.load(tmp_path / "whole")
    for moment in ("reading", "writing", "before rename", "after rename"):
        command = [sys.executable, "-c", KILLER, moment, str(source), str(dst), *flags]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, (moment, done.stderr)
        if moment == "after rename":
            break
        assert not dst.exists() and not orbax.is_orbax(dst)
        assert (stage / "params" / "layers.0").exists()  # the next conversion clears it
        assert orbax.is_orbax(stage) == (moment == "before rename")
        if moment == "before rename":
            kvjax.convert.main([str(source), str(dst), *flags])
            assert not stage.parent.exists()
            assert_same(orbax.load(dst), model)
            dst.rename(tmp_path / "done")
    assert_same(orbax.load(dst), model)
    assert not stage.exists()
