"""`config.json` of every family and dialect into a `ModelSpec`, and what is refused."""

import json
import math

import golden
import pytest

from kvjax.errors import InputError
from kvjax.models.hf_config import FAMILIES, parse_config, read_config, read_generation_config
from kvjax.spec import RopeSpec

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [1.0, 4.0]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


def refusal(config, *words, ignore=()):
    """The message of the error for a config; it is one line and has every word."""
    with pytest.raises(InputError) as error:
        parse_config(config, ignore)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def test_defaults_are_the_families_own():
    llama, mistral, qwen2, qwen3, internlm2, *_ = (parse_config({"model_type": name}) for name in FAMILIES)
    assert (llama.vocab_size, llama.embed_dim, llama.mlp_dim, llama.num_layers) == (32000, 4096, 11008, 32)
    assert (llama.num_heads, llama.num_kv_heads, llama.head_dim, llama.max_position) == (32, 32, 128, 2048)
    assert (llama.norm_eps, llama.rope, llama.tie_embeddings) == (1e-6, RopeSpec(10000.0), False)
    assert (mistral.num_kv_heads, mistral.mlp_dim, mistral.max_position) == (8, 14336, 131072)
    assert mistral.windows == (4096,) * 32
    assert (qwen2.vocab_size, qwen2.mlp_dim, qwen2.num_kv_heads, qwen2.windows) == (151936, 22016, 32, ())
    assert (qwen3.head_dim, qwen3.qk_norm, llama.qk_norm) == (128, True, False)
    assert (internlm2.vocab_size, internlm2.num_kv_heads) == (103168, 32)
    biases = [(s.qkv_bias, s.o_bias, s.mlp_bias) for s in (llama, mistral, qwen2, qwen3, internlm2)]
    assert biases == [(False,) * 3, (False,) * 3, (True, False, False), (False,) * 3, (True, True, False)]


def test_fields_are_read():
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_theta": 5e5,
    }
    spec = parse_config(config)
    assert (spec.vocab_size, spec.embed_dim, spec.mlp_dim, spec.num_layers) == (97, 32, 48, 3)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.max_position) == (4, 2, 16, 64)
    assert (spec.norm_eps, spec.tie_embeddings, spec.rope.theta) == (1e-5, True, 5e5)
    assert (spec.qkv_bias, spec.o_bias, spec.mlp_bias) == (True, True, True)
    qwen3 = parse_config({"model_type": "qwen3", "attention_bias": True})
    assert qwen3.qkv_bias and qwen3.o_bias


def test_null_shares():
    spec = parse_config({"model_type": "mistral", "num_key_value_heads": None, "head_dim": None})
    assert (spec.num_kv_heads, spec.head_dim) == (32, 128)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 512}},
            {"rope_parameters": {"rope_theta": 5e5, "original_max_position_embeddings": 512} | LLAMA3},
        ),
        ({"rope_scaling": YARN}, {"rope_parameters": YARN}),
    ],
)
def test_both_dialects_agree(old, new):
    first, second = (parse_config({"model_type": "llama", "max_position_embeddings": 4096} | c) for c in (old, new))
    assert first == second
    assert first.rope.theta == old.get("rope_theta", 10000.0)


def test_rope_types():
    def rope(block, **outer):
        spec = parse_config({"model_type": "llama", "max_position_embeddings": 4096, "rope_scaling": block} | outer)
        return spec.rope, spec.max_position

    assert rope({"type": "linear", "factor": 2}) == (RopeSpec(1e4, "linear", 2.0, 4096), 8192)
    assert rope({"type": "dynamic", "factor": 2.5}) == (RopeSpec(1e4, "dynamic", 2.5, 4096), 10240)
    llama3 = RopeSpec(1e4, "llama3", 8.0, 512, 1.0, 4.0)
    assert rope(LLAMA3 | {"original_max_position_embeddings": 512}) == (llama3, 4096)
    assert rope(LLAMA3)[0].original_max_position == 4096
    assert rope(LLAMA3, original_max_position_embeddings=256)[0].original_max_position == 256
    # `rope_type` wins over `type`, the block's theta over the outer one, `rope_scaling` over `rope_parameters`.
    assert rope({"type": "linear", "rope_type": "dynamic", "factor": 2.0})[0].type == "dynamic"
    assert rope({"rope_type": "default", "rope_theta": 7.0}, rope_theta=9.0)[0].theta == 7.0
    assert (
        rope({"type": "linear", "factor": 2.0}, rope_parameters={"rope_type": "dynamic", "factor": 3.0})[0].factor == 2
    )


def test_yarn():
    def yarn(**fields):
        spec = parse_config({"model_type": "llama", "max_position_embeddings": 4096, "rope_scaling": YARN | fields})
        return spec.rope, spec.max_position

    plain, limit = yarn()
    assert plain.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    assert (plain.beta_fast, plain.beta_slow, plain.truncate, plain.original_max_position) == (32.0, 1.0, True, 1024)
    assert limit == 4096
    assert yarn(attention_factor=1.5)[0].attention_factor == 1.5
    both = yarn(mscale=0.7, mscale_all_dim=1.3)[0].attention_factor
    assert both == pytest.approx((0.07 * math.log(4) + 1) / (0.13 * math.log(4) + 1))
    assert yarn(mscale=0.7)[0].attention_factor == plain.attention_factor
    assert yarn(mscale=0.7, mscale_all_dim=0)[0].attention_factor == plain.attention_factor
    assert yarn(factor=None)[0].factor == 4.0
    assert yarn(factor=0.5)[0].attention_factor == 1.0
    assert yarn(factor=8.0)[1] == 8192
    assert not yarn(truncate=False)[0].truncate
    assert yarn(beta_fast=None, beta_slow=2)[0].beta_slow == 2.0


def test_windows():
    def windows(family, **fields):
        return parse_config({"model_type": family, "num_hidden_layers": 4} | fields).windows

    assert windows("mistral", sliding_window=16) == (16,) * 4
    assert windows("mistral", sliding_window=None) == ()
    assert windows("mistral", sliding_window=16, layer_types=["sliding_attention"] * 4) == (16,) * 4
    assert windows("llama", layer_types=["full_attention"] * 4) == ()
    for family in ("qwen2", "qwen3"):
        assert windows(family, sliding_window=16, max_window_layers=1) == ()
        assert windows(family, sliding_window=16, use_sliding_window=True) == (None,) * 4
        used = {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}
        assert windows(family, **used) == (None, 16, 16, 16)
        types = ["sliding_attention", "full_attention"] * 2
        assert windows(family, **used, layer_types=types) == (16, None, 16, None)
        assert windows(family, use_sliding_window=True, sliding_window=None) == ()
        refusal({"model_type": family, "num_hidden_layers": 4, "layer_types": types}, "layer_types", "full_attention")
        refusal({"model_type": family, "num_hidden_layers": 3, "layer_types": types} | used, "layer_types", "3 layers")


def test_falcon():
    def falcon(**fields):
        spec = parse_config({"model_type": "falcon", "num_attention_heads": 8, "hidden_size": 64} | fields)
        return spec.num_kv_heads, spec.parallel_norms, spec.mlp_dim

    spec = parse_config({"model_type": "falcon"})
    assert (spec.vocab_size, spec.embed_dim, spec.num_heads, spec.head_dim, spec.mlp_dim) == (
        65024,
        4544,
        71,
        64,
        18176,
    )
    assert (spec.norm, spec.norm_eps, spec.activation, spec.gated_mlp, spec.tie_embeddings) == (
        ("layer", 1e-5, "gelu", False, True)
    )
    assert falcon(num_kv_heads=4) == (1, 1, 256)  # which only the new architecture reads
    assert falcon(multi_query=False, parallel_attn=False, ffn_hidden_size=80) == (8, 0, 80)
    assert falcon(new_decoder_architecture=True, num_kv_heads=4) == (4, 2, 256)
    assert falcon(new_decoder_architecture=True, multi_query=True, num_ln_in_parallel_attn=1) == (8, 1, 256)
    biased = parse_config({"model_type": "falcon", "bias": True})
    assert biased.qkv_bias and biased.o_bias and biased.mlp_bias


def test_gemma():
    spec = parse_config({"model_type": "gemma2", "num_hidden_layers": 4, "hidden_act": "gelu_pytorch_tanh"})
    assert (spec.vocab_size, spec.embed_dim, spec.mlp_dim, spec.max_position) == (256000, 2304, 9216, 8192)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.tie_embeddings) == (8, 4, 256, True)
    assert (spec.norm, spec.post_norms, spec.activation, spec.qk_norm) == ("rms+1", True, "gelu_tanh", False)
    assert (spec.embed_scale, spec.scale, spec.score_cap, spec.logit_cap) == (48.0, 1 / 16, 50.0, 30.0)
    assert (spec.windows, spec.window_rope, spec.rope.theta) == ((4096, None) * 2, None, 1e4)
    given = {"query_pre_attn_scalar": 144, "attn_logit_softcapping": None, "layer_types": ["full_attention"] * 26}
    spec = parse_config({"model_type": "gemma2"} | given)
    assert (spec.scale, spec.score_cap, spec.logit_cap, spec.windows) == (1 / 12, None, 30.0, (None,) * 26)


def test_gemma3():
    """As its checkpoints have it, and as transformers 5 writes it."""
    old = {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window_pattern": 6,
        "cache_implementation": "hybrid",
    }
    full, local = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, {"rope_type": "default", "rope_theta": 1e4}
    new = {
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
        "_sliding_window_pattern": 6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
    }
    shared = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 7}
    first, second = (parse_config(shared | fields) for fields in (old, new))
    assert first == second
    assert (first.qk_norm, first.score_cap, first.logit_cap, first.max_position) == (True, None, None, 131072)
    assert first.windows == (4096,) * 5 + (None, 4096)
    rotary = [first.rotary(layer) for layer in range(7)]
    assert rotary[5] == first.rope == RopeSpec(1e6, "linear", 8.0, 131072)
    assert {*rotary[:5], rotary[6]} == {RopeSpec(1e4)}
    bare = parse_config(shared)
    assert (bare.rope, bare.window_rope, bare.windows) == (RopeSpec(1e6), RopeSpec(1e4), first.windows)


def test_phi3():
    spec = parse_config({"model_type": "phi3"})
    assert (spec.vocab_size, spec.embed_dim, spec.num_kv_heads, spec.mlp_dim) == (32064, 3072, 32, 8192)
    assert (spec.norm_eps, spec.windows, spec.max_position) == (1e-5, (), 4096)
    small = {"model_type": "phi3", "hidden_size": 8, "num_attention_heads": 2, "sliding_window": 2047}
    assert parse_config(small).windows == (2047,) * 32
    for name in ("longrope", "su", "yarn"):  # the last two are what it was called
        spec = parse_config(small | {"rope_scaling": LONGROPE | {"rope_type": name}, "max_position_embeddings": 131072})
        assert (spec.rope.type, spec.rope.original_max_position, spec.max_position) == ("longrope", 4096, 131072)
        assert (spec.rope.short_factors, spec.rope.long_factors) == ((1.0, 1.5), (1.0, 4.0))
        assert spec.rope.attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "falcon", "alibi": True}, ["alibi = True", "rotary"]),
        ({"model_type": "falcon", "activation": "relu"}, ["activation = 'relu'", "'gelu'"]),
        ({"model_type": "falcon", "num_ln_in_parallel_attn": 2}, ["num_ln_in_parallel_attn = 2"]),
        ({"model_type": "falcon", "new_decoder_architecture": True, "parallel_attn": False}, ["parallel_attn = False"]),
        ({"model_type": "falcon", "ffn_hidden_size": 0}, ["ffn_hidden_size = 0"]),
        ({"model_type": "falcon", "layer_norm_epsilon": 0}, ["layer_norm_epsilon = 0"]),
        ({"model_type": "falcon", "num_kv_heads": 7, "new_decoder_architecture": True}, ["num_attention_heads = 71"]),
        ({"activation": "gelu"}, ["activation = 'gelu'"]),
        ({"model_type": "gemma3"}, ["'gemma3'", "gemma3_text"]),
        ({"model_type": "gemma3_text", "architectures": ["Gemma3ForConditionalGeneration"]}, ["architectures"]),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, ["attn_logit_softcapping = 50.0"]),
        ({"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1e4}}, ["rope_parameters.rope_theta"]),
        ({"model_type": "gemma3_text", "sliding_window_pattern": "x"}, ["sliding_window_pattern = 'x'"]),
        ({"model_type": "gemma2", "hidden_activation": "gelu"}, ["hidden_activation = 'gelu'", "gelu_pytorch_tanh"]),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, ["query_pre_attn_scalar = 0"]),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, ["use_bidirectional_attention = True"]),
        ({"model_type": "gemma2", "sliding_window": None}, ["sliding_window = None"]),
        ({"model_type": "phi3", "partial_rotary_factor": 0.75}, ["partial_rotary_factor = 0.75"]),
        ({"rope_scaling": LONGROPE | {"short_factor": None}}, ["rope_scaling.short_factor = None", "list"]),
        ({"rope_scaling": LONGROPE | {"long_factor": [1.0, -1.0]}}, ["rope_scaling.long_factor = -1.0"]),
        ({"rope_scaling": LONGROPE}, ["short_factor and long_factor have 2 and 2", "expected 64"]),
        ({"model_type": "gemma"}, ["'gemma'", *FAMILIES]),
        ({"model_type": ["llama"]}, ["['llama']", "unknown family"]),
        ({"model_type": None}, ["unknown family", *FAMILIES]),
        ({"model_type": None, "architectures": ["GemmaForCausalLM"]}, ["GemmaForCausalLM", "unknown family"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification", "architectures"]),
        ({"architectures": ["MistralForCausalLM"]}, ["MistralForCausalLM", "'llama'"]),
        ({"vocab_size": 0}, ["vocab_size = 0", "positive integer"]),
        ({"hidden_size": "32"}, ["hidden_size = '32'"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers = True"]),
        ({"num_hidden_layers": None}, ["num_hidden_layers = None"]),
        ({"intermediate_size": -1}, ["intermediate_size = -1"]),
        ({"max_position_embeddings": 1.5}, ["max_position_embeddings = 1.5"]),
        ({"num_key_value_heads": 5}, ["num_attention_heads = 32", "5"]),
        ({"num_attention_heads": 31}, ["hidden_size = 4096", "31"]),
        ({"head_dim": 7}, ["head_dim = 7", "odd"]),
        ({"head_dim": 0}, ["head_dim = 0"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps = 0", "positive number"]),
        ({"rms_norm_eps": None}, ["rms_norm_eps = None"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings = 'yes'"]),
        ({"rope_theta": -1.0}, ["rope_theta = -1.0"]),
        ({"rope_scaling": [1]}, ["rope_scaling = [1]"]),
        (
            {"rope_scaling": {"type": "ntk", "factor": 2.0}},
            ["'ntk'", "default, linear, dynamic, llama3, yarn, longrope"],
        ),
        ({"rope_scaling": {"type": ["linear"]}}, ["rope_scaling.rope_type = ['linear']"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope_scaling.factor = None"]),
        ({"rope_scaling": {"type": "dynamic", "factor": "2"}}, ["rope_scaling.factor = '2'"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 3}}, ["rope_scaling.beta_fast = 3"]),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": None}}, ["rope_parameters.low_freq_factor = None"]),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, ["low_freq_factor = 4.0", "high_freq_factor = 4.0"]),
        ({"rope_parameters": YARN | {"original_max_position_embeddings": 0}}, ["original_max_position_embeddings = 0"]),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor = 0.5"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ["rope_parameters.full_attention"]),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 32}, ["layer_types", "mistral"]),
        ({"model_type": "mistral", "sliding_window": 0}, ["sliding_window = 0"]),
        ({"model_type": "qwen2", "max_window_layers": None}, ["max_window_layers = None"]),
    ],
)
def test_refused_values(fields, words):
    refusal({"model_type": "llama"} | fields, *words)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_act", "gelu"),
        ("partial_rotary_factor", 0.5),
        ("quantization_config", {"bits": 4}),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("logits_scaling", 8.0),
        ("embedding_multiplier", 12.0),
        ("residual_multiplier", 0.22),
        ("sliding_window", 4096),
        ("bias", True),
        ("is_encoder_decoder", True),
        ("pruned_heads", {"0": [1]}),
        ("something_new", 0),
        ("something_new", "x"),
    ],
)
def test_unknown_fields_are_refused_unless_ignored(name, value):
    config = {"model_type": "llama", name: value}
    refusal(config, f"{name} = {value!r}", f"--ignore-config {name}")
    assert parse_config(config, [name]) == parse_config({"model_type": "llama"})


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_field_of_another_family_is_unknown(family):
    refusal({"model_type": family, "attention_bias": True}, "attention_bias = True", family)


def test_empty_and_neutral_fields_pass():
    empty = {"something_new": None, "other": False, "list": [], "object": {}, "text": ""}
    neutral = {"hidden_act": "silu", "partial_rotary_factor": 1.0, "logits_scaling": 1, "quantization_config": None}
    harmless = {
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "eos_token_id": 2,
        "temperature": 0.6,
        "pretraining_tp": 2,
    }
    assert parse_config({"model_type": "llama"} | empty | neutral | harmless) == parse_config({"model_type": "llama"})


def test_ignore_reaches_inside_and_must_name_a_field():
    config = {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1]}}
    message = refusal(config, "rope_scaling.mrope_section = [1]")
    assert "--ignore-config rope_scaling.mrope_section" in message
    assert parse_config(config, ["rope_scaling.mrope_section"]).rope.factor == 2.0
    assert "mrope_section" in config["rope_scaling"]
    refusal(config, "--ignore-config no_such", ignore=["no_such"])
    refusal(config, "--ignore-config rope_scaling.no_such", ignore=["rope_scaling.no_such"])


def test_family_without_model_type():
    assert parse_config({"architectures": ["Qwen2ForCausalLM"]}).family == "qwen2"
    assert parse_config({"model_type": "llama", "architectures": None}).family == "llama"
    assert parse_config({"model_type": "llama", "architectures": ["LLaMAForCausalLM"]}).family == "llama"


@pytest.mark.parametrize(
    ("content", "words"), [(None, "cannot read"), ("{", "is not JSON"), ("[]", "expected a JSON object")]
)
def test_unreadable_config(tmp_path, content, words):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=words):
        read_config(tmp_path)


def test_end_of_sequence_ids(tmp_path):
    assert read_generation_config(tmp_path) == ()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    assert read_generation_config(tmp_path) == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True}))
    assert read_generation_config(tmp_path) == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert read_generation_config(tmp_path) == (7, 8)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": "x"}))
    with pytest.raises(InputError, match="eos_token_id"):
        read_generation_config(tmp_path)


def test_golden_configs_cover_every_family():
    families = {parse_config(golden.load(name).config).family for name in golden.NAMES}
    assert families == set(FAMILIES)
