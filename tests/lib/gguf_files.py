"""GGUF files as llama.cpp's conversion writes them from Hugging Face weights; the `gguf` package has the names."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from tests import golden

ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3", "olmo3": "olmo2", "ministral3": "mistral3"}
ARCHITECTURES |= {"mixtral": "llama", "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss"}
TURNED = ("llama", "smollm3", "granite", "mistral3")  # whose conversions are Llama's
COPIED = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "ffn_hidden_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "num_kv_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}


def write(path: Path, config: Mapping[str, Any], weights: Mapping[str, np.ndarray], **options: Any) -> Path:
    """Write a model as a GGUF file.

    Args:
      path: the file, or of a model that is split the first one without its number.
      config: config.json.
      weights: under Hugging Face's names.
      options: `kind` = how matrices are stored whose rows fit, "Q8_0" for example; `fields` = more of them, None takes
        one out; `per_file` = tensors of a part.
    """
    arch = ARCHITECTURES.get(config["model_type"], config["model_type"])
    writer = GGUFWriter(path, arch, split_max_tensors=options.get("per_file", 0))
    for key, value in (fields_of(arch, config) | options.get("fields", {})).items():
        add(writer, key if "." in key and key.split(".")[0] in ("general", "tokenizer") else f"{arch}.{key}", value)
    for name, array in tensors_of(arch, config, weights):
        kind = GGMLQuantizationType[options.get("kind", "F32")]
        if array.ndim == 1 or array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(array, np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: GGUFWriter, key: str, value: Any) -> None:
    """A field of a type that fits."""
    if value is None:
        return
    if isinstance(value, list):
        writer.add_array(key, value)
        return
    how = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    how[type(value)](key, value)


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding in both dialects of config.json, that of all layers where windows have another."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = rope.get("full_attention", rope)
    return {"rope_theta": config.get("rope_theta"), "rope_type": rope.get("type", "default")} | rope


def fields_of(arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What llama.cpp's conversion says of a model."""
    found = {key: config[field] for field, key in COPIED.items() if config.get(field) is not None}
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = rope_of(config)
    found |= {
        "rope.freq_base": float(rope["rope_theta"] or 1e4),
        "attention.sliding_window": config.get("sliding_window"),
    }
    if arch == "falcon":
        heads = config.get("num_kv_heads") if config["new_decoder_architecture"] else 1
        return found | {"attention.head_count_kv": heads, "tensor_data_layout": "jploski"}
    if arch == "phi3":
        partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1
        found |= {"rope.dimension_count": int(partial * size)}
        found |= {"rope.scaling.original_context_length": config["original_max_position_embeddings"]}
    else:
        found |= {"attention.key_length": size, "attention.value_length": size}
    if arch in ("internlm2", *TURNED):
        found |= {"vocab_size": config["vocab_size"], "rope.dimension_count": size}
    if arch.startswith("qwen"):
        found["attention.sliding_window"] = None  # llama.cpp has none
    if rope["rope_type"] in ("linear", "yarn"):
        found |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "yarn":
        found |= {"rope.scaling.original_context_length": rope["original_max_position_embeddings"]}
        found |= {f"rope.scaling.yarn_{name}": rope[name] for name in ("beta_fast", "beta_slow") if name in rope}
    if rope["rope_type"] == "longrope":
        limits = config["max_position_embeddings"] / config["original_max_position_embeddings"]
        found["rope.scaling.attn_factor"] = (
            1 + np.log(limits) / np.log(config["original_max_position_embeddings"])
        ) ** 0.5
        found["rope.scaling.attn_factor"] = float(found["rope.scaling.attn_factor"])
    if arch == "gpt-oss":
        found["expert_feed_forward_length"] = config["intermediate_size"]
    if "layer_types" in config and arch == "olmo2":
        found["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in config["layer_types"]]
        found["rope.freq_base_swa"] = config["rope_parameters"]["sliding_attention"]["rope_theta"]
    if arch == "mistral3":
        found["rope.scaling.yarn_log_multiplier"] = rope["mscale_all_dim"]
        found["attention.temperature_scale"] = rope["llama_4_scaling_beta"]
    return found


def tensors_of(
    arch: str, config: Mapping[str, Any], weights: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """llama.cpp's names and numbers."""
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    renamed = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper().replace("-", "_")], layers)
    for name, array in (unwoven(weights) if arch == "gpt-oss" else stacked(weights)).items():
        if arch == "internlm2" and ".wqkv" in name:
            yield from unpacked(name, array, heads, config["num_key_value_heads"])
            continue
        if arch in TURNED and re.search(r"\.[qk]_proj\.", name):
            array = permuted(array, heads if ".q_proj." in name else config["num_key_value_heads"])
        if arch == "falcon" and ".query_key_value." in name:
            kv_heads = config["num_kv_heads"] if config["new_decoder_architecture"] else 1
            array = grouped(array, heads, kv_heads)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            array = array.astype(np.float32) + 1
        yield renamed.get_name(name, (".weight", ".bias")), array
    rope = rope_of(config)
    if rope["rope_type"] == "longrope":
        yield "rope_factors_long.weight", np.array(rope["long_factor"])
        yield "rope_factors_short.weight", np.array(rope["short_factor"])
    if rope["rope_type"] == "llama3":
        yield "rope_freqs.weight", llama3(rope, config["hidden_size"] // heads)


def stacked(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The matrices of a layer's experts in one."""
    found: dict[str, list[np.ndarray]] = {}
    for name, array in weights.items():
        whole = re.sub(r"model\.(layers\.\d+)\.block_sparse_moe\.experts\.\d+", r"\1.feed_forward.experts", name)
        found.setdefault(re.sub(r"mlp\.experts\.\d+", "mlp.experts", whole), []).append(array)
    return {name: arrays[0] if len(arrays) == 1 else np.stack(arrays) for name, arrays in found.items()}


def unwoven(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """gpt-oss's experts, gates apart from what they multiply, as `Linear` has its weights."""
    found: dict[str, np.ndarray] = {}
    for name, array in weights.items():
        whole = name.replace("_proj_bias", "_proj.bias").replace("sinks", "sinks.weight")
        if "experts" in name and array.ndim == 3:
            array, whole = array.swapaxes(1, 2), f"{name}.weight"
        if "gate_up" in name:
            found |= {whole.replace("gate_up", part): array[:, i::2] for i, part in enumerate(("gate", "up"))}
        else:
            found[whole] = array
    return found


def permuted(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head's two halves in turns."""
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def grouped(array: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
    """All queries, all keys, all values, of each key/value head's own."""
    packed = array.reshape(kv_heads, heads // kv_heads + 2, -1, *array.shape[1:])
    return np.concatenate(
        [part.reshape(-1, *array.shape[1:]) for part in (packed[:, :-2], packed[:, -2], packed[:, -1])]
    )


def unpacked(name: str, array: np.ndarray, heads: int, kv_heads: int) -> Iterator[tuple[str, np.ndarray]]:
    """InternLM2's packed rows as three tensors."""
    (layer,) = re.findall(r"\.(\d+)\.", name)
    rows = array.shape[0] // (heads + 2 * kv_heads)
    q, k, v = np.split(grouped(array, heads, kv_heads), [heads * rows, (heads + kv_heads) * rows])
    for part, rows_of in (("q", permuted(q, heads)), ("k", permuted(k, kv_heads)), ("v", v)):
        yield f"blk.{layer}.attn_{part}.weight", rows_of


def llama3(rope: Mapping[str, Any], size: int) -> np.ndarray:
    """How far Llama 3.1 stretches each pair of a head's numbers."""
    waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, size, 2) / size)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((rope["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / rope["factor"] + smooth)


# Golden models that llama.cpp can say, and what its own conversion leaves out of them.
def golden_case(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, Any]]:
    """A golden model's config, its weights, and fields beside those that the conversion writes."""
    model = golden.load(name)
    config, weights, fields = dict(model.config), dict(model.weights), {}
    if name == "falcon_40b":  # no biases
        config["bias"] = False
        weights = {key: array for key, array in weights.items() if not re.search(r"(dense\w*|value)\.bias", key)}
    if name == "qwen2_window":
        config |= {"use_sliding_window": False, "layer_types": None}
    if name == "smollm3":  # only every fourth layer lacks rotation
        config |= {"num_hidden_layers": 4, "no_rope_layers": None, "no_rope_layer_interval": 4, "layer_types": None}
        fourth = {key: array for key, array in weights.items() if "layers.0." in key}
        weights |= {key.replace("layers.0.", "layers.3."): array for key, array in fourth.items()}
    if name == "ministral3":  # as every Ministral 3 has them
        config["rope_parameters"] = config["rope_parameters"] | {"mscale": 1.0, "mscale_all_dim": 1.0}
    if name == "gpt_oss":  # llama.cpp's graph
        config["swiglu_limit"] = 7.0
    if name == "qwen3_moe":  # llama.cpp's graph
        config["norm_topk_prob"] = True
    if name.startswith("gemma"):
        fields["attention.scale"] = config["query_pre_attn_scalar"] ** -0.5
    if name == "gemma3":
        slides = [kind == "sliding_attention" for kind in config["layer_types"]]
        fields |= {"attention.sliding_window_pattern": slides, "rope.freq_base_swa": 1e3}
    return config, weights, fields


FAMILIES = ("llama", "mistral", "internlm2", "qwen2", "qwen3", "phi3", "falcon", "gemma2", "gemma3_text")
FAMILIES += ("smollm3", "granite", "olmo2", "olmo3", "ministral3", "mixtral", "qwen3_moe", "gpt_oss")
OTHERS = ("llama_dynamic", "falcon_sequential")  # llama.cpp has none of these
NAMES = [name for name in golden.NAMES if golden.load(name).config["model_type"] in FAMILIES and name not in OTHERS]
CHANGED = ("falcon_40b", "qwen2_window", "smollm3", "ministral3", "qwen3_moe", "gpt_oss")
AS_THEY_ARE = [name for name in NAMES if name not in CHANGED]


def write_golden(name: str, path: Path, **options: Any) -> Path:
    """Write a golden model as a GGUF file."""
    config, weights, fields = golden_case(name)
    return write(path, config, weights, **{**options, "fields": fields | options.get("fields", {})})
