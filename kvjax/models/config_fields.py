"""Fields of a checkpoint's `config.json`: checked values, and those that are no business of kvjax."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from kvjax.errors import InputError

LARGEST = 2**31 - 1  # of integers: positions and sizes are 32 bits wide
_LEAST, _MOST = (float(x) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))

_ONE = (
    "partial_rotary_factor factor attention_factor logits_scaling logit_scale embedding_multiplier residual_multiplier"
)
# Fields that change nothing at these values: in every family, and in one.
_NEUTRAL = {"hidden_act": ("silu", "swish"), "is_causal": (True,)} | dict.fromkeys(_ONE.split(), (1,))
_GELU = {"hidden_activation": ("gelu_pytorch_tanh",), "hidden_act": ("gelu_pytorch_tanh",)}
_PHI = {"full_attn_mod": (1,), "interpolate_factor": (1,)}
_NEUTRAL_OF = {"falcon": {"activation": ("gelu",)}, "gemma2": _GELU, "gemma3_text": _GELU, "phi3": _PHI}
# Fields that add something to a model, and nothing where they are false or empty.
_EXTRA = set(
    """
    is_encoder_decoder tie_encoder_decoder add_cross_attention cross_attention_hidden_size pruned_heads
    quantization_config compression_config attention_bias mlp_bias bias qkv_bias attention_qkv_bias attn_bias use_bias
    use_qkv_bias lm_head_bias sliding_window use_sliding_window alibi use_alibi use_mrope mrope_section rope_interleaved
    use_dynamic_ntk use_logn_attn qk_norm use_qk_norm qk_layernorm use_bidirectional_attention clip_qkv mup use_mup
    output_router_logits apply_residual_connection_post_layernorm attn_logit_softcapping final_logit_softcapping
    """.split()
)
_HARMLESS = set(
    """
    _name_or_path name_or_path _commit_hash _attn_implementation attn_implementation _attn_implementation_autoset
    attn_implementation_internal _flash_attn_2_enabled transformers_version torch_dtype dtype use_cache
    initializer_range attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop pretraining_tp auto_map
    torchscript use_bfloat16 tf_legacy_loss return_dict output_hidden_states output_attentions output_scores
    return_dict_in_generate chunk_size_feed_forward finetuning_task id2label label2id num_labels problem_type
    task_specific_params tokenizer_class prefix is_decoder classifier_dropout gradient_checkpointing max_sequence_length
    unsloth_fixed unsloth_version finetuned is_llama_config transformers.js_config cache_implementation
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id forced_bos_token_id
    forced_eos_token_id max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p min_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences remove_invalid_values
    router_aux_loss_coef router_jitter_noise exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    """.split()
)
_EMPTY = (False, "", [], {})


def refuse_unknown(config: Mapping[str, Any], known: Collection[str], prefix: str, family: str) -> None:
    """Raise for the first field that may change the model's output and is not implemented.

    A field that is null is not given, but for those whose default is to do something.
    """
    neutral = _NEUTRAL | _NEUTRAL_OF.get(family, {})
    for name, value in config.items():
        if name in known or name in _HARMLESS or (value is None and name != "is_causal"):
            continue
        if _among(value, neutral.get(name, ())) or (name in _EXTRA and _among(value, _EMPTY)):
            continue
        wanted = f" (only {' or '.join(map(repr, neutral[name]))} is)" if name in neutral else ""
        raise InputError(
            f"config.json: {prefix}{name} = {value!r} is not supported for {family} models{wanted}; "
            f"if it does not change the model's output, pass --ignore-config {prefix}{name}"
        )


def _among(value: Any, accepted: Collection[Any]) -> bool:
    """Whether a value is one of those; true is not 1, and false is not 0."""
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in accepted)


def given(fields: Mapping[str, Any], name: str, default: Any) -> Any:
    """A field, or its default where it is absent or null."""
    return default if fields.get(name) is None else fields[name]


def positive(fields: Mapping[str, Any], name: str, most: int = LARGEST) -> int:
    """A whole number above 0."""
    return whole(fields, name, 1, most, "a positive integer")


def whole(fields: Mapping[str, Any], name: str, least: int, most: int = LARGEST, what: str = "an integer") -> int:
    """A whole number between two."""
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"config.json: {name} = {value!r}, expected {what}")
    if value > most:
        raise InputError(f"config.json: {name} = {value!r}, expected {what} up to {most}")
    return value


def number(fields: Mapping[str, Any], name: str, prefix: str = "") -> float:
    """A number above 0 that is one in float32 too."""
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise InputError(f"config.json: {prefix}{name} = {value!r}, expected a positive number")
    if not _LEAST <= value <= _MOST:
        raise InputError(f"config.json: {prefix}{name} = {value!r}, expected a positive number of float32")
    return float(value)


def flag(fields: Mapping[str, Any], name: str, prefix: str = "") -> bool:
    """True or false; absent is false."""
    value = fields.get(name)
    if not isinstance(value, bool | None):
        raise InputError(f"config.json: {prefix}{name} = {value!r}, expected true or false")
    return bool(value)
