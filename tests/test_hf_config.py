"""`config.json` of every family and dialect into a `ModelSpec`, and what is refused."""

import json
import math

import golden
import pytest
import tokenizers
from tokenizers.models import WordLevel

from kvjax.bench import models
from kvjax.cache.layout import layer_runs
from kvjax.errors import InputError
from kvjax.generation.model import find_stop
from kvjax.models.hf_config import FAMILIES, parse_config, read_config, read_generation_config, to_config
from kvjax.models.named import NAMED
from kvjax.models.tokenizer import Tokenizer
from kvjax.spec import ExpertSpec, RopeSpec

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


@pytest.mark.parametrize("name", ["llama-88m", "mistral-7b", "qwen2-7b", "qwen3-8b"])
def test_what_is_written_is_read_as_the_same_model(name):
    assert parse_config(to_config(models.SHAPES[name])) == models.SHAPES[name]


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


def test_smollm3():
    """As its checkpoint has it: every fourth layer does not turn."""
    fields = {"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "max_position_embeddings": 65536}
    fields |= {"rope_theta": 5e6, "rope_scaling": None, "max_window_layers": 28, "use_sliding_window": False}
    fields |= {"layer_types": ["full_attention"] * 36, "no_rope_layers": [1, 1, 1, 0] * 9, "pretraining_tp": 2}
    spec = parse_config(fields | {"is_llama_config": True, "rope_interleaved": False, "sliding_window": None})
    assert (spec.windows, spec.no_rope) == ((), tuple(range(3, 36, 4)))
    assert spec == NAMED["smollm3-3b"]
    assert [spec.rotary(layer).type for layer in range(4)] == ["default"] * 3 + ["none"]
    assert parse_config({"model_type": "smollm3"}).rope.theta == 2e6
    assert [run[0] for run in layer_runs(spec)] == sorted([*range(0, 36, 4), *range(3, 36, 4)])
    slides = parse_config({"model_type": "smollm3", "use_sliding_window": True, "sliding_window": 9})
    assert slides.windows == (None, None, None, 9) * 9


def test_olmo():
    """OLMo 3 as its checkpoints have it, and as transformers 5 writes it."""
    old = parse_config({"model_type": "olmo2", "num_key_value_heads": 8, "rope_theta": 5e5, "attention_bias": False})
    assert (old.pre_norms, old.post_norms, old.qk_norm, old.joint_qk_norm) == (False, True, True, True)
    assert (old.num_kv_heads, old.norm_eps, old.windows, old.rope.theta) == (8, 1e-5, (), 5e5)
    fields = {"model_type": "olmo3", "num_hidden_layers": 8, "max_position_embeddings": 65536}
    yarn = YARN | {"original_max_position_embeddings": 8192, "factor": 8.0, "rope_type": "yarn"}
    new = {"full_attention": yarn | {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 5e5}}
    types = (["sliding_attention"] * 3 + ["full_attention"]) * 2
    first = parse_config(fields | {"rope_theta": 500000, "rope_scaling": yarn, "layer_types": types})
    assert first == parse_config(fields | {"rope_parameters": new, "sliding_window": 4096})
    assert (first.windows, first.max_position) == ((4096, 4096, 4096, None) * 2, 65536)
    assert (first.rope.type, first.window_rope) == ("yarn", RopeSpec(5e5))


def test_granite():
    """Granite 3.3 2B as its checkpoint has it."""
    spec = parse_config(
        {"model_type": "granite", "architectures": ["GraniteForCausalLM"], "rope_theta": 1e7, "rope_scaling": None}
        | {"attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "logits_scaling": 8.0}
        | {"residual_multiplier": 0.22, "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True}
    )
    scales = (spec.embed_scale, spec.score_scale, spec.residual_scale, spec.logit_scale)
    assert scales == (12.0, 1 / 64, 0.22, 1 / 8)
    assert parse_config({"model_type": "granite"}).scale == 1.0


def test_ministral():
    types = ["full_attention"] + ["sliding_attention"] * 3
    fields = {"model_type": "ministral", "num_hidden_layers": 4, "head_dim": 128}
    assert parse_config(fields | {"sliding_window": 16, "layer_types": types}).windows == (None, 16, 16, 16)
    assert parse_config(fields | {"sliding_window": None}).windows == ()
    spec = parse_config({"model_type": "ministral3"})
    assert (spec.rope.query_growth, spec.rope.original_max_position, spec.max_position) == (0.1, 16384, 262144)
    assert (spec.rope.attention_factor, spec.rope.theta, spec.windows) == (1.0, 1e6, ())


def test_the_text_part_of_gemma3_is_read(capfd):
    """Gemma 3 4B as its checkpoint has it."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    fields = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "image_token_index": 262144}
    fields |= {"boi_token_index": 255999, "eoi_token_index": 256000, "mm_tokens_per_image": 256}
    fields |= {"eos_token_id": [1, 106], "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"}}
    assert parse_config(fields | {"text_config": text}) == parse_config(text)
    assert "reads images too" in capfd.readouterr().err
    text |= {"some": 5}
    assert parse_config(fields | {"text_config": text}, ["text_config.some"]).embed_dim == 2560


def test_experts():
    """Mixtral 8x7B and Qwen3 30B-A3B as their checkpoints have them."""
    assert parse_config({"model_type": "mixtral", "router_jitter_noise": 0.0}).experts == ExpertSpec(8, 2)
    fields = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 128, "num_experts": 128}
    fields |= {"intermediate_size": 6144, "moe_intermediate_size": 768, "norm_topk_prob": True, "max_window_layers": 48}
    fields |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "sliding_window": None, "use_sliding_window": False}
    spec = parse_config(fields | {"output_router_logits": False, "router_aux_loss_coef": 0.001})
    assert (spec.experts, spec.mlp_dim, spec.qk_norm, spec.windows) == (ExpertSpec(128, 8), 768, True, ())
    assert parse_config({"model_type": "qwen3_moe"}).experts == ExpertSpec(128, 8, normed=False)


def test_gpt_oss():
    """gpt-oss 20B as its checkpoint has it."""
    yarn = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096}
    fields = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "num_hidden_layers": 24}
    fields |= {"rope_scaling": yarn | {"rope_type": "yarn", "truncate": False}, "rope_theta": 150000}
    fields |= {"num_local_experts": 32, "experts_per_token": 4, "num_experts_per_tok": 4, "swiglu_limit": 7.0}
    fields |= {"initial_context_length": 4096, "quantization_config": {"quant_method": "mxfp4"}}
    fields |= {"layer_types": ["sliding_attention", "full_attention"] * 12, "router_aux_loss_coef": 0.9}
    spec = parse_config(fields)
    assert spec.experts == ExpertSpec(32, 4, bias=True, limit=7.0, slope=1.702)
    assert (spec.sinks, spec.qkv_bias, spec.o_bias, spec.windows) == (True, True, True, (128, None) * 12)
    assert (spec.rope.truncate, spec.max_position, spec.rope.theta) == (False, 131072, 1.5e5)
    assert parse_config({"model_type": "gpt_oss"}).rope == spec.rope
    assert spec == NAMED["gpt-oss-20b"]


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


def test_phi4_mini():
    """As its checkpoint has it."""
    spec = parse_config(
        {
            "architectures": ["Phi3ForCausalLM"],
            "attention_bias": False,
            "eos_token_id": 199999,
            "full_attn_mod": 1,
            "hidden_act": "silu",
            "hidden_size": 3072,
            "interpolate_factor": 1,
            "intermediate_size": 8192,
            "lm_head_bias": False,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "phi3",
            "num_attention_heads": 24,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
            "rope_theta": 10000.0,
            "sliding_window": 262144,
            "tie_word_embeddings": True,
            "vocab_size": 200064,
        }
    )
    assert (spec.head_dim, spec.rope.partial, spec.rope.width(spec.head_dim), spec.tie_embeddings) == (
        128,
        0.75,
        96,
        True,
    )
    inside = {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}
    assert parse_config({"model_type": "phi3", "partial_rotary_factor": 0.25} | inside).rope.partial == 0.5


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
        ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, ["no_rope_layers = [1, 0]", "36 layers"]),
        ({"model_type": "smollm3", "no_rope_layers": [True] * 36}, ["no_rope_layers = [True"]),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, ["no_rope_layer_interval = 0"]),
        ({"no_rope_layers": [1] * 32}, ["no_rope_layers"]),
        ({"model_type": "olmo2", "clip_qkv": 8.0}, ["clip_qkv = 8.0"]),
        ({"model_type": "olmo3", "rope_local_base_freq": 1e4}, ["rope_local_base_freq"]),
        ({"model_type": "granite", "logits_scaling": 0}, ["logits_scaling = 0"]),
        ({"model_type": "granite", "residual_multiplier": True}, ["residual_multiplier = True"]),
        ({"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}}, ["llama_4_scaling_beta = 0.1"]),
        (
            {"model_type": "ministral3", "rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.1}},
            ["llama_4_scaling_beta", "yarn"],
        ),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, ["decoder_sparse_step = 2"]),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, ["mlp_only_layers = [0]"]),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, ["num_experts_per_tok = 9", "up to 8"]),
        ({"model_type": "mixtral", "num_local_experts": 10**9}, ["num_local_experts"]),
        ({"model_type": "gpt_oss", "quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "mxfp4"]),
        ({"model_type": "gpt_oss", "quantization_config": 4}, ["quantization_config = 4"]),
        ({"activation": "gelu"}, ["activation = 'gelu'"]),
        ({"model_type": "gemma3"}, ["text_config", "gemma3_text"]),
        ({"model_type": "gemma3", "text_config": {"model_type": "llama"}}, ["text_config", "gemma3_text"]),
        ({"model_type": "gemma3", "text_config": {}, "vocab_size": 5}, ["vocab_size = 5", "gemma3"]),
        ({"model_type": "gemma3", "text_config": {"x": 5}}, ["x = 5", "--ignore-config text_config.x"]),
        ({"model_type": "gemma3", "text_config": {}, "architectures": ["Gemma3ForCausalLM"]}, ["architectures"]),
        ({"model_type": "mistral3", "text_config": {}, "quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"model_type": "gemma3_text", "architectures": ["Gemma3ForConditionalGeneration"]}, ["architectures"]),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, ["attn_logit_softcapping = 50.0"]),
        ({"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1e4}}, ["rope_parameters.rope_theta"]),
        ({"model_type": "gemma3_text", "sliding_window_pattern": "x"}, ["sliding_window_pattern = 'x'"]),
        ({"model_type": "gemma2", "hidden_activation": "gelu"}, ["hidden_activation = 'gelu'", "gelu_pytorch_tanh"]),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, ["query_pre_attn_scalar = 0"]),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, ["use_bidirectional_attention = True"]),
        ({"model_type": "gemma2", "sliding_window": None}, ["sliding_window = None"]),
        (
            {"model_type": "phi3", "partial_rotary_factor": 0.12},
            ["partial_rotary_factor = 0.12 turns 11 numbers", "even"],
        ),
        ({"model_type": "phi3", "partial_rotary_factor": 0.01}, ["partial_rotary_factor = 0.01 turns 0 numbers"]),
        ({"model_type": "phi3", "partial_rotary_factor": 1.25}, ["partial_rotary_factor = 1.25", "at most all"]),
        ({"model_type": "phi3", "partial_rotary_factor": 0}, ["partial_rotary_factor = 0", "positive"]),
        (
            {"model_type": "phi3", "rope_scaling": LONGROPE | {"partial_rotary_factor": 0.75}},
            ["expected 36", "72 numbers"],
        ),
        ({"partial_rotary_factor": 1.0, "rope_parameters": {"partial_rotary_factor": 0.5}}, ["= 0.5 is not supported"]),
        ({"architectures": 5}, ["architectures = 5", "list of names"]),
        ({"architectures": "LlamaForCausalLM"}, ["architectures = 'LlamaForCausalLM'"]),
        ({"architectures": [["LlamaForCausalLM"]]}, ["architectures = [["]),
        ({"model_type": "", "architectures": ["LlamaForCausalLM"]}, ["model_type = ''"]),
        ({"model_type": "phi3", "full_attn_mod": 2}, ["full_attn_mod = 2"]),
        ({"is_causal": False}, ["is_causal = False", "only True is"]),
        ({"is_causal": None}, ["is_causal = None"]),
        ({"hidden_act": False}, ["hidden_act = False"]),
        ({"hidden_act": ""}, ["hidden_act = ''", "'silu'"]),
        ({"logits_scaling": False}, ["logits_scaling = False"]),
        ({"logits_scaling": True}, ["logits_scaling = True"]),
        ({"something_new": False}, ["something_new = False"]),
        ({"rope_theta": 0}, ["rope_theta = 0"]),
        ({"rope_theta": False}, ["rope_theta = False"]),
        ({"rope_theta": ""}, ["rope_theta = ''"]),
        ({"rope_parameters": {"rope_theta": 0}}, ["rope_parameters.rope_theta = 0"]),
        ({"rope_parameters": 0}, ["rope_parameters = 0"]),
        ({"rope_scaling": False}, ["rope_scaling = False"]),
        ({"rope_scaling": ""}, ["rope_scaling = ''"]),
        ({"model_type": "gemma3_text", "rope_theta": 0}, ["rope_theta = 0"]),
        ({"model_type": "gemma3_text", "rope_local_base_freq": False}, ["= False, expected a positive number"]),
        ({"model_type": "gemma3_text", "rope_parameters": {"full_attention": 0}}, ["rope_parameters = 0"]),
        ({"model_type": "gemma3_text", "rope_parameters": False}, ["rope_parameters = False"]),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, ["sliding_window_pattern = 0"]),
        ({"model_type": "gemma3_text", "_sliding_window_pattern": False}, ["sliding_window_pattern = False"]),
        ({"rope_scaling": YARN, "rope_theta": 1}, ["rope_theta = 1.0", "more than 1"]),
        ({"rope_scaling": YARN | {"truncate": "false"}}, ["rope_scaling.truncate = 'false'", "true or false"]),
        ({"rope_scaling": YARN | {"truncate": 0}}, ["rope_scaling.truncate = 0"]),
        ({"rope_scaling": YARN | {"beta_fast": 0}}, ["rope_scaling.beta_fast = 0"]),
        ({"rope_scaling": YARN | {"beta_slow": False}}, ["rope_scaling.beta_slow = False"]),
        ({"rope_scaling": YARN | {"mscale": False, "mscale_all_dim": 1}}, ["rope_scaling.mscale = False"]),
        ({"rope_scaling": YARN | {"mscale": 1, "mscale_all_dim": ""}}, ["rope_scaling.mscale_all_dim = ''"]),
        ({"rope_scaling": LONGROPE, "original_max_position_embeddings": 1}, ["original_max_position_embeddings = 1"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2}, ["'dynamic'", "2 numbers"]),
        ({"model_type": "mistral", "sliding_window": 2**31}, ["sliding_window = 2147483648", "up to 2147483647"]),
        ({"vocab_size": 10**309}, ["vocab_size = 1000", "up to"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers = 1000000000", "up to 10000"]),
        ({"rms_norm_eps": 10**309}, ["rms_norm_eps = 1000", "float32"]),
        ({"rope_theta": 1e39}, ["rope_theta = 1e+39", "float32"]),
        ({"rms_norm_eps": 1e-50}, ["rms_norm_eps = 1e-50", "float32"]),
        ({"\x1b[31mred": 1}, ["\\x1b[31mred = 1"]),
        ({"something_new": "x" * 10**6}, ["something_new = 'xxx", "--ignore-config something_new"]),
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


ODD = [None, False, True, 0, -1, 1, 2**31, 10**309, 1e-50, 1e300, math.inf, math.nan, "", "x", [], [1], {}, {"a": 1}]
NUMBERS = [
    (family, name)
    for family, fields in FAMILIES.items()
    for name, default in fields.items()
    if isinstance(default, int | float) and not isinstance(default, bool)
    if name != "original_max_position_embeddings" and not (name == "sliding_window" and "qwen" in family)  # not read
]


@pytest.mark.parametrize("family", FAMILIES)
def test_any_value_of_any_field_is_read_or_refused_in_one_line(family):
    names = {*FAMILIES[family], "rope_theta", "rope_scaling", "rope_parameters", "architectures", "layer_types"}
    inside = {"type", "rope_theta", "factor", "short_factor", "original_max_position_embeddings", "truncate", "mscale"}
    blocks = [{"rope_scaling": block | {name: odd}} for block in (YARN, LONGROPE) for name in inside for odd in ODD]
    for fields in [{name: odd} for name in names for odd in ODD] + blocks:
        try:
            spec = parse_config({"model_type": family} | fields)
        except InputError:
            continue
        assert 0 < spec.max_position < 2**31 and spec.rope.theta > 0, fields


@pytest.mark.parametrize(("family", "name"), NUMBERS)
def test_what_is_no_number_is_not_read_as_one(family, name):
    for odd in (False, True, "", "x", [], {}, -1, math.inf, math.nan, 10**309):
        refusal({"model_type": family, name: odd}, name)


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
    empty = {"something_new": None, "qk_norm": False, "pruned_heads": {}, "quantization_config": {}, "use_mrope": False}
    neutral = {
        "is_causal": True,
        "hidden_act": "silu",
        "partial_rotary_factor": 1.0,
        "logits_scaling": 1,
        "quantization_config": None,
    }
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
    find = lambda: tuple(read_generation_config(tmp_path, 100))
    put = lambda name, **fields: (tmp_path / name).write_text(json.dumps(fields))
    assert find() == ((), "")
    put("config.json", eos_token_id=2)
    assert find() == ((2,), "config.json")
    for nothing in ({"do_sample": True}, {"eos_token_id": None}, {"eos_token_id": []}):
        put("generation_config.json", **nothing)
        assert find() == ((2,), "config.json")
    put("generation_config.json", eos_token_id=[7, 99])
    assert find() == ((7, 99), "generation_config.json")
    put("generation_config.json", eos_token_id=0)
    assert find() == ((0,), "generation_config.json")


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("value", ["x", -1, 100, True, False, "", 2.0, 2**31, 10**400, [3, True], [[3]], {}])
def test_ids_that_end_no_text(tmp_path, name, value):
    (tmp_path / name).write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(InputError, match=rf"{name}: eos_token_id = .*vocabulary, 0 to 99"):
        read_generation_config(tmp_path, 100)


def test_the_tokenizer_names_the_end_where_no_config_does(tmp_path):
    backend = tokenizers.Tokenizer(WordLevel({"a": 0, "</s>": 5, "<far>": 100}, unk_token="a"))
    backend.save(str(tmp_path / "tokenizer.json"))

    def find(eos_token):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
        return tuple(find_stop(tmp_path, 100, Tokenizer.load(tmp_path)))

    assert find("</s>") == find({"content": "</s>"}) == ((5,), "tokenizer_config.json")
    assert find(None) == find("<absent>") == tuple(find_stop(tmp_path, 100, None)) == ((), "")
    with pytest.raises(InputError, match="eos_token has the id 100, which is not in the vocabulary"):
        find("<far>")
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": []}))
    assert find("</s>") == ((5,), "tokenizer_config.json")
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert find("</s>") == find("<far>") == ((3,), "config.json")


def test_golden_configs_cover_every_family():
    families = {parse_config(golden.load(name).config).family for name in golden.NAMES}
    assert families == set(FAMILIES)
