"""Read a checkpoint's `config.json` into a `ModelSpec`: both dialects of transformers, nothing guessed.

A field that kvjax implements is read, a field that cannot change the logits is skipped, and any other field that is
not empty is an error: a model that computes something else must not load.

Source: transformers 5.23, `configuration_utils.py`, `modeling_rope_utils.py`, `models/*/configuration_*.py`;
  InternLM2's own `configuration_internlm2.py`.
"""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvjax.errors import InputError
from kvjax.spec import ModelSpec, RopeSpec, RopeType

# The fields of each family that are read, with the default of the family's own configuration class.
_SIZES = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 2048}
_HEADS = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None}
_LLAMA = _SIZES | _HEADS | {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_MISTRAL = {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}
_QWEN_SIZES = {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768}
_QWEN_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_QWEN2 = _LLAMA | _QWEN_SIZES | _QWEN_WINDOWS | {"num_key_value_heads": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA | {"attention_bias": False, "mlp_bias": False},
    "mistral": _LLAMA | _MISTRAL | {"sliding_window": 4096},
    "qwen2": _QWEN2,
    "qwen3": _QWEN2 | {"head_dim": 128, "attention_bias": False},
    "internlm2": _LLAMA | {"vocab_size": 103168, "bias": True},
}

_READ = set(
    "model_type architectures layer_types "
    "rope_theta rope_scaling rope_parameters original_max_position_embeddings".split()
)
_ONE = (
    "partial_rotary_factor factor attention_factor logits_scaling logit_scale embedding_multiplier residual_multiplier"
)
_NEUTRAL = {"hidden_act": ("silu", "swish")} | dict.fromkeys(_ONE.split(), (1,))
_HARMLESS = set(
    """
    _name_or_path name_or_path _commit_hash _attn_implementation attn_implementation _attn_implementation_autoset
    attn_implementation_internal transformers_version torch_dtype dtype use_cache initializer_range attention_dropout
    hidden_dropout resid_pdrop embd_pdrop attn_pdrop pretraining_tp auto_map torchscript use_bfloat16 tf_legacy_loss
    return_dict output_hidden_states output_attentions output_scores return_dict_in_generate chunk_size_feed_forward
    finetuning_task id2label label2id num_labels problem_type task_specific_params tokenizer_class prefix is_decoder
    classifier_dropout gradient_checkpointing max_sequence_length unsloth_fixed unsloth_version finetuned
    is_llama_config transformers.js_config
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id forced_bos_token_id
    forced_eos_token_id max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p min_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    """.split()
)
_EMPTY = (None, "", [], {})

# The fields of each rope type; `original_max_position_embeddings` may always be there.
_ROPE: dict[RopeType, str] = {
    "default": "",
    "linear": "factor",
    "dynamic": "factor",
    "llama3": "factor low_freq_factor high_freq_factor",
    "yarn": "factor attention_factor beta_fast beta_slow mscale mscale_all_dim truncate",
}


def parse_json(path: Path) -> Any:
    """What a JSON file holds."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    content = parse_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, expected a JSON object")
    return content


def read_config(path: Path, ignore: Collection[str] = ()) -> ModelSpec:
    """The model that `config.json` in the directory `path` describes.

    Args:
      path: a checkpoint directory.
      ignore: fields to treat as absent; `rope_scaling.NAME` for a field inside `rope_scaling`.
    """
    return parse_config(read_json(path / "config.json"), ignore)


def parse_config(config: Mapping[str, Any], ignore: Collection[str] = ()) -> ModelSpec:
    """The model that the content of a `config.json` describes; see `read_config`."""
    config = _drop(config, ignore)
    family = _family(config)
    _refuse_unknown(config, {*FAMILIES[family], *_READ}, "", family)
    fields = FAMILIES[family] | {name: value for name, value in config.items() if name in FAMILIES[family]}
    embed_dim, layers = _positive(fields, "hidden_size"), _positive(fields, "num_hidden_layers")
    heads, kv_heads, head_dim = _heads(fields, embed_dim)
    rope, max_position = _rope(config, _positive(fields, "max_position_embeddings"), family)
    bias = _flag(fields, "attention_bias") or _flag(fields, "bias")
    return ModelSpec(
        vocab_size=_positive(fields, "vocab_size"),
        embed_dim=embed_dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_dim=_positive(fields, "intermediate_size"),
        max_position=max_position,
        rope=rope,
        norm_eps=_number(fields, "rms_norm_eps"),
        windows=_windows(fields, config.get("layer_types"), family),
        tie_embeddings=_flag(fields, "tie_word_embeddings"),
        qkv_bias=bias or family == "qwen2",
        o_bias=bias,
        mlp_bias=_flag(fields, "mlp_bias"),
        qk_norm=family == "qwen3",
        family=family,
    )


def read_generation_config(path: Path) -> tuple[int, ...]:
    """The end-of-sequence ids of a checkpoint directory; () when it names none."""
    for name in ("generation_config.json", "config.json"):
        if not (path / name).is_file():
            continue
        ids = read_json(path / name).get("eos_token_id")
        if ids is None:
            continue
        ids = ids if isinstance(ids, list) else [ids]
        if not all(isinstance(i, int) for i in ids):
            raise InputError(f"{path / name}: eos_token_id = {ids}, expected an integer or a list of integers")
        return tuple(ids)
    return ()


def _drop(config: Mapping[str, Any], ignore: Collection[str]) -> dict[str, Any]:
    """`config` without the fields in `ignore`, which must exist."""
    kept = {name: dict(value) if isinstance(value, dict) else value for name, value in config.items()}
    for field in ignore:
        outer, _, inner = field.partition(".")
        owner, name = (kept.get(outer), inner) if inner else (kept, outer)
        if not isinstance(owner, dict) or name not in owner:
            raise InputError(f"--ignore-config {field}: config.json has no such field")
        del owner[name]
    return kept


def _family(config: Mapping[str, Any]) -> str:
    """The family by `model_type`, else by `architectures`; the two must agree."""
    architectures = config.get("architectures") or []
    by_class = {f"{name}forcausallm": name for name in FAMILIES}
    family = config.get("model_type")
    if not family and architectures:
        family = by_class.get(str(architectures[0]).casefold(), architectures[0])
    if not isinstance(family, str) or family not in FAMILIES:
        raise InputError(
            f"config.json: model_type = {config.get('model_type')!r}, architectures = {architectures}: "
            f"unknown family; kvjax reads {', '.join(FAMILIES)}"
        )
    for name in architectures:
        if by_class.get(str(name).casefold()) != family:
            raise InputError(
                f"config.json: architectures = {architectures} is not the causal language model of "
                f"model_type {family!r}; if the weights are, pass --ignore-config architectures"
            )
    return family


def _refuse_unknown(config: Mapping[str, Any], known: Collection[str], prefix: str, family: str) -> None:
    """Raise for the first field that may change the model's output and is not implemented."""
    for name, value in config.items():
        if name in known or name in _HARMLESS or value in _EMPTY or value is False or value in _NEUTRAL.get(name, ()):
            continue
        wanted = f" (only {' or '.join(map(repr, _NEUTRAL[name]))} is)" if name in _NEUTRAL else ""
        raise InputError(
            f"config.json: {prefix}{name} = {value!r} is not supported for {family} models{wanted}; "
            f"if it does not change the model's output, pass --ignore-config {prefix}{name}"
        )


def _heads(fields: Mapping[str, Any], embed_dim: int) -> tuple[int, int, int]:
    """Query heads, key/value heads and the width of a head; null means as many, and an even share of the model."""
    heads = _positive(fields, "num_attention_heads")
    kv_heads = heads if fields["num_key_value_heads"] is None else _positive(fields, "num_key_value_heads")
    if heads % kv_heads:
        raise InputError(
            f"config.json: num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}"
        )
    if fields["head_dim"] is None and embed_dim % heads:
        raise InputError(f"config.json: hidden_size = {embed_dim} is not a multiple of num_attention_heads = {heads}")
    head_dim = embed_dim // heads if fields["head_dim"] is None else _positive(fields, "head_dim")
    if head_dim % 2:
        raise InputError(f"config.json: head_dim = {head_dim} is odd; rotary embeddings need an even one")
    return heads, kv_heads, head_dim


def _positive(fields: Mapping[str, Any], name: str) -> int:
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"config.json: {name} = {value!r}, expected a positive integer")
    return value


def _number(fields: Mapping[str, Any], name: str, prefix: str = "") -> float:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"config.json: {prefix}{name} = {value!r}, expected a positive number")
    return float(value)


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if not isinstance(value, bool | None):
        raise InputError(f"config.json: {name} = {value!r}, expected true or false")
    return bool(value)


def _windows(fields: Mapping[str, Any], given: Any, family: str) -> tuple[int | None, ...]:
    """Sliding window of each layer; () when no layer has one."""
    layers, first = fields["num_hidden_layers"], fields.get("max_window_layers", 0)
    used = fields.get("sliding_window") is not None and (family == "mistral" or _flag(fields, "use_sliding_window"))
    window = _positive(fields, "sliding_window") if used else None
    if not isinstance(first, int):
        raise InputError(f"config.json: max_window_layers = {first!r}, expected an integer")
    types = ["sliding_attention" if window and layer >= first else "full_attention" for layer in range(layers)]
    if given is not None:
        accepted = ["full_attention", "sliding_attention"] if window else ["full_attention"]
        fits = isinstance(given, list) and len(given) == layers and all(kind in accepted for kind in given)
        # Only Qwen's models look at `layer_types`; elsewhere it may say no more than the other fields do.
        if not fits or ("qwen" not in family and given != types):
            raise InputError(
                f"config.json: layer_types = {given} does not fit a {family} model of {layers} layers with "
                f"sliding window {window}; each may be {' or '.join(accepted)}"
            )
        types = given
    return tuple(window if kind == "sliding_attention" else None for kind in types) if window else ()


def _rope(config: Mapping[str, Any], max_position: int, family: str) -> tuple[RopeSpec, int]:
    """The rotary embedding and the context limit it gives [tokens].

    Differs: `linear`, `dynamic` and `yarn` stretch the limit by their factor, where transformers has no limit.
    """
    where = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    block = config.get(where) or {}
    if not isinstance(block, dict):
        raise InputError(f"config.json: {where} = {block!r}, expected an object or null")
    kind = block.get("rope_type", block.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE:
        raise InputError(f"config.json: {where}.rope_type = {kind!r} is not supported; kvjax has {', '.join(_ROPE)}")
    known = {"rope_type", "type", "rope_theta", "original_max_position_embeddings", *_ROPE[kind].split()}
    _refuse_unknown(block, known, f"{where}.", family)
    block = {"rope_theta": config.get("rope_theta") or 10000.0} | block
    rope = RopeSpec(_number(block, "rope_theta", f"{where}."), kind)
    if kind == "default":
        return rope, max_position
    original = max_position if kind in ("linear", "dynamic") else _original(config, block, max_position)
    if kind == "yarn" and block.get("factor") is None:
        block["factor"] = max_position / original
    rope = replace(rope, factor=_number(block, "factor", f"{where}."), original_max_position=original)
    if kind == "llama3":
        return _llama3(block, rope, f"{where}."), max_position
    limit = max(max_position, int(original * rope.factor))
    return (_yarn(block, rope, f"{where}.") if kind == "yarn" else rope), limit


def _original(config: Mapping[str, Any], block: Mapping[str, Any], max_position: int) -> int:
    """Tokens the model was trained on before `llama3` or `yarn` scaling; the outer field wins, as in transformers."""
    name = "original_max_position_embeddings"
    return _positive(config if config.get(name) is not None else {name: max_position, **block}, name)


def _llama3(block: Mapping[str, Any], rope: RopeSpec, prefix: str) -> RopeSpec:
    low, high = (_number(block, name, prefix) for name in ("low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise InputError(f"config.json: {prefix}low_freq_factor = {low} must be below high_freq_factor = {high}")
    return replace(rope, low_freq_factor=low, high_freq_factor=high)


def _yarn(block: Mapping[str, Any], rope: RopeSpec, prefix: str) -> RopeSpec:
    """Source: transformers `_compute_yarn_parameters`."""

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if block.get("attention_factor") is not None:
        attention = _number(block, "attention_factor", prefix)
    elif block.get("mscale") and block.get("mscale_all_dim"):
        attention = mscale(_number(block, "mscale", prefix)) / mscale(_number(block, "mscale_all_dim", prefix))
    else:
        attention = mscale(1.0)
    beta = {"beta_fast": block.get("beta_fast") or 32, "beta_slow": block.get("beta_slow") or 1}
    beta = {name: _number(beta, name, prefix) for name in beta}
    return replace(rope, attention_factor=attention, truncate=bool(block.get("truncate", True)), **beta)
