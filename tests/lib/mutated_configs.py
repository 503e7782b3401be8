"""Mutated config.json, generation_config.json and kvjax.json: what is accepted is what the JSON says."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from kvjax.checkpoint import orbax
from kvjax.models import config_fields
from kvjax.models.hf_config import read_config, read_generation_config
from kvjax.spec import ModelSpec, RopeSpec
from tests import golden
from tests.lib.mutate import DEEP, REFUSED, Kind, dump, json_of, reading, refused

FAMILIES = ("llama_gqa", "llama3_scaling", "mistral_window", "phi3_longrope", "qwen2_window", "falcon_40b", "gemma2")
SHOWN = ("id2label", "use_cache", "dtype", "eos_token_id")  # of the fields that do not matter
EMPTY = (None, False, "", [], {})
# What a field means: an attribute of the model's description.
MEANS = {
    "vocab_size": "vocab_size", "hidden_size": "embed_dim", "intermediate_size": "mlp_dim",
    "ffn_hidden_size": "mlp_dim", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads", "head_dim": "head_dim", "rms_norm_eps": "norm_eps",
    "layer_norm_epsilon": "norm_eps", "tie_word_embeddings": "tie_embeddings", "mlp_bias": "mlp_bias",
    "attention_bias": "qkv_bias", "bias": "o_bias", "model_type": "family", "attn_logit_softcapping": "score_cap",
    "final_logit_softcapping": "logit_cap",
}  # fmt: skip
ROPE_MEANS = {name.name: name.name for name in dataclasses.fields(RopeSpec)} | {
    "rope_theta": "theta", "rope_type": "type", "short_factor": "short_factors", "long_factor": "long_factors",
    "original_max_position_embeddings": "original_max_position", "partial_rotary_factor": "partial",
}  # fmt: skip
ONLY = {"alibi": (False,), "hidden_act": ("silu", "swish"), "activation": ("gelu",), "is_encoder_decoder": (False,)}
ONLY |= {"hidden_activation": ("gelu_pytorch_tanh",)}
FLAGS = ("multi_query", "new_decoder_architecture", "parallel_attn", "use_sliding_window")


def base(name: str) -> dict[str, Any]:
    """A family's config without most of what does not matter."""
    config = golden.load(name).config
    return {k: v for k, v in config.items() if k not in config_fields._HARMLESS or k in SHOWN}


def same(given: Any, found: Any) -> bool:
    """Whether a value is what was given: true is not 1, a whole number may stand for a real one."""
    if isinstance(given, list) and isinstance(found, tuple):
        return len(given) == len(found) and all(map(same, given, found))
    return given == found and (type(given) is type(found) or (type(given), type(found)) == (int, float))


def means(name: str, value: Any, spec: ModelSpec, config: dict[str, Any]) -> bool:
    """Whether a model is what one field of its config says."""
    block = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if value is None:
        return True
    if name in MEANS:
        return same(value, getattr(spec, MEANS[name]))
    if name in ONLY:
        return any(value is each or (isinstance(each, str) and value == each) for each in ONLY[name])
    if name in FLAGS:
        return isinstance(value, bool)
    if name == "max_position_embeddings":
        stretched = spec.rope.type in ("linear", "dynamic", "yarn")
        return same(value, spec.max_position) or (stretched and type(value) is int and 0 < value < spec.max_position)
    if name == "num_kv_heads":
        return same(value, spec.num_kv_heads) or config.get("new_decoder_architecture") is not True
    if name == "num_ln_in_parallel_attn":
        return same(value, spec.parallel_norms) or config.get("parallel_attn") is False
    if name == "query_pre_attn_scalar":
        return not isinstance(value, bool) and spec.score_scale == value**-0.5
    if name == "sliding_window":
        return set(spec.windows) <= {None, value} and not isinstance(value, bool)
    if name == "max_window_layers":
        return type(value) is int
    if name == "layer_types":
        return isinstance(value, list) and value == [
            "full_attention" if window is None else "sliding_attention"
            for window in spec.windows or [None] * spec.num_layers
        ]
    if name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        outer = name == "original_max_position_embeddings"
        used = spec.rope.original_max_position > 0 if outer else block.get(name) is None
        return not used or same(value, getattr(spec.rope, ROPE_MEANS[name]))
    if name in ("rope_parameters", "rope_scaling"):
        return isinstance(value, dict) and (value != block or all(turns(k, v, spec, config) for k, v in value.items()))
    if name == "architectures":
        return isinstance(value, list) and all(isinstance(one, str) for one in value)
    return any(value is each or (value == each and type(value) is type(each)) for each in EMPTY)


def turns(name: str, value: Any, spec: ModelSpec, config: dict[str, Any]) -> bool:
    """Whether a rotary embedding is what one field of its block says."""
    # The outer field wins, and Phi-3 has one by default: 4096.
    outer = name == "original_max_position_embeddings" and (config.get(name) is not None or spec.family == "phi3")
    if value is None or outer or (name == "type" and "rope_type" in config.get("rope_scaling", {})):
        return True
    if name == "original_max_position_embeddings" and not spec.rope.original_max_position:
        return True  # a default rope does not look at it
    if name in ROPE_MEANS:
        return same(value, getattr(spec.rope, ROPE_MEANS[name], None))
    return any(value is each or (value == each and type(value) is type(each)) for each in EMPTY)


def config_holds(case: tuple[str, bytes], folder: Path) -> None:
    """An accepted config is, field by field, what it says; what cannot matter changes nothing."""
    name, text = case
    (folder / "config.json").write_bytes(text)
    spec, config = refused(lambda: read_config(folder)), reading(json.loads, text)
    if spec is REFUSED:
        return
    assert isinstance(config, dict)
    original = base(name)
    changed = {k for k in {*config, *original} if k not in config or k not in original or config[k] != original[k]}
    for field in config.keys() - config_fields._HARMLESS:
        assert means(field, config[field], spec, config), (field, config[field], spec)
    if changed <= config_fields._HARMLESS:
        (folder / "config.json").write_text(json.dumps(original))
        assert spec == read_config(folder)


EOS = [{"eos_token_id": [3, 5]}, {"eos_token_id": 7, "do_sample": True, "temperature": 0.6}]


def stop_holds(text: bytes, folder: Path) -> None:
    """Accepted stop tokens are those that the file lists, and ids of the vocabulary."""
    (folder / "generation_config.json").write_bytes(text)
    found, config = refused(lambda: read_generation_config(folder, 97)), reading(json.loads, text)
    if found is REFUSED:
        return
    assert isinstance(config, dict)
    given = config.get("eos_token_id")
    given = [] if given is None else given if isinstance(given, list) else [given]
    assert same(given, found.ids) and all(0 <= i < 97 for i in found.ids)


GATE = {"objective": "dms", "rate": 2.0, "window": 16, "neuron": -1, "offset": 5.0, "scale": 100.0}
ABOUT = {"format": orbax.FORMAT, "dtype": "float32", "ignore_config": ["sliding_window"]}
NOTED = [ABOUT | {"gate": GATE}, ABOUT | {"latent": {"heads": 2, "ranks": [[8, 6], [4, 16]]}}]


def about_holds(text: bytes, folder: Path) -> None:
    """An accepted conversion is what kvjax.json notes, and no more of it is left out than it lists."""
    config = golden.load("mistral_window").config
    (folder / "config.json").write_text(json.dumps(config))
    (folder / orbax.ABOUT).write_bytes(text)
    spec, about = refused(lambda: orbax.read_spec(folder)), reading(json.loads, text)
    if spec is REFUSED:
        return
    assert isinstance(about, dict) and same(about["format"], orbax.FORMAT) and isinstance(about["dtype"], str)
    assert ("sliding_window" in about.get("ignore_config", [])) == (9 not in spec.windows)
    if "gate" in about:
        found = dataclasses.asdict(spec.gate)
        assert about["gate"].keys() <= found.keys()
        assert all(same(value, found[name]) for name, value in about["gate"].items())
    if "latent" in about:
        assert same(about["latent"]["heads"], spec.latent.heads) and spec.num_kv_heads % spec.latent.heads == 0
        assert [list(pair) for pair in spec.latent.ranks] == about["latent"]["ranks"]
    assert (spec.gate is None, spec.latent is None) == ("gate" not in about, "latent" not in about)


WRONG = [
    {"architectures": 5}, {"architectures": True}, {"vocab_size": 10**309}, {"num_hidden_layers": 10**9},
    {"rope_theta": 0}, {"rope_theta": False}, {"rope_theta": ""}, {"hidden_act": False}, {"hidden_act": ""},
    {"rope_parameters": 0}, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1, "factor": 4.0}},
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "truncate": "false"}},
    {"extra\x1b[31m": 1}, {"extra": "a" * 10**6}, {"rms_norm_eps": 1e-50},
]  # fmt: skip
NOTED_WRONG = [{"gate": GATE | {"neuron": 99}}, {"gate": 5}, {"latent": [1]}, {"latent": {}}, {"dtype": "int8"}]
KINDS = {
    "config.json": Kind(
        st.sampled_from(FAMILIES).flatmap(lambda name: st.tuples(st.just(name), json_of(base(name)))),
        config_holds,
        [("llama_gqa", dump(base("llama_gqa") | wrong)) for wrong in WRONG]
        + [("mistral_window", dump(base("mistral_window") | {"sliding_window": 2**31}))]
        + [("llama_gqa", deep) for deep in DEEP],
    ),
    "generation_config.json": Kind(
        st.one_of(*map(json_of, EOS)),
        stop_holds,
        [dump({"eos_token_id": wrong}) for wrong in (-1, 99999, 2**31, True, [False], "2", 2.0)],
    ),
    "kvjax.json": Kind(st.one_of(*map(json_of, NOTED)), about_holds, [dump(ABOUT | wrong) for wrong in NOTED_WRONG]),
}
