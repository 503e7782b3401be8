"""Fields of a checkpoint's `config.json`: checked values, and those that are no business of kvjax."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from kvjax.errors import InputError

_ONE = (
    "partial_rotary_factor factor attention_factor logits_scaling logit_scale embedding_multiplier residual_multiplier"
)
# Fields that change nothing at these values: in every family, and in one.
_NEUTRAL = {"hidden_act": ("silu", "swish")} | dict.fromkeys(_ONE.split(), (1,))
_GELU = {"hidden_activation": ("gelu_pytorch_tanh",), "hidden_act": ("gelu_pytorch_tanh",)}
_NEUTRAL_OF = {"falcon": {"activation": ("gelu",)}, "gemma2": _GELU, "gemma3_text": _GELU}
_HARMLESS = set(
    """
    _name_or_path name_or_path _commit_hash _attn_implementation attn_implementation _attn_implementation_autoset
    attn_implementation_internal transformers_version torch_dtype dtype use_cache initializer_range attention_dropout
    hidden_dropout resid_pdrop embd_pdrop attn_pdrop pretraining_tp auto_map torchscript use_bfloat16 tf_legacy_loss
    return_dict output_hidden_states output_attentions output_scores return_dict_in_generate chunk_size_feed_forward
    finetuning_task id2label label2id num_labels problem_type task_specific_params tokenizer_class prefix is_decoder
    classifier_dropout gradient_checkpointing max_sequence_length unsloth_fixed unsloth_version finetuned
    is_llama_config transformers.js_config cache_implementation
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id forced_bos_token_id
    forced_eos_token_id max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p min_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    """.split()
)
_EMPTY = (None, "", [], {})


def refuse_unknown(config: Mapping[str, Any], known: Collection[str], prefix: str, family: str) -> None:
    """Raise for the first field that may change the model's output and is not implemented."""
    neutral = _NEUTRAL | _NEUTRAL_OF.get(family, {})
    for name, value in config.items():
        if name in known or name in _HARMLESS or value in _EMPTY or value is False or value in neutral.get(name, ()):
            continue
        wanted = f" (only {' or '.join(map(repr, neutral[name]))} is)" if name in neutral else ""
        raise InputError(
            f"config.json: {prefix}{name} = {value!r} is not supported for {family} models{wanted}; "
            f"if it does not change the model's output, pass --ignore-config {prefix}{name}"
        )


def positive(fields: Mapping[str, Any], name: str) -> int:
    """A whole number above 0."""
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"config.json: {name} = {value!r}, expected a positive integer")
    return value


def number(fields: Mapping[str, Any], name: str, prefix: str = "") -> float:
    """A number above 0."""
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"config.json: {prefix}{name} = {value!r}, expected a positive number")
    return float(value)


def flag(fields: Mapping[str, Any], name: str) -> bool:
    """True or false; absent is false."""
    value = fields.get(name)
    if not isinstance(value, bool | None):
        raise InputError(f"config.json: {name} = {value!r}, expected true or false")
    return bool(value)
