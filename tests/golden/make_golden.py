"""Make the golden files with transformers and torch: `python tests/golden/make_golden.py [NAME ...]`."""

import copy
import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LLAMA_ONLY = ("intermediate_size", "num_key_value_heads")
SMALL_FALCON = {name: value for name, value in SMALL.items() if name not in _LLAMA_ONLY}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 1.5, 3.0, 4.0],
}
PARTIAL = LONGROPE | {  # of Phi-4-mini
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7],
    "long_factor": [1.0, 1.2, 1.5, 3.0, 3.5, 4.0],
}
GEMMA = {"head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 12, "num_hidden_layers": 3}
GEMMA_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
}
OLMO_ROPES = {
    "full_attention": {"rope_theta": 1e4} | YARN,
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
}
SLIDES = ["sliding_attention", "full_attention"]
GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.4, "residual_multiplier": 0.5, "logits_scaling": 2.5}
GPT_OSS = {"head_dim": 8, "sliding_window": 9, "num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 1.5}
GPT_OSS |= {"intermediate_size": 32, "rope_parameters": {"rope_theta": 1e4} | YARN | {"truncate": False}}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
# name -> (family, fields beside SMALL, dialect of config.json)
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama_gqa": ("llama", {}, 5),
    "llama_mqa_tied": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 16}, 4),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}, 5),
    "llama3_scaling": ("llama", {"rope_parameters": {"rope_theta": 5e3} | LLAMA3, "rms_norm_eps": 1e-5}, 5),
    "llama_linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}}, 4),
    "llama_dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, "max_position_embeddings": 16},
        4,
    ),
    "llama_yarn": ("llama", {"rope_parameters": {"rope_theta": 1e4} | YARN}, 5),
    "mistral_window": ("mistral", {"sliding_window": 9}, 4),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}}, 4),
    "qwen2_window": ("qwen2", QWEN_WINDOW | {"num_hidden_layers": 3}, 5),
    "qwen3": ("qwen3", {"head_dim": 16, "rope_parameters": {"rope_theta": 1e6}}, 5),
    "falcon_7b": ("falcon", {}, 5),
    "falcon_40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}, 5),
    "falcon_sequential": (
        "falcon",
        {"multi_query": False, "parallel_attn": False, "ffn_hidden_size": 40, "tie_word_embeddings": False},
        4,
    ),
    "phi3_window": ("phi3", {"sliding_window": 9}, 5),
    "phi3_longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}, 5),
    "phi3_partial": (
        "phi3",
        {"rope_parameters": PARTIAL, "original_max_position_embeddings": 32}
        | {"num_attention_heads": 2, "num_key_value_heads": 1},
        4,
    ),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}, 4),
    "gemma3": ("gemma3", GEMMA | {"rope_parameters": GEMMA_ROPES, "_sliding_window_pattern": 3}, 5),
    "smollm3": ("smollm3", {"num_hidden_layers": 3, "no_rope_layer_interval": 2}, 4),
    "olmo2": ("olmo2", {}, 4),
    "olmo3": ("olmo3", {"sliding_window": 9, "layer_types": SLIDES, "rope_parameters": OLMO_ROPES}, 5),
    "granite": ("granite", GRANITE, 4),
    "ministral": ("ministral", {"sliding_window": 9, "layer_types": SLIDES, "head_dim": 8}, 5),
    "ministral3": (
        "ministral3",
        {"head_dim": 8, "rope_parameters": {"rope_theta": 1e4, "llama_4_scaling_beta": 0.5} | YARN},
        5,
    ),
    "mixtral": ("mixtral", {"sliding_window": 9, "num_local_experts": 4, "intermediate_size": 24}, 4),
    "qwen3_moe": (
        "qwen3_moe",
        {"head_dim": 8, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 16},
        5,
    ),
    "gpt_oss": ("gpt_oss", GPT_OSS, 5),
    "internlm2": ("llama", {"num_key_value_heads": 2, "num_attention_heads": 6, "hidden_size": 48}, 4),
}
PROMPT, NEW = 40, 12


def main(names: Collection[str]) -> None:
    """Write the golden files of these names, all without any."""
    for name, (family, fields, dialect) in CASES.items():
        if names and name not in names:
            continue
        content = next(filter(None, (make(seed, family, fields) for seed in range(100))))
        config, weights = content.pop("config"), content.pop("weights")
        if dialect == 4:
            config = to_dialect_4(config)
        if name == "internlm2":
            config, weights = to_internlm2(config, weights)
        arrays: dict[str, Any] = {f"weights/{key}": value.astype(np.float16) for key, value in weights.items()}
        np.savez_compressed(FOLDER / f"{name}.npz", config=json.dumps(config), **content, **arrays)
        print(name, content["greedy"], (FOLDER / f"{name}.npz").stat().st_size)


def make(seed: int, family: str, fields: dict[str, Any]) -> dict[str, Any] | None:
    """A seeded model of transformers, its config, weights, logits and greedy tokens; None when tokens nearly tie."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model_class = {
        "llama": transformers.LlamaForCausalLM,
        "mistral": transformers.MistralForCausalLM,
        "qwen2": transformers.Qwen2ForCausalLM,
        "qwen3": transformers.Qwen3ForCausalLM,
        "phi3": transformers.Phi3ForCausalLM,
        "gemma2": transformers.Gemma2ForCausalLM,
        "gemma3": transformers.Gemma3ForCausalLM,
        "falcon": transformers.FalconForCausalLM,
        "smollm3": transformers.SmolLM3ForCausalLM,
        "olmo2": transformers.Olmo2ForCausalLM,
        "gpt_oss": transformers.GptOssForCausalLM,
        "mixtral": transformers.MixtralForCausalLM,
        "qwen3_moe": transformers.Qwen3MoeForCausalLM,
        "ministral": transformers.MinistralForCausalLM,
        "ministral3": transformers.Ministral3ForCausalLM,
        "granite": transformers.GraniteForCausalLM,
        "olmo3": transformers.Olmo3ForCausalLM,
    }[family]
    fields = (
        SMALL_FALCON if family == "falcon" else SMALL
    ) | fields  # transformers writes into the dict that it is given
    config = model_class.config_class(**json.loads(json.dumps(fields)), attn_implementation="eager")
    model = model_class(config).eval().float()
    with torch.no_grad():
        for weight in model.parameters():  # biases and norms are random as well; every number fits float16
            drawn = torch.randn_like(weight) * (0.3 if weight.ndim > 1 else 0.2) + (weight.ndim == 1) * weight
            weight.copy_(drawn.half().float())
        model.tie_weights()
        prompt = torch.randint(0, fields["vocab_size"], (1, PROMPT))
        logits = copy.deepcopy(model)(prompt).logits[0, -1]
    greedy, recomputed = (generate(model, prompt, use_cache) for use_cache in (True, False))
    if greedy is None or recomputed is None:
        return None
    weights = {key: value.numpy() for key, value in saved_tensors(model).items()}
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    saved = json.loads(config.to_json_string(use_diff=False))
    return {
        "config": {key: value for key, value in saved.items() if key not in ("transformers_version", "_name_or_path")},
        "weights": weights,
        "prompt": prompt[0].numpy().astype(np.int32),
        "logits": logits.numpy(),
        "greedy": greedy,
        "recomputed": recomputed,
    }


def saved_tensors(model: Any) -> dict[str, Any]:
    """The state dict as transformers writes it: it splits experts that it keeps together."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, model.state_dict())


def generate(model: Any, prompt: Any, use_cache: bool) -> np.ndarray | None:
    """Greedy tokens; None when a runner-up is so close that another order of summation may put it first."""
    result = copy.deepcopy(model).generate(  # dynamic rope remembers the longest text that it has seen
        prompt,
        attention_mask=prompt.new_ones(prompt.shape),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    for step in result.logits:
        best = step[0].topk(2).values
        if best[0] - best[1] < 0.02:
            return None
    return result.sequences[0, prompt.shape[1] :].numpy().astype(np.int32)


def to_dialect_4(config: dict[str, Any]) -> dict[str, Any]:
    """The config as transformers 4 wrote it."""
    config = dict(config)
    rope = dict(config.pop("rope_parameters"))
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    config |= {"rope_theta": theta, "rope_scaling": {"type": kind, **rope} if kind != "default" else None}
    return config | {"torch_dtype": config.pop("dtype", None), "transformers_version": "4.37.2"}


def to_internlm2(
    config: dict[str, Any], weights: dict[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A Llama checkpoint under InternLM2's names, with q, k and v of each key/value head packed together."""
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    renamed = {
        "model.embed_tokens": "model.tok_embeddings",
        "lm_head": "output",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
    }
    packed = {}
    for key, value in weights.items():
        if "q_proj" in key:
            q = value.reshape(kv, heads // kv, -1, value.shape[1])
            k, v = (
                weights[key.replace("q_proj", part)].reshape(kv, 1, -1, value.shape[1]) for part in ("k_proj", "v_proj")
            )
            name = key.replace("self_attn.q_proj", "attention.wqkv")
            packed[name] = np.concatenate([q, k, v], axis=1).reshape(-1, value.shape[1])
        elif "k_proj" not in key and "v_proj" not in key:
            for old, new in renamed.items():
                key = key.replace(old, new)
            packed[key] = value
    unused = ("attention_bias", "mlp_bias", "head_dim")
    config = {key: value for key, value in config.items() if key not in unused}
    config |= {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": False}
    return config | {"auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"}}, packed


if __name__ == "__main__":
    main(sys.argv[1:])
