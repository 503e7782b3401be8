"""GGUF files: the same model, tokens and settings as the Hugging Face checkpoint that llama.cpp would convert."""

import dataclasses
import itertools
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import gguf as package
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

import kvjax
from kvjax.checkpoint import gguf, hf, mxfp4
from kvjax.checkpoint.convert import convert
from kvjax.checkpoint.identity import fingerprint
from kvjax.checkpoint.load import load_model
from kvjax.errors import InputError
from kvjax.files import gguf as header
from kvjax.generation.model import find_stop
from kvjax.models import gguf_config
from kvjax.models.decoder import forward
from kvjax.models.hf_config import read_config
from kvjax.models.tokenizer import Tokenizer
from tests import golden
from tests.lib import gguf_files

ROOT = Path(kvjax.__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
TEXTS = [
    "",
    " ",
    "\n",
    "Hello world, it's 12345 tokens; WE'LL see!",
    " two  spaces ",
    "naïve café e\u0301",
    "你好，世界 한국어 مرحبا",
    "🙂 family 👩‍👩‍👧",
    "a\nb\tc\r\n\n\n   d",
    "def f(x):\n    return x**2 # $3.14\n",
    "x" + " " * 40 + "y",
    "XMLHttpRequest HTTPServer iPhone don'T",
    "१२३ ٣٤٥ ½",
    "<s>[INST] hi [/INST]</s> <s>",
]


def hugging_face(folder: Path, name: str) -> Path:
    """What a golden model's GGUF file is made from."""
    config, weights, _ = gguf_files.golden_case(name)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({key: array.astype(np.float32) for key, array in weights.items()}, folder / hf.SINGLE)
    return folder


def arrays(decoder) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf, np.float32) for name, leaf in hf.by_path(decoder)[0].items()}


def assert_same(first, second, tolerance=0.0) -> None:
    a, b = arrays(first), arrays(second)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=tolerance, err_msg=name)


def refusal(path: Path) -> str:
    """The line that a file is refused with, by whatever reads it."""
    with pytest.raises(InputError) as error:
        kvjax.load(path, dtype=jnp.float32)
    line = str(error.value)
    assert line.isprintable() and str(path.parent) in line, line
    return line


# --- weights and configuration ---


@pytest.mark.parametrize("name", gguf_files.NAMES)
def test_a_file_is_the_model_that_it_was_made_from(tmp_path, name):
    file = gguf_files.write_golden(name, tmp_path / "model.gguf")
    found, source = hf.load(file, jnp.float32), hf.load(hugging_face(tmp_path / "source", name), jnp.float32)
    assert_same(found, source, 3e-7 if "gemma" in name else 0.0)  # norms have had 1 added
    fitted = ("family", "rope") if source.spec.rope.type in ("llama3", "longrope") else ("family",)
    differs = {field.name for field in dataclasses.fields(found.spec) if field.name not in fitted}
    for field in differs:
        expected = getattr(source.spec, field)
        assert getattr(found.spec, field) == (pytest.approx(expected) if isinstance(expected, float) else expected)
    if name in gguf_files.AS_THEY_ARE:
        expected = golden.load(name)
        logits = jax.jit(forward)(found, jnp.asarray(expected.prompt)[None])[0, -1]
        np.testing.assert_allclose(logits, expected.logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_1", "Q4_0"])
def test_weights_are_the_numbers_that_a_type_holds(tmp_path, kind):
    file = gguf_files.write_golden("llama_gqa", tmp_path / "model.gguf", kind=kind)
    weights, source = hf.locate(file, read_config(file)), golden.load("llama_gqa").weights
    assert hf.stored_dtype(weights) == {"F16": np.float16, "BF16": jnp.bfloat16}.get(kind, np.float32)
    name, step = "layers.1.mlp.up.kernel", {"F16": 1e-3, "BF16": 8e-3, "Q8_0": 5e-3, "Q5_1": 4e-2, "Q4_0": 0.13}[kind]
    ((_, found),) = hf.read(weights, [name])
    expected = source["model.layers.1.mlp.up_proj.weight"].T.astype(np.float32)
    assert 0 < np.abs(found.astype(np.float32) - expected).max() < step * np.abs(expected).max() or kind == "F16"
    ((_, cast),) = hf.read(weights, [name], jnp.bfloat16)
    np.testing.assert_array_equal(cast, found.astype(jnp.bfloat16))


def test_an_expert_is_its_rows_of_a_quantised_tensor(tmp_path):
    config, weights, _ = gguf_files.golden_case("mixtral")
    file = gguf_files.write(tmp_path / "model.gguf", config, weights, kind="Q8_0")
    (whole,) = (tensor for tensor in header.read(file).tensors.values() if tensor.name == "blk.1.ffn_up_exps.weight")
    assert (whole.kind, whole.shape) == ("Q8_0", (4, 24, 32))
    ((_, found),) = hf.read(hf.locate(file, read_config(file)), ["layers.1.mlp.up.kernels"])
    np.testing.assert_array_equal(found.swapaxes(1, 2), gguf._read(whole, None, 0.0))


def test_experts_in_mxfp4_are_those_of_the_source(tmp_path):
    config, weights, _ = gguf_files.golden_case("gpt_oss")
    rng, packed = np.random.default_rng(0), dict(weights)
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, size, out = weights[name].shape
        blocks = rng.integers(0, 256, (experts, out, size // 32, 16), np.uint8)
        scales = rng.integers(110, 130, blocks.shape[:3], np.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        weights[name] = mxfp4.numbers(blocks, scales).astype(np.float32)
        del packed[name]
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    save_file(packed, tmp_path / "source" / hf.SINGLE)
    file = gguf_files.write(tmp_path / "model.gguf", config, weights, kind="MXFP4")  # these numbers fit
    found, source = (hf.locate(path, read_config(path)) for path in (file, tmp_path / "source"))
    kernels = [name for name in found.stored if name.endswith(".kernels")]
    assert len(kernels) == 6
    for (_, one), (_, other) in zip(hf.read(found, kernels), hf.read(source, kernels), strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", [kind.name for kind in GGMLQuantizationType if gguf._is_readable(kind.name)])
def test_every_type_is_dequantised_in_pieces_as_it_is_at_once(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(gguf, "_TOGETHER", 1000)
    known = GGMLQuantizationType[kind]
    block, width = package.GGML_QUANT_SIZES[known]
    raw = np.random.default_rng(0).integers(0, 60, (7, 512 // block * width), np.uint8)  # finite in every type
    tensor = header.Tensor(tmp_path / "data", "x", kind, (7, 512), 3, raw.nbytes)
    tensor.file.write_bytes(b"abc" + raw.tobytes())
    np.testing.assert_array_equal(gguf._read(tensor, None, 0.0), package.dequantize(raw, known))


def test_a_tied_head_and_one_of_its_own(tmp_path):
    config, weights, _ = gguf_files.golden_case("llama_mqa_tied")
    assert read_config(gguf_files.write(tmp_path / "tied.gguf", config, weights)).tie_embeddings
    weights["lm_head.weight"] = -weights["model.embed_tokens.weight"]
    found = hf.load(gguf_files.write(tmp_path / "own.gguf", config, weights), jnp.float32)
    assert not found.spec.tie_embeddings
    np.testing.assert_array_equal(found.head.kernel[...], -found.embedding[...].T)


def test_fields_that_follow_from_an_architecture(tmp_path):
    layers = {"gemma2": {46: (32 / 4) ** -0.5, 3: 16**-0.5}, "gemma3": {62: (32 / 4) ** -0.5, 12: 16**-0.5}}
    for name, cases in layers.items():
        for count, scale in cases.items():
            fields = {"attention.scale": None, "attention.sliding_window_pattern": None, "block_count": count}
            file = gguf_files.write_golden(name, tmp_path / "m.gguf", fields=fields)
            spec = read_config(file)
            assert spec.score_scale == pytest.approx(scale)
            period = 2 if name == "gemma2" else 6
            assert spec.windows == tuple(None if (i + 1) % period == 0 else 9 for i in range(count))
    everywhere = {"attention.sliding_window": None, "attention.sliding_window_pattern": None}
    assert read_config(gguf_files.write_golden("gemma3", tmp_path / "m.gguf", fields=everywhere)).windows == (None,) * 3
    periodic = {"attention.sliding_window_pattern": 3}
    assert read_config(gguf_files.write_golden("gemma3", tmp_path / "m.gguf", fields=periodic)).windows == (9, 9, None)


def test_what_only_some_files_of_an_architecture_say(tmp_path):
    spec = lambda name, **fields: read_config(gguf_files.write_golden(name, tmp_path / "m.gguf", fields=fields))
    olmo = spec("olmo3", **{"rope.scaling.yarn_attn_factor": 1.25, "rope.freq_base_swa": None})
    assert (olmo.rope.attention_factor, olmo.rope.type) == (1.25, "yarn")
    assert (olmo.window_rope.type, olmo.window_rope.theta) == ("default", olmo.rope.theta)
    every_fourth = spec("olmo3", **{"attention.sliding_window_pattern": None})
    assert every_fourth.windows == (9, 9)
    plain = spec("ministral3", **{"attention.temperature_scale": None, "rope.scaling.yarn_log_multiplier": None})
    assert (plain.rope.query_growth, plain.rope.attention_factor) == (0, pytest.approx(0.1 * np.log(4) + 1))
    silent = dict.fromkeys(("type", "factor", "original_context_length", "yarn_beta_fast"))
    unscaled = spec("gpt_oss", **{f"rope.scaling.{key}": value for key, value in silent.items()})
    assert (unscaled.rope.type, unscaled.rope.factor) == ("default", 1.0)
    assert spec("gpt_oss", **{"attention.sliding_window": 0}).windows == (None, None)
    fourth = {"ssm.conv_kernel": 4, "expert_shared_feed_forward_length": 48, "rope.scaling.finetuned": True}
    assert spec("granite", **fourth, expert_count=0) == spec("granite")


def test_dtype_and_file_in_a_directory_or_by_its_first_bytes(tmp_path):
    file = gguf_files.write_golden("llama_gqa", tmp_path / "model.gguf")
    (tmp_path / "mmproj-F16.gguf").write_bytes(b"not a language model")
    decoder, path = load_model(str(tmp_path), jnp.bfloat16)
    assert path == file and decoder.embedding[...].dtype == jnp.bfloat16
    other = file.rename(tmp_path / "model")
    assert load_model(str(other), jnp.float32)[1] == other
    gguf_files.write_golden("llama_gqa", tmp_path / "a.gguf")
    gguf_files.write_golden("llama_gqa", tmp_path / "b.gguf")
    with pytest.raises(InputError, match=r"has 2 GGUF files: give one, such as .*a\.gguf"):
        hf.resolve(str(tmp_path))


def test_a_model_in_parts(tmp_path):
    gguf_files.write_golden("llama_gqa", tmp_path / "model.gguf", per_file=7)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3 and files[0].name == "model-00001-of-00003.gguf"
    (tmp_path / "one").mkdir()
    whole = gguf_files.write_golden("llama_gqa", tmp_path / "one" / "model.gguf")
    for given in (files[0], files[2], tmp_path):
        found, path = load_model(str(given), jnp.float32)
        assert path == files[0]
        assert_same(found, hf.load(whole, jnp.float32))
    files[1].rename(tmp_path / "away")
    assert "model-00002-of-00003.gguf: is missing" in refusal(files[0])
    files[2].rename(files[1])
    (tmp_path / "away").rename(files[2])
    assert "is not part 2 of 3 of a model" in refusal(files[0])


def test_a_hub_id_may_name_a_file(asked, tmp_path):
    gguf_files.write_golden("llama_gqa", tmp_path / "q.gguf")
    assert hf.resolve("org/model-GGUF/q.gguf") == tmp_path / "q.gguf"
    assert (asked["name"], asked["allow_patterns"]) == ("org/model-GGUF", ["q.gguf"])


@pytest.mark.parametrize("name", ["llama_biases", "gemma2"])
def test_conversion_says_what_the_file_says(tmp_path, name):
    file = gguf_files.write_golden(name, tmp_path / "model.gguf", fields=VOCABULARY)
    convert(str(file), tmp_path / "dst")
    found, source = kvjax.load(tmp_path / "dst", dtype=jnp.float32), kvjax.load(file, dtype=jnp.float32)
    assert_same(found.decoder, source.decoder)
    assert (found.spec, found.stop) == (source.spec, source.stop)
    for text in TEXTS:
        assert found.tokenizer.encode(text) == source.tokenizer.encode(text)
    assert fingerprint(file) == fingerprint(file) != fingerprint(tmp_path / "dst")
    other = gguf_files.write_golden(name, tmp_path / "other.gguf", fields=VOCABULARY, kind="F16")
    assert fingerprint(other) != fingerprint(file)


# --- tokenizers ---

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [*LETTERS, "he", "<s>", "</s>"],
    "tokenizer.ggml.token_type": [1] * 257 + [3, 3],
    "tokenizer.ggml.merges": ["h e"],
    "tokenizer.ggml.bos_token_id": 257,
    "tokenizer.ggml.eos_token_id": 58,
}
CORPUS = (ROOT / "README.md").read_text("utf-8").splitlines(keepends=True) + TEXTS * 5
# The rules in the models' own tokenizer.json.
SMALL_CASE = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
LARGE_CASE = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
RULES = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "tekken": rf"{SMALL_CASE}|{LARGE_CASE}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt-4o": rf"{SMALL_CASE}(?i:'s|'t|'re|'ve|'m|'ll|'d)?|{LARGE_CASE}(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "smollm": None,
    "gpt-2": None,
    "falcon": None,
}


def steps_of(pre: str):
    """How a model's own tokenizer.json cuts a text."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if RULES[pre] is not None:
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(RULES[pre]), "isolated"), bytes_only])
    three = pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated")
    return {
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level]),
        "gpt-2": level,
        "falcon": pre_tokenizers.Sequence(
            [pre_tokenizers.Punctuation("contiguous"), level, pre_tokenizers.Digits(individual_digits=False), three]
        ),
    }[pre]


def trained(pre: str) -> Backend:
    """A byte-level tokenizer whose merges cross every border that another rule would set."""
    backend = Backend(models.BPE(ignore_merges=pre in ("llama-bpe", "tekken")))
    backend.normalizer = normalizers.NFC() if pre == "qwen2" else None
    backend.pre_tokenizer, backend.decoder = steps_of(pre), decoders.ByteLevel()
    special = [AddedToken("<s>", special=True), AddedToken("</s>", special=True)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=LETTERS, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("  ", normalized=False)])
    if pre in ("llama-bpe", "tekken"):
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


def fields_of(backend: Backend) -> dict[str, object]:
    """The fields that llama.cpp's conversion writes for a byte-level tokenizer."""
    model, added = json.loads(backend.to_str())["model"], backend.get_added_tokens_decoder()
    tokens = [backend.id_to_token(i) for i in range(backend.get_vocab_size())]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            1 if i not in added else 3 if added[i].special else 4 for i in range(len(tokens))
        ],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def load_tokenizer(folder: Path, fields: dict[str, object]) -> Tokenizer:
    found = Tokenizer.load(gguf_files.write_golden("llama_gqa", folder / "model.gguf", fields=fields))
    assert found is not None
    return found


@pytest.mark.parametrize("pre", RULES)
def test_byte_level_tokens_are_those_of_the_source(tmp_path, pre):
    backend = trained(pre)
    found = load_tokenizer(tmp_path, fields_of(backend) | {"tokenizer.ggml.pre": pre})
    for text in [*TEXTS, "a <think> b</s>", *CORPUS[:60]]:
        ids = backend.encode(text).ids
        assert found.encode(text) == ids, text
        assert found.decode(ids) == backend.decode(ids)
    assert found.end == 1 and found.is_special(0) and not found.is_special(backend.token_to_id("<think>"))


def sentence_piece(text: str, scores: dict[str, float]) -> list[str]:
    """The definition: of all neighbours that make a token those with the best score are joined, the first of them."""
    pieces = list(text)
    while True:
        joined = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in scores]
        if not joined:
            return pieces
        i = -max(joined)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_piece_tokens_are_those_of_the_definition(tmp_path, prefix):
    bytes_of = [f"<0x{i:02X}>" for i in range(256)]
    words = [
        "▁t",
        "he",
        "▁the",
        "in",
        "▁a",
        "er",
        "ing",
        "▁to",
        "▁i",
        "ken",
        "▁token",
        "to",
        "▁▁",
        "▁two",
        "wor",
        "ld",
        "llo",
        "hello",
    ]
    scores = {word: -float(rank) for rank, word in enumerate(["to", "he", *sorted({*words} - {"to", "he"}, key=len)])}
    scores |= {letter: -100.0 - i for i, letter in enumerate("▁abcdefghijklmnopqrstuvwxyzï世")}
    tokens = ["<unk>", "<s>", "</s>", *bytes_of, *scores, "[INST]", "  "]
    found = load_tokenizer(tmp_path, {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(scores) + [4, 4],
        "tokenizer.ggml.scores": [0.0] * 259 + list(scores.values()) + [-1000.0] * 2,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
    })  # fmt: skip
    for text in ["hello world", "the token in two", " a", "naïve 世界 🙂", "to tokening", "the\nthe"]:
        pieces = sentence_piece(("▁" if prefix else "") + text.replace(" ", "▁"), scores)
        expected = [p if p in scores else [f"<0x{b:02X}>" for b in p.encode()] for p in pieces]
        flat = [token for p in expected for token in ([p] if isinstance(p, str) else p)]
        ids = found.encode(text)
        assert [found.name(i) for i in ids] == ["<s>", *flat]
        assert found.decode(ids) == text
    whole = [found.name(i) for i in found.encode("a  b[INST]", special=False)]
    assert whole == (["▁a", "  ", "▁", "b", "[INST]"] if prefix else ["a", "  ", "b", "[INST]"])


def test_ends_and_templates(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    fields = VOCABULARY | {
        "tokenizer.ggml.tokens": [*VOCABULARY["tokenizer.ggml.tokens"], "<|im_end|>", "<end_of_turn>"],
        "tokenizer.ggml.token_type": [1] * 257 + [3] * 4,
        "tokenizer.chat_template": template,
        "general.sampling.temp": 0.7,
    }
    file = gguf_files.write_golden("llama_gqa", tmp_path / "m.gguf", fields=fields)
    found = Tokenizer.load(file)
    assert found.render([{"role": "user", "content": "hi"}]) == "<s>hi<|im_end|>"
    content = gguf_config.generation(header.read(file))
    assert content == {
        "eos_token_id": [58, 259],
        "do_sample": True,
        "temperature": 0.7,
    }  # the template's, not the other one
    fields |= {"tokenizer.ggml.eot_token_id": 60, "tokenizer.ggml.eos_token_id": 58}
    file = gguf_files.write_golden("llama_gqa", tmp_path / "m.gguf", fields=fields)
    source = "tokenizer.ggml.eos_token_id, tokenizer.ggml.eot_token_id"
    assert find_stop(file, 97, Tokenizer.load(file)) == ((58, 60), source)
    assert Tokenizer.load(gguf_files.write_golden("llama_gqa", tmp_path / "none.gguf")) is None


# --- refused ---


@pytest.mark.parametrize("fields, words", [
    ({"general.architecture": "bert"}, "general.architecture = 'bert'; kvjax reads llama"),
    ({"general.type": "mmproj"}, "holds no language model"),
    ({"embedding_length": None}, "has no llama.embedding_length"),
    ({"block_count": 3}, "has weights of 2 layers, config.json gives 3"),
    ({"embedding_length": 2**31}, "read as config.json: hidden_size = 2147483648"),
    ({"attention.head_count": "4"}, "num_attention_heads = '4', expected a positive integer"),
    ({"attention.head_count": [4, 2], "attention.key_length": None, "attention.value_length": None},
     "num_attention_heads = [4, 2], expected a positive integer"),
    ({"attention.head_count_kv": [2, 4]}, "num_key_value_heads = [2, 4]"),
    ({"attention.value_length": 4}, "llama_attention_value_length = 4 is not supported"),
    ({"attention.layer_norm_rms_epsilon": float("nan")}, "rms_norm_eps = nan"),
    ({"rope.dimension_count": 4}, "partial_rotary_factor = 0.5 is not supported for llama models"),
    ({"rope.scaling.type": "ntk", "rope.scaling.factor": 2.0}, "rope_scaling.rope_type = 'ntk' is not supported"),
    ({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.attn_factor": 0.5},
     "llama_rope_scaling_attn_factor = 0.5"),
    ({"attention.clamp_kqv": 8.0}, "llama_attention_clamp_kqv = 8.0 is not supported"),
    ({"hidden_size": 64}, "llama_hidden_size = 64 is not supported"),
    ({"expert_count": 8}, "has no llama.expert_used_count"),
    (VOCABULARY | {"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model = 'bert'; kvjax reads gpt2 and llama"),
    (VOCABULARY | {"tokenizer.ggml.pre": "default"}, "tokenizer.ggml.pre = 'default'"),
    (VOCABULARY | {"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre = None"),
    (VOCABULARY | {"tokenizer.ggml.merges": ["h e", "x y"]}, "joins 'x' and 'y', which makes no token"),
    (VOCABULARY | {"tokenizer.ggml.merges": None}, "has no list of texts tokenizer.ggml.merges"),
    (VOCABULARY | {"tokenizer.ggml.tokens": ["a"] * 259}, "token 'a' is in tokenizer.ggml.tokens twice"),
    (VOCABULARY | {"tokenizer.ggml.token_type": [1]}, "token_type is not a list of 259 finite numbers"),
    (VOCABULARY | {"tokenizer.ggml.eos_token_id": 999}, "eos_token_id = "),
    (VOCABULARY | {"tokenizer.ggml.model": "llama"}, "has no tokenizer.ggml.scores"),
    (VOCABULARY | {"tokenizer.chat_template": 5}, "chat_template is not a text"),
])  # fmt: skip
def test_what_cannot_be_done_right_is_refused(tmp_path, fields, words):
    assert words in refusal(gguf_files.write_golden("llama_gqa", tmp_path / "model.gguf", fields=fields))


@pytest.mark.parametrize("name, fields, words", [
    ("granite", {"rope.scaling.finetuned": False}, "granite_rope_scaling_finetuned = False is not supported"),
    ("granite", {"attention.scale": None}, "has no granite.attention.scale"),
    ("granite", {"expert_count": 4}, "granite_expert_count = 4 is not supported"),
    ("olmo3", {"rope.freq_base": None}, "has no olmo2.rope.freq_base"),
    ("olmo3", {"attention.sliding_window_pattern": "all"}, "olmo2_attention_sliding_window_pattern = 'all'"),
    ("ministral3", {"attention.temperature_length": 16}, "mistral3_attention_temperature_length = 16"),
    ("ministral3", {"rope.scaling.type": "linear"}, "is not supported for ministral3 models"),
    ("mixtral", {"expert_count": 3}, "experts.0.w1.weight is missing"),
    ("mixtral", {"expert_count": 2**31}, "num_local_experts = 2147483648"),
    ("mixtral", {"expert_gating_func": 2}, "llama_expert_gating_func = 2 is not supported for mixtral models"),
    ("gpt_oss", {"attention.sliding_window": None}, "has no gpt-oss.attention.sliding_window"),
    ("gpt_oss", {"expert_count": 3}, "ffn_down_exps.bias has shape [4, 32], config.json gives [3, 32]"),
    ("qwen3_moe", {"expert_count": 0}, "num_local_experts = 0"),
    ("qwen3_moe", {"expert_feed_forward_length": None}, "has no qwen3moe.expert_feed_forward_length"),
])  # fmt: skip
def test_what_an_architecture_does_not_have_is_refused(tmp_path, name, fields, words):
    assert words in refusal(gguf_files.write_golden(name, tmp_path / "model.gguf", fields=fields))


def test_a_field_may_be_ignored(tmp_path):
    file = gguf_files.write_golden("llama_gqa", tmp_path / "model.gguf", fields={"attention.clamp_kqv": 8.0})
    assert kvjax.load(file, ignore_config=["llama_attention_clamp_kqv"]).spec.num_layers == 2


def edited(file: Path, at: bytes, new: bytes, after: int = 0) -> Path:
    """The file with other bytes, so many after a mark."""
    raw = bytearray(file.read_bytes())
    place = raw.index(at) + len(at) + after
    raw[place : place + len(new)] = new
    file.write_bytes(raw)
    return file


@pytest.mark.parametrize("at, new, after, words", [
    (b"", b"GGML", 0, "does not begin with GGUF"),
    (b"GGUF", struct.pack("<I", 1), 0, "is GGUF version 1; kvjax reads little-endian files of version 2 and 3"),
    (b"GGUF", struct.pack(">I", 3), 0, "is big-endian"),
    (b"GGUF", struct.pack("<Q", 2**62), 4, "it claims 4,611,686,018,427,387,904 tensors"),
    (b"GGUF", struct.pack("<Q", 2**20), 12, "it claims 1,048,576 fields"),
    (b"GGUF", struct.pack("<Q", 2**60), 20, "1,152,921,504,606,846,976 bytes are to follow"),
    (b"general.architecture", struct.pack("<Q", 2**60), 4, "bytes are to follow"),
    (b"general.architecture", struct.pack("<I", 77), 0, "is of an unknown type"),
    (b"tokenizer.ggml.token_type", struct.pack("<Q", 2**61), 8, "it claims 2,305,843,009,213,693,952 numbers"),
    (b"tokenizer.ggml.tokens", struct.pack("<I", 9), 4, "is of an unknown type"),
    (b"general.architecture", b"\xff", 12, "is not UTF-8"),
    (b"llama.block_count", b"x", -1, "has no llama.block_count"),
    (b"token_embd.weight", struct.pack("<I", 5), 0, "tensor token_embd.weight has 5 dimensions"),
    (b"token_embd.weight", struct.pack("<Q", 0), 4, "tensor token_embd.weight has shape [97, 0]"),
    (b"token_embd.weight", struct.pack("<QQ", 2**63, 2**63), 4, "tensor token_embd.weight has"),
    (b"token_embd.weight", struct.pack("<I", 99), 20, "is of type 99, which the gguf package does not know"),
    (b"token_embd.weight", struct.pack("<I", 26), 20, "token_embd.weight is I32, which nothing here dequantises"),
    (b"token_embd.weight", struct.pack("<Q", 8), 24, "tensor token_embd.weight has 12,416 bytes at"),
    (b"token_embd.weight", struct.pack("<Q", 2**62), 24, "tensor token_embd.weight has 12,416 bytes at"),
    (b"blk.0.ffn_norm.weight", struct.pack("<Q", 0), 16, "overlaps another"),
    (b"blk.0.ffn_norm.weight", b"blk.1", -21, "is there twice"),
    (b"blk.0.ffn_norm.weight", b"x", -21, "tensor model.layers.0.post_attention_layernorm.weight is missing"),
])  # fmt: skip
def test_damaged_files_are_one_line(tmp_path, at, new, after, words):
    file = gguf_files.write_golden("llama_gqa", tmp_path / "model.gguf", fields=VOCABULARY)
    line = refusal(edited(file, at, new, after))
    assert words in line


@pytest.mark.parametrize("name, tensor, missing", [
    ("gpt_oss", b"blk.0.ffn_up_exps.weight", "mlp.experts.gate_up_proj is missing"),
    ("gpt_oss", b"blk.1.attn_sinks.weight", "self_attn.sinks is missing"),
    ("mixtral", b"blk.0.ffn_down_exps.weight", "block_sparse_moe.experts.0.w2.weight is missing"),
])  # fmt: skip
def test_a_tensor_of_an_unknown_name(tmp_path, name, tensor, missing):
    file = gguf_files.write_golden(name, tmp_path / "model.gguf")
    assert missing in refusal(edited(file, tensor, b"X", -len(b".weight") - 1))


def test_truncated_empty_and_other_files(tmp_path):
    file = gguf_files.write_golden("llama_gqa", tmp_path / "model.gguf")
    whole = file.read_bytes()
    for size in (0, 3, 4, 10, 24, 100, 1000, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert "is truncated or not a GGUF file" in refusal(file)
    file.write_text("# This is a text\n" * 100)
    assert "does not begin with GGUF" in refusal(file)


def test_weights_that_are_not_finite(tmp_path):
    config, weights, _ = gguf_files.golden_case("llama_gqa")
    weights["model.norm.weight"] = np.full(32, np.nan, np.float32)
    file = gguf_files.write(tmp_path / "model.gguf", config, weights)
    assert "tensor output_norm.weight has NaN or infinite weights" in refusal(file)


@pytest.mark.parametrize("command", [
    ["kvjax.generate", "--prompt-tokens", "1,2,3", "--max-new-tokens", "2", "--model"],
    ["kvjax.inspect", "--dry-run", "--context", "64", "--model"],
    ["kvjax.plan", "--estimate", "--chip", "h200", "--context", "64", "--new-tokens", "8", "--model"],
])  # fmt: skip
def test_commands_take_a_file(tmp_path, command):
    file = gguf_files.write_golden("llama_gqa", tmp_path / "model.gguf", fields=VOCABULARY)
    done = subprocess.run([sys.executable, "-m", *command, file], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
