"""Random models, compared with the installed transformers: configurations, rotary tables, logits."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.checkpoint import hf, mxfp4
from kvjax.generation.model import Model
from kvjax.models import rope
from kvjax.models.decoder import forward
from kvjax.models.hf_config import parse_config
from tests.lib.later import Later
from tests.lib.matrix import slow

torch, transformers = Later("torch"), Later("transformers")
llama, phi3 = (Later(f"transformers.models.{name}.modeling_{name}") for name in ("llama", "phi3"))
mxfp4_theirs = Later("transformers.integrations.mxfp4")

MODELS = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "falcon": "Falcon",
    "phi3": "Phi3",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
    "smollm3": "SmolLM3",
    "gpt_oss": "GptOss",
    "granite": "Granite",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3Moe",
    "ministral": "Ministral",
    "ministral3": "Ministral3",
    "olmo2": "Olmo2",
    "olmo3": "Olmo3",
}
LATER = ("smollm3", "olmo2", "granite", "ministral", "ministral3", "mixtral", "qwen3_moe")  # golden files have them
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
TYPES = ("full_attention", "sliding_attention")
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
LONGROPE = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 2048,
    "short_factor": np.linspace(1, 1.5, 64).tolist(),
    "long_factor": np.linspace(1, 40, 64).tolist(),
}
ROPES = [
    {"rope_type": "default", "rope_theta": 5e5},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 4.0},
    LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 2048, "rope_theta": 5e5},
    LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 512},
    YARN,
    YARN | {"attention_factor": 1.25, "rope_theta": 1e6},
    YARN | {"mscale": 0.7, "mscale_all_dim": 1.1},
    YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    YARN | {"beta_fast": 4.0, "beta_slow": 4.0, "truncate": False},
    YARN | {"beta_fast": 500.0, "beta_slow": 400.0},  # the ramp ends before it begins
    YARN | {"factor": None},
    LONGROPE,
    LONGROPE | {"factor": 16.0, "rope_theta": 1e6},
    LONGROPE | {"attention_factor": 1.25},
]
# As Phi-4-mini has it: 12 of the 16 numbers of a head turn.
PARTIAL = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
PARTIAL |= {"short_factor": [1.0, 1.1, 1.5, 2.0, 3.0, 4.0], "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]}


def config_class(family):
    return getattr(transformers, f"{MODELS[family]}ForCausalLM").config_class


@pytest.mark.parametrize("family", MODELS)
def test_default_configs_agree(family):
    theirs = config_class(family)()
    bare, full = parse_config({"model_type": family}), parse_config(json.loads(theirs.to_json_string(use_diff=False)))
    assert bare == full
    if family != "falcon":  # which has other names
        assert full.num_kv_heads == theirs.num_key_value_heads
        assert full.norm_eps == theirs.rms_norm_eps
    assert full.tie_embeddings == theirs.tie_word_embeddings
    ropes = theirs.rope_parameters
    assert full.rope.theta == ropes.get("full_attention", ropes)["rope_theta"]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("first", [0, 2, 9])
@pytest.mark.parametrize("window", [5, None])
def test_qwen_windows_agree(family, used, first, window):
    fields = {"num_hidden_layers": 4, "use_sliding_window": used, "sliding_window": window, "max_window_layers": first}
    theirs = getattr(transformers, f"{MODELS[family]}Config")(**fields)
    expected = [theirs.sliding_window if kind == "sliding_attention" else None for kind in theirs.layer_types]
    spec = parse_config({"model_type": family} | fields)
    assert [spec.window(layer) for layer in range(4)] == expected


@pytest.mark.parametrize("parameters", ROPES, ids=lambda p: "-".join(str(x) for x in p.values() if type(x) is not list))
@pytest.mark.parametrize("length", [100, 20000])
def test_rotary_tables_agree(parameters, length):
    fields = {"hidden_size": 256, "num_attention_heads": 2, "max_position_embeddings": 8192}
    theirs = transformers.LlamaConfig(**fields, rope_parameters={"rope_theta": 1e4} | parameters)
    pos = np.unique(np.linspace(0, length - 1, 50).astype(int))
    cos, sin = llama.LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.tensor(pos)[None])
    spec = parse_config({"model_type": "llama", "rope_parameters": parameters} | fields)
    ours = rope.rotation(spec.rope, spec.head_dim, jnp.asarray(length)).angles(jnp.asarray(pos))
    for mine, other in zip(ours, (cos, sin), strict=True):
        np.testing.assert_allclose(mine, other[0, :, : spec.head_dim // 2].numpy(), atol=5e-7 * length + 1e-6)


def random_fields(rng, family):
    """A random shape of a family, with the parts that its mathematics has."""
    kv, group = (int(n) for n in rng.integers(1, 4, 2))
    head_dim = 2 * int(rng.integers(2, 9))
    fields = {
        "vocab_size": int(rng.integers(20, 60)),
        "hidden_size": kv * group * int(rng.integers(3, 9)) * 2,
        "intermediate_size": int(rng.integers(8, 64)),
        "num_hidden_layers": int(rng.integers(1, 4)),
        "num_attention_heads": kv * group,
        "num_key_value_heads": kv,
        "head_dim": head_dim,
        "max_position_embeddings": 32,
        "tie_word_embeddings": bool(rng.integers(2)),
        "rope_parameters": {"rope_theta": float(10 ** rng.uniform(2, 6)), "rope_type": "default"},
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    flag = lambda: bool(rng.integers(2))
    extra = {
        "llama": {"attention_bias": flag(), "mlp_bias": flag()},
        "mistral": {"sliding_window": [None, 5][flag()]},
        "qwen2": {"use_sliding_window": flag(), "sliding_window": 5, "max_window_layers": 1},
        "qwen3": {"use_sliding_window": flag(), "max_window_layers": 1, "sliding_window": 5, "attention_bias": flag()},
        "smollm3": {"no_rope_layer_interval": 2, "use_sliding_window": flag(), "sliding_window": 5},
        "granite": {f"{name}_multiplier": rng.uniform(0.3, 3) for name in ("embedding", "attention", "residual")}
        | {"logits_scaling": rng.uniform(0.3, 3), "attention_bias": flag(), "mlp_bias": flag()},
        "ministral": {"sliding_window": 5, "layer_types": list(rng.choice(TYPES, fields["num_hidden_layers"]))},
        "ministral3": {"sliding_window": [None, 5][flag()]},
        "mixtral": {"sliding_window": [None, 5][flag()], "num_local_experts": 5, "num_experts_per_tok": 2},
        "qwen3_moe": {"use_sliding_window": flag(), "sliding_window": 5, "norm_topk_prob": flag(), "num_experts": 5}
        | {"num_experts_per_tok": 3, "moe_intermediate_size": 24, "attention_bias": flag()},
        "gpt_oss": {"sliding_window": 5, "num_local_experts": 5, "num_experts_per_tok": 2, "swiglu_limit": 1.5},
        "olmo2": {"attention_bias": flag()},
    }
    if "gemma" in family:
        del fields["rope_parameters"]
        caps = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0} if family == "gemma2" else {}
        scalar = int(rng.integers(4, 20))
        return fields | caps | {"sliding_window": 5, "query_pre_attn_scalar": scalar, "num_hidden_layers": 3}
    if family == "ministral3":
        fields["rope_parameters"] |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6}
        fields["rope_parameters"] |= {"llama_4_scaling_beta": 0.3}
    if family == "olmo3":
        del fields["rope_parameters"]
        return fields | {"sliding_window": 5, "num_hidden_layers": 4, "attention_bias": flag()}
    if family == "phi3":
        del fields["head_dim"]
        return fields | {"hidden_size": kv * group * head_dim, "sliding_window": [None, 5][flag()]}
    if family != "falcon":
        return fields | extra[family]
    for name in ("intermediate_size", "num_key_value_heads", "head_dim"):
        del fields[name]
    layout = [
        {"multi_query": True},
        {"multi_query": False, "parallel_attn": False},
        {"new_decoder_architecture": True, "num_kv_heads": kv, "num_ln_in_parallel_attn": int(rng.integers(1, 3))},
    ][int(rng.integers(3))]
    return fields | layout | {"bias": flag(), "hidden_size": kv * group * head_dim}


def partial_fields(rng):
    """A random Phi-3 whose heads turn in part."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "max_position_embeddings": 64}
    return random_fields(rng, "phi3") | heads | {"original_max_position_embeddings": 40, "rope_parameters": PARTIAL}


@pytest.mark.parametrize("length", [30, 60])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("kind", ["default", "longrope"])
def test_rotary_tables_of_heads_that_turn_in_part_agree(kind, inside, length):
    block = PARTIAL if kind == "longrope" else {"rope_type": "default", "partial_rotary_factor": 0.25}
    fields = partial_fields(np.random.default_rng(0)) | {"rope_parameters": block}
    if not inside:  # as checkpoints have it
        outer = {"partial_rotary_factor": block["partial_rotary_factor"]}
        fields |= outer | {"rope_parameters": {name: block[name] for name in block.keys() - outer.keys()}}
    theirs = transformers.Phi3Config(**json.loads(json.dumps(fields)))
    pos = np.arange(length)
    cos, sin = phi3.Phi3RotaryEmbedding(theirs)(torch.zeros(1), torch.tensor(pos)[None])
    spec = parse_config({"model_type": "phi3"} | fields)
    ours = rope.rotation(spec.rope, spec.head_dim, jnp.asarray(length)).angles(jnp.asarray(pos))
    assert ours[0].shape == (length, 6 if kind == "longrope" else 2)
    for mine, other in zip(ours, (cos, sin), strict=True):
        np.testing.assert_allclose(mine, other[0, :, : mine.shape[-1]].numpy(), atol=1e-5)


def test_mxfp4_is_read_as_transformers_reads_it():
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 6, 2, 16), dtype=np.uint8)
    scales = rng.integers(120, 135, (3, 6, 2), dtype=np.uint8)
    expected = mxfp4_theirs.convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32)
    np.testing.assert_array_equal(mxfp4.numbers(blocks, scales).astype(np.float32), expected.numpy())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "mistral3"])
def test_the_text_part_of_a_model_that_reads_images_agrees(tmp_path, family):
    text = random_fields(np.random.default_rng(0), {"gemma3": "gemma3_text", "mistral3": "mistral"}[family])
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    name = f"{family.capitalize()}ForConditionalGeneration"
    kinds = {"gemma3": ("gemma3_text", "siglip_vision_model"), "mistral3": ("mistral", "pixtral")}[family]
    parts = {"text_config": text | {"model_type": kinds[0]}, "vision_config": vision | {"model_type": kinds[1]}}
    config = getattr(transformers, name).config_class(**parts, image_token_index=5)
    theirs = getattr(transformers, name)(config).eval().float()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
        theirs.save_pretrained(tmp_path)
        tokens = np.random.default_rng(0).integers(6, text["vocab_size"], (2, 17))
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    model = hf.load(tmp_path, jnp.float32)
    np.testing.assert_allclose(jax.jit(forward)(model, jnp.asarray(tokens)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", slow([*MODELS, "phi3 in part"], LATER))
def test_logits_agree(tmp_path, family, seed):
    rng, partial = np.random.default_rng([seed, len(family), ord(family[-1])]), family == "phi3 in part"
    family = family.split()[0]
    fields = partial_fields(rng) if partial else random_fields(rng, family)
    torch.manual_seed(seed)
    config = config_class(family)(**fields, attn_implementation="eager", experts_implementation="eager")
    theirs = getattr(transformers, f"{MODELS[family]}ForCausalLM")(config).eval().float()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
        theirs.save_pretrained(tmp_path)
        tokens = rng.integers(0, fields["vocab_size"], (2, 17))
        expected = theirs(torch.tensor(tokens)).logits.numpy()
        greedy = theirs.generate(torch.tensor(tokens), max_new_tokens=8, do_sample=False)[:, 17:].tolist()
    model = hf.load(tmp_path, jnp.float32)
    assert dataclasses.asdict(model.spec)["family"] == family
    np.testing.assert_allclose(jax.jit(forward)(model, jnp.asarray(tokens)), expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.1
    out = Model(model, None, (), family).generate(tokens.tolist(), max_new_tokens=8)
    np.testing.assert_allclose(out.logits, expected[:, -1], atol=1e-4, rtol=1e-4)
    assert [sequence.tokens for sequence in out.sequences] == greedy
