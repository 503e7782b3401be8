"""A GGUF file's fields as `config.json` and `generation_config.json`, for `hf_config` to check.

A field that has no counterpart goes there under its own name, where it is refused like any that kvjax does not know.
What a file leaves to llama.cpp, such as Gemma's attention scale, is as in its `src/models/*.cpp`, `conversion/*.py`.
"""

from typing import Any

import numpy as np

from kvjax.errors import InputError
from kvjax.files import gguf
from kvjax.files.gguf import Gguf

# llama.cpp's architecture -> the family with its mathematics. InternLM2's packed matrices are unpacked in a GGUF.
FAMILIES = {
    "llama": "llama",
    "internlm2": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "falcon": "falcon",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "smollm3": "smollm3",
    "granite": "granite",
    "olmo2": "olmo2",
    "mistral3": "llama",
    "qwen3moe": "qwen3_moe",
    "gpt-oss": "gpt_oss",
}
LIKE_LLAMA = ("llama", "internlm2", "mistral3", "smollm3", "granite")  # biases or none; rows of queries and keys turned
_RENAMED = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "attention.causal": "is_causal",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
}
_NEEDED = ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count")
_SURE = ("rope.freq_base", "attention.layer_norm_rms_epsilon")  # where llama.cpp and transformers have other defaults
_EXPERTS = ("expert_count", "expert_used_count", "expert_feed_forward_length")
_NEEDED_OF = {
    "smollm3": _SURE,
    "granite": (*_SURE, "attention.scale", "logit_scale"),
    "olmo2": _SURE,
    "mistral3": _SURE,
    "qwen3moe": (*_SURE, *_EXPERTS),
    "gpt-oss": (*_SURE, *_EXPERTS, "attention.sliding_window"),
}
_FALCON = {"num_key_value_heads": "num_kv_heads", "intermediate_size": "ffn_hidden_size"}
# Fields that say nothing at these values.
_NEUTRAL = {
    **dict.fromkeys(("expert_count", "expert_used_count", "nextn_predict_layers", "pooling_type"), (0,)),
    **dict.fromkeys(("attention.max_alibi_bias", "attention.clamp_kqv", "rope.scaling.yarn_log_multiplier"), (0,)),
    **dict.fromkeys(("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"), (1,)),
    "rope.scaling.yarn_ext_factor": (1,),
    "rope.scaling.finetuned": (True, False),
    "tensor_data_layout": ("jploski", "Meta AI original pth"),
}
_NEUTRAL_OF = {"granite": {"rope.scaling.finetuned": (True,)}}  # false: queries and keys do not turn
_UNREAD = {"granite": ("ssm.", "expert_shared_feed_forward_length")}  # of Granite 4's relatives
_GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
DEEPEST = 10_000  # layers that a list is made for
_DEEP = {"gemma2": 46, "gemma3": 62}  # layers of the 27B models, whose attention has a scale of its own
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_END_TEXTS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")  # llama.cpp's, where a file names none
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def architecture(file: Gguf) -> str:
    """llama.cpp's name of the model's architecture, one of `FAMILIES`."""
    found, kind = file.fields.get("general.architecture"), file.fields.get("general.type", "model")
    if kind != "model" or found == "clip":
        raise InputError(f"{file.path}: holds no language model (general.type = {kind!r}, architecture {found!r})")
    if not isinstance(found, str) or found not in FAMILIES:
        raise InputError(f"{file.path}: general.architecture = {found!r}; kvjax reads {', '.join(FAMILIES)}")
    return found


def config(file: Gguf) -> dict[str, Any]:
    """What `config.json` would be."""
    name = architecture(file)
    left = {key.removeprefix(f"{name}."): _plain(v) for key, v in file.fields.items() if key.startswith(f"{name}.")}
    for key in (*_NEEDED, *_NEEDED_OF.get(name, ())):
        if key not in left:
            raise InputError(f"{file.path}: has no {name}.{key}")
    if "token_embd.weight" not in file.tensors:
        raise InputError(f"{file.path}: has no tensor token_embd.weight")
    made: dict[str, Any] = {"model_type": FAMILIES[name], "vocab_size": left.pop("vocab_size", None)}
    made["vocab_size"] = made["vocab_size"] or file.tensors["token_embd.weight"].shape[0]
    made |= {field: left.pop(key) for key, field in _RENAMED.items() if key in left}
    made["tie_word_embeddings"] = "output.weight" not in file.tensors
    made.setdefault("num_key_value_heads", made["num_attention_heads"])
    if not made.get("sliding_window"):
        made["sliding_window"] = None
    head_dim = _heads(made, left)
    made |= _rope(file, made, left)
    if name == "falcon":
        made = {_FALCON.get(field, field): value for field, value in made.items()} | _falcon(file, made)
    else:
        made["head_dim"] = head_dim
    if name in LIKE_LLAMA:
        made |= {"attention_bias": "blk.0.attn_q.bias" in file.tensors, "mlp_bias": "blk.0.ffn_up.bias" in file.tensors}
        if made["sliding_window"] and made["model_type"] == "llama":
            made["model_type"] = "mistral"
    if name in ("qwen3moe", "gpt-oss") or (name == "llama" and left.get("expert_count")):
        made |= _experts(file, name, left)
    made["layer_types"] = _layer_types(name, made, left)
    if name in _DEEP:
        made["query_pre_attn_scalar"] = _gemma_scale(name, made, left)
    if name == "granite":
        made |= {field: left.pop(key, None) for key, field in _GRANITE.items()}
    if name == "olmo2" and made["sliding_window"]:
        made |= _olmo3(made)
    if name == "mistral3":
        made |= _ministral3(made, left)
    if name == "gpt-oss":
        made["rope_scaling"] = _gpt_oss(made.get("rope_scaling", {"type": "default"}))
    neutral, unread = _NEUTRAL | _NEUTRAL_OF.get(name, {}), _UNREAD.get(name, ())
    left = {k: v for k, v in left.items() if v not in neutral.get(k, ()) and not k.startswith(unread)}
    made |= {f"{name}_{key.replace('.', '_')}": value for key, value in left.items()}
    return {field: value for field, value in made.items() if value is not None}


def generation(file: Gguf) -> dict[str, Any]:
    """What `generation_config.json` would be: the tokens that end a text, and how to sample."""
    ends = [end for end, _ in _ends(file)]
    found = {name: file.fields.get(f"general.sampling.{key}") for key, name in _SAMPLING.items()}
    sampling = {name: value for name, value in found.items() if value is not None}
    return {"eos_token_id": ends or None} | ({"do_sample": True} if sampling else {}) | sampling


def source(file: Gguf, name: str) -> str:
    """The fields that a field of `generation_config.json` is made of."""
    return ", ".join(dict.fromkeys(key for _, key in _ends(file))) if name == "eos_token_id" else "general.sampling"


def _ends(file: Gguf) -> list[tuple[Any, str]]:
    """The tokens that end a text, and the fields that name them."""
    fields, tokens = file.fields, file.fields.get("tokenizer.ggml.tokens", [])
    ends = [(_plain(fields[key]), key) for name in _ENDS if (key := f"tokenizer.ggml.{name}") in fields]
    template = fields.get(key := "tokenizer.chat_template")
    if isinstance(template, str) and isinstance(tokens, list) and "tokenizer.ggml.eot_token_id" not in fields:
        ends += [(tokens.index(text), key) for text in _END_TEXTS if text in template and text in tokens]
    return [(end, key) for i, (end, key) in enumerate(ends) if end not in [earlier for earlier, _ in ends[:i]]]


def _plain(value: Any) -> Any:
    """A field's value; a list that has one for each layer is that value where all are equal."""
    alike = isinstance(value, list) and value and not isinstance(value[0], bool) and value == value[:1] * len(value)
    return value[0] if alike else value


def _heads(made: dict[str, Any], left: dict[str, Any]) -> Any:
    """The width of a head; what a file says otherwise stays in `left`."""
    given = [left.pop(key) for key in ("attention.key_length", "attention.value_length") if key in left]
    size = given[0] if given else _share(made)
    if len(given) == 2 and given[1] != size:
        left["attention.value_length"] = given[1]
    turn = left.pop("rope.dimension_count", size)
    if size is None:  # what it follows from will be refused
        return None
    for key in ("attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa"):
        if left.get(key) == size:
            del left[key]
    if turn != size:
        made["partial_rotary_factor"] = turn / size if type(turn) is type(size) is int and size else turn
    return size


def _share(made: dict[str, Any]) -> int | None:
    """A head's share of the model's width."""
    heads, width = made["num_attention_heads"], made["hidden_size"]
    return width // heads if type(heads) is type(width) is int and heads > 0 else None


def _rope(file: Gguf, made: dict[str, Any], left: dict[str, Any]) -> dict[str, Any]:
    """The scaling of rotary embeddings."""
    take = lambda key: left.pop(f"rope.scaling.{key}", None)
    original, factor = take("original_context_length"), take("factor")
    factor = left.pop("rope.scale_linear", None) if factor is None else factor
    kind = take("type") or ("linear" if factor else "none")
    long, short, freqs = (_factors(file, f"rope_{name}.weight") for name in ("factors_long", "factors_short", "freqs"))
    if long is not None and short is not None:
        block = {
            "type": "longrope",
            "short_factor": short,
            "long_factor": long,
            "attention_factor": take("attn_factor"),
        }
        return {"rope_scaling": block, "original_max_position_embeddings": original}
    if freqs is not None and set(freqs) != {1.0}:  # Llama 3.1's, worked out for each pair of numbers
        if kind != "none":
            raise InputError(f"{file.path}: scales its rotary embedding twice, by rope_freqs.weight and as {kind!r}")
        return {
            "rope_scaling": {"type": "longrope", "short_factor": freqs, "long_factor": freqs, "attention_factor": 1.0}
        }
    if kind == "none" or (kind == "linear" and factor in (None, 0, 1)):
        return {}
    block = {"type": kind, "factor": factor}
    if kind == "yarn":
        betas = {name: take(f"yarn_{name}") for name in ("beta_fast", "beta_slow")}
        attention = take("yarn_attn_factor")  # config.json's, which llama.cpp does not look at; 1 where it has none
        betas["attention_factor"] = None if attention == 1 else attention
        block |= {"original_max_position_embeddings": original} | {k: v for k, v in betas.items() if v is not None}
    return {"rope_scaling": block}


def _factors(file: Gguf, name: str) -> list[float] | None:
    """The numbers of a small float32 tensor."""
    tensor = file.tensors.get(name)
    if tensor is None:
        return None
    if tensor.kind != "F32" or len(tensor.shape) != 1 or tensor.nbytes > 2**16:
        raise InputError(f"{file.path}: tensor {name} is {tensor.kind} of shape {list(tensor.shape)}, expected F32")
    return [float(str(number)) for number in gguf.numbers(tensor).view(np.float32)]


def _falcon(file: Gguf, made: dict[str, Any]) -> dict[str, Any]:
    """Falcon's kinds: 7B has one key/value head, the others have groups, with one norm of a layer or two."""
    two = "blk.0.attn_norm_2.weight" in file.tensors
    if not two and made["num_key_value_heads"] == 1:
        return {"multi_query": True, "new_decoder_architecture": False}
    return {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2 if two else 1}


def _layer_types(name: str, made: dict[str, Any], left: dict[str, Any]) -> list[str] | None:
    """Which layers slide; None where a file does not say."""
    layers, period = made["num_hidden_layers"], left.get("attention.sliding_window_pattern")
    slides = period if isinstance(period, list) else None
    if made["sliding_window"] is None and name in ("gemma3", "gpt-oss"):
        period = 1
    if type(period) is int and period > 0 and type(layers) is int and layers <= DEEPEST:
        slides = [(layer + 1) % period > 0 for layer in range(layers)]
    if slides is None:
        return None
    left.pop("attention.sliding_window_pattern", None)
    return ["sliding_attention" if each else "full_attention" for each in slides]


def _gemma_scale(name: str, made: dict[str, Any], left: dict[str, Any]) -> Any:
    """What the square root of the attention scale is of."""
    scale = left.pop("attention.scale", None)
    if isinstance(scale, float) and scale > 0:
        return (1 / scale) ** 2
    return _share(made) if made["num_hidden_layers"] == _DEEP[name] else made["head_dim"]


def _experts(file: Gguf, name: str, left: dict[str, Any]) -> dict[str, Any]:
    """Experts, whose weights add up to 1 in llama.cpp's graphs of these architectures."""
    if "expert_used_count" not in left:
        raise InputError(f"{file.path}: has no {name}.expert_used_count")
    made = {"num_local_experts": left.pop("expert_count"), "num_experts_per_tok": left.pop("expert_used_count")}
    if name == "llama":
        return made | {"model_type": "mixtral"}
    size = left.pop("expert_feed_forward_length")
    if name == "gpt-oss":
        return made | {"intermediate_size": size}
    return made | {"moe_intermediate_size": size, "norm_topk_prob": True}


def _gpt_oss(block: dict[str, Any]) -> dict[str, Any]:
    """The scaling of gpt-oss, which its own `config.json` does not round.

    Differs: llama.cpp rounds where yarn's ramp begins and ends, for every model.
    """
    return block | {"truncate": False} if block["type"] == "yarn" else block


def _olmo3(made: dict[str, Any]) -> dict[str, Any]:
    """OLMo 3: layers with a window have a rotary embedding that is not scaled."""
    whole = {"rope_theta": made.pop("rope_theta")}
    local = {"rope_theta": made.pop("rope_local_base_freq", whole["rope_theta"])}
    both = {"full_attention": made.pop("rope_scaling", {}) | whole, "sliding_attention": local}
    return {"model_type": "olmo3", "rope_parameters": both}


def _ministral3(made: dict[str, Any], left: dict[str, Any]) -> dict[str, Any]:
    """Ministral 3, whose queries grow with their position, and models before it without that."""
    growth, weight = left.pop("attention.temperature_scale", 0), left.pop("rope.scaling.yarn_log_multiplier", 0)
    block = made.get("rope_scaling", {})
    block |= {"mscale": 1.0, "mscale_all_dim": weight} if weight else {}
    if not growth:
        return {"rope_scaling": block}
    return {"model_type": "ministral3", "rope_scaling": block | {"llama_4_scaling_beta": growth}}
