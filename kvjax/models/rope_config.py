"""The rotary embedding in a checkpoint's `config.json`: both dialects of transformers.

Source: transformers 5.23, `modeling_rope_utils.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kvjax.errors import InputError
from kvjax.models.config_fields import LARGEST, flag, given, number, positive, refuse_unknown
from kvjax.spec import RopeSpec, RopeType

# The fields of each rope type; `original_max_position_embeddings` may always be there.
_ROPE: dict[RopeType, str] = {
    "default": "",
    "linear": "factor",
    "dynamic": "factor",
    "llama3": "factor low_freq_factor high_freq_factor",
    "yarn": "factor attention_factor beta_fast beta_slow mscale mscale_all_dim truncate",
    "longrope": "factor attention_factor short_factor long_factor",
}
_THETA = {
    "smollm3": 2e6,
    "gemma3_text": 1e6,
    "olmo3": 5e5,
    "ministral3": 1e6,
    "mixtral": 1e6,
    "gpt_oss": 1.5e5,
}  # by default, where it is not 10000
_WINDOW_THETA = {"gemma3_text": 1e4, "olmo3": 5e5}  # families whose windows have a rotary embedding of their own
_BLOCK = {  # where a config has none
    "ministral3": {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
    "gpt_oss": {
        "rope_type": "yarn",
        "factor": 32.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}
_PARTIAL = ("phi3",)  # families whose heads may turn in part
_OLD_NAMES = {"phi3": {"su": "longrope", "yarn": "longrope"}}


def parse_rope(config: Mapping[str, Any], max_position: int, family: str) -> tuple[RopeSpec, int]:
    """The rotary embedding and the context limit it gives [tokens].

    Differs: `linear`, `dynamic` and `yarn` stretch the limit by their factor, where transformers has no limit.
    """
    where = "rope_scaling" if _block(config, "rope_scaling") else "rope_parameters"
    block = _block(config, where) or _BLOCK.get(family, {})
    kind = block.get("rope_type", block.get("type", "default"))
    kind = _OLD_NAMES.get(family, {}).get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in _ROPE:
        raise InputError(f"config.json: {where}.rope_type = {kind!r} is not supported; kvjax has {', '.join(_ROPE)}")
    known = {"rope_type", "type", "rope_theta", "original_max_position_embeddings", *_ROPE[kind].split()}
    known |= {"partial_rotary_factor"} if family in _PARTIAL else set()
    known |= {"llama_4_scaling_beta", "max_position_embeddings"} if family == "ministral3" else set()
    refuse_unknown(block, known, f"{where}.", family)
    rope = RopeSpec(_either(config, block, where, "rope_theta", _THETA.get(family, 1e4)), kind)
    if family in _PARTIAL:
        rope = replace(rope, partial=_either(config, block, where, "partial_rotary_factor", 1.0))
    if block.get("llama_4_scaling_beta") is not None:
        if kind != "yarn":
            raise InputError(f"config.json: {where}.llama_4_scaling_beta is supported for yarn, not for {kind}")
        rope = replace(rope, query_growth=number(block, "llama_4_scaling_beta", f"{where}."))
    if kind == "default":
        return rope, max_position
    original = max_position if kind in ("linear", "dynamic") else _original(config, block, max_position)
    if kind in ("yarn", "longrope") and block.get("factor") is None:
        block = block | {"factor": max_position / original}
    rope = replace(rope, factor=number(block, "factor", f"{where}."), original_max_position=original)
    if kind == "llama3":
        return _llama3(block, rope, f"{where}."), max_position
    if kind == "longrope":
        return _longrope(block, rope, f"{where}."), max_position
    limit = min(max(max_position, int(original * rope.factor)), LARGEST)
    return (_yarn(block, rope, f"{where}.") if kind == "yarn" else rope), limit


def parse_ropes(config: Mapping[str, Any], max_position: int, family: str) -> tuple[RopeSpec, RopeSpec | None, int]:
    """The rotary embeddings of all layers and, where it is another, of those with a sliding window; the limit.

    Differs: `max_position_embeddings` of Gemma 3 and OLMo 3 counts tokens after scaling, so that nothing stretches it.
    """
    if family not in _WINDOW_THETA:
        rope, limit = parse_rope(config, max_position, family)
        return rope, None, limit
    both = _block(config, "rope_parameters")
    refuse_unknown(both, {"full_attention", "sliding_attention"}, "rope_parameters.", family)
    whole = {
        "rope_theta": given(config, "rope_theta", _THETA[family]),
        "rope_parameters": _block(config, "rope_scaling") or both.get("full_attention"),
    }
    local = {
        "rope_theta": given(config, "rope_local_base_freq", _WINDOW_THETA[family]),
        "rope_parameters": both.get("sliding_attention"),
    }
    rope, window_rope = (parse_rope(one, max_position, family)[0] for one in (whole, local))
    if "longrope" in (rope.type, window_rope.type):
        raise InputError(f"config.json: rope_type = 'longrope' is not supported for {family} models")
    return rope, window_rope, max_position


def _block(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The object in a field; null is an empty one."""
    block = given(config, name, {})
    if not isinstance(block, dict):
        raise InputError(f"config.json: {name} = {block!r}, expected an object or null")
    return block


def _either(config: Mapping[str, Any], block: Mapping[str, Any], where: str, name: str, default: float) -> float:
    """A number in the rope's own block, else outside of it."""
    own = block.get(name) is not None
    return number({name: block[name] if own else given(config, name, default)}, name, f"{where}." if own else "")


def _original(config: Mapping[str, Any], block: Mapping[str, Any], max_position: int) -> int:
    """Tokens the model was trained on before `llama3` or `yarn` scaling; the outer field wins, as in transformers."""
    name = "original_max_position_embeddings"
    return positive(config if config.get(name) is not None else {name: max_position, **block}, name)


def _llama3(block: Mapping[str, Any], rope: RopeSpec, prefix: str) -> RopeSpec:
    low, high = (number(block, name, prefix) for name in ("low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise InputError(f"config.json: {prefix}low_freq_factor = {low} must be below high_freq_factor = {high}")
    return replace(rope, low_freq_factor=low, high_freq_factor=high)


def _longrope(block: Mapping[str, Any], rope: RopeSpec, prefix: str) -> RopeSpec:
    """Source: transformers `_compute_longrope_parameters`."""

    def factors(name: str) -> tuple[float, ...]:
        given = block.get(name)
        if not isinstance(given, list) or not given:
            raise InputError(f"config.json: {prefix}{name} = {given!r}, expected a list of numbers")
        return tuple(number({name: factor}, name, prefix) for factor in given)

    if rope.original_max_position < 2:
        raise InputError("config.json: original_max_position_embeddings = 1: longrope divides by its logarithm")
    if block.get("attention_factor") is not None:
        attention = number(block, "attention_factor", prefix)
    else:
        attention = math.sqrt(1 + max(math.log(rope.factor), 0.0) / math.log(rope.original_max_position))
    short, long = factors("short_factor"), factors("long_factor")
    return replace(rope, attention_factor=attention, short_factors=short, long_factors=long)


def _yarn(block: Mapping[str, Any], rope: RopeSpec, prefix: str) -> RopeSpec:
    """Source: transformers `_compute_yarn_parameters`."""

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    def weight(name: str) -> float:
        zero = block.get(name) is None or (block[name] == 0 and block[name] is not False)
        return 0.0 if zero else number(block, name, prefix)

    if rope.theta <= 1:
        raise InputError(f"config.json: rope_theta = {rope.theta}, expected more than 1: yarn divides by its logarithm")
    if block.get("attention_factor") is not None:
        attention = number(block, "attention_factor", prefix)
    else:
        one, whole = weight("mscale"), weight("mscale_all_dim")
        attention = mscale(one) / mscale(whole) if one and whole else mscale(1.0)
    beta = {"beta_fast": given(block, "beta_fast", 32), "beta_slow": given(block, "beta_slow", 1)}
    beta = {name: number(beta, name, prefix) for name in beta}
    truncate = flag({"truncate": True, **block}, "truncate", prefix)
    return replace(rope, attention_factor=attention, truncate=truncate, **beta)
