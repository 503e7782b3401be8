"""Read a checkpoint's `config.json` into a `ModelSpec`: both dialects of transformers, nothing guessed.

A field that kvjax implements is read, a field that cannot change the logits is skipped, and any other field that is
not null is an error: a model that computes something else must not load.

Source: transformers 5.23, `configuration_utils.py`, `modeling_rope_utils.py`, `models/*/configuration_*.py`;
  InternLM2's own `configuration_internlm2.py`.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from kvjax.errors import InputError, say_once
from kvjax.files.gguf import is_gguf
from kvjax.models import small_files
from kvjax.models.config_fields import flag, given, number, positive, refuse_unknown, whole
from kvjax.models.rope_config import parse_ropes
from kvjax.spec import ExpertSpec, ModelSpec, RopeSpec

# The fields of each family that are read, with the default of the family's own configuration class.
_SIZES = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 2048}
_HEADS = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None}
_LLAMA = _SIZES | _HEADS | {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_MISTRAL = {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}
_QWEN_SIZES = {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768}
_QWEN_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_QWEN2 = _LLAMA | _QWEN_SIZES | _QWEN_WINDOWS | {"num_key_value_heads": 32}
_PHI3 = {"vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096}
_PHI3 |= {"original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "sliding_window": None}
_PHI3 |= {"partial_rotary_factor": 1.0}
_FALCON = {"vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71}
_FALCON |= {"num_kv_heads": None, "ffn_hidden_size": None, "max_position_embeddings": 2048, "alibi": False}
_FALCON |= {"layer_norm_epsilon": 1e-5, "bias": False, "tie_word_embeddings": True, "multi_query": True}
_FALCON |= {"parallel_attn": True, "new_decoder_architecture": False, "num_ln_in_parallel_attn": None}
_GEMMA2 = {"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
_GEMMA2 |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192}
_GEMMA2 |= {"tie_word_embeddings": True, "attention_bias": False, "query_pre_attn_scalar": 256, "sliding_window": 4096}
_GEMMA2 |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_GEMMA3 = {"vocab_size": 262208, "max_position_embeddings": 131072, "final_logit_softcapping": None}
_GEMMA3 |= {"sliding_window_pattern": None, "_sliding_window_pattern": None, "rope_local_base_freq": None}
_SMOLLM3 = {"vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16}
_SMOLLM3 |= {"num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": True}
_SMOLLM3 |= {"attention_bias": False, "mlp_bias": False, "use_sliding_window": False, "sliding_window": None}
_SMOLLM3 |= {"no_rope_layers": None, "no_rope_layer_interval": 4, "max_window_layers": None}
_OLMO = {"vocab_size": 50304, "rms_norm_eps": 1e-5, "attention_bias": False}
_MINISTRAL3 = {"vocab_size": 131072, "num_hidden_layers": 34, "head_dim": 128, "max_position_embeddings": 262144}
_MINISTRAL3 |= {"rms_norm_eps": 1e-5, "sliding_window": None}
_MIXTRAL = {
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "num_local_experts": 8,
    "num_experts": None,
    "num_experts_per_tok": 2,
}
_QWEN3_MOE = _QWEN_SIZES | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24}
_QWEN3_MOE |= {"num_key_value_heads": 4, "attention_bias": False, "use_sliding_window": False, "sliding_window": 4096}
_QWEN3_MOE |= {
    "max_window_layers": None,
    "num_local_experts": 128,
    "num_experts_per_tok": 8,
    "num_experts": None,
    "moe_intermediate_size": 768,
}
_QWEN3_MOE |= {"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": None}
_GPT_OSS = {"vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36}
_GPT_OSS |= {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072}
_GPT_OSS |= {"rms_norm_eps": 1e-5, "sliding_window": 128, "attention_bias": True, "num_local_experts": 128}
_GPT_OSS |= {"num_experts": None, "num_experts_per_tok": 4, "swiglu_alpha": 1.702, "swiglu_limit": 7.0}
_GPT_OSS |= {"quantization_config": None, "experts_per_token": None, "initial_context_length": None}
_GRANITE = {f"{name}_multiplier": 1.0 for name in ("embedding", "attention", "residual")} | {"logits_scaling": 1.0}
_GEMMA = ("gemma2", "gemma3_text")
_LAYER_TYPES = (
    "qwen2",
    "qwen3",
    *_GEMMA,
    "smollm3",
    "olmo3",
    "ministral",
    "gpt_oss",
)  # families that look at `layer_types`
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA | {"attention_bias": False, "mlp_bias": False},
    "mistral": _LLAMA | _MISTRAL | {"sliding_window": 4096},
    "qwen2": _QWEN2,
    "qwen3": _QWEN2 | {"head_dim": 128, "attention_bias": False},
    "internlm2": _LLAMA | {"vocab_size": 103168, "bias": True},
    "falcon": _FALCON,
    "phi3": _LLAMA | _PHI3,
    "gemma2": _LLAMA | _GEMMA2,
    "gemma3_text": {k: v for k, v in (_LLAMA | _GEMMA2 | _GEMMA3).items() if k != "attn_logit_softcapping"},
    "smollm3": _LLAMA | _SMOLLM3,
    "ministral": _LLAMA | _MISTRAL | {"sliding_window": 4096},
    "ministral3": _LLAMA | _MISTRAL | _MINISTRAL3,
    "mixtral": _LLAMA | _MISTRAL | _MIXTRAL,
    "qwen3_moe": _LLAMA | _QWEN3_MOE,
    "gpt_oss": _LLAMA | _GPT_OSS,
    "granite": _LLAMA | _GRANITE | {"attention_bias": False, "mlp_bias": False},
    "olmo2": _LLAMA | _OLMO,
    "olmo3": _LLAMA | _OLMO | {"sliding_window": 4096},
}
# Models that read images too: what their text part is, by default the first, and fields that only images need.
_VISION: dict[str, tuple[tuple[str, ...], str]] = {
    "gemma3": (("gemma3_text",), "mm_tokens_per_image boi_token_index eoi_token_index"),
    "mistral3": (
        ("mistral", "ministral", "ministral3"),
        "projector_hidden_act multimodal_projector_bias spatial_merge_size vision_feature_layer",
    ),
}

_READ = set(
    "model_type architectures layer_types "
    "rope_theta rope_scaling rope_parameters original_max_position_embeddings".split()
)
DEEPEST = 10_000  # layers and experts that a config may name, far more than any model has


def read_config(path: Path, ignore: Collection[str] = ()) -> ModelSpec:
    """The model that `config.json` in the directory `path` describes.

    Args:
      path: a checkpoint directory, or a GGUF file.
      ignore: fields to treat as absent; `rope_scaling.NAME` for a field inside `rope_scaling`.
    """
    content = small_files.config(path)
    try:
        return parse_config(content, ignore)
    except InputError as error:
        if is_gguf(path):
            raise InputError(f"{path}, read as {error}") from None
        raise


def parse_config(config: Mapping[str, Any], ignore: Collection[str] = ()) -> ModelSpec:
    """The model that the content of a `config.json` describes; see `read_config`."""
    config, prefix = _text_part(_drop(config, ignore))
    family = _family(config)
    refuse_unknown(config, {*FAMILIES[family], *_READ}, prefix, family)
    fields = FAMILIES[family] | {name: value for name, value in config.items() if name in FAMILIES[family]}
    for name, default in FAMILIES[family].items():
        if isinstance(default, bool):
            flag(fields, name)  # also where this model does not look at it
    mathematics = _falcon(fields) if family == "falcon" else _llama(fields, family)
    if family in ("olmo2", "olmo3"):
        mathematics |= {"pre_norms": False, "post_norms": True, "qk_norm": True, "joint_qk_norm": True}
    if family in ("mixtral", "qwen3_moe", "gpt_oss"):
        mathematics |= _experts(fields)
    if family == "gpt_oss":
        mathematics |= _gpt_oss(fields, mathematics["experts"])
    if family == "granite":
        mathematics |= _granite(fields)
    if family in _GEMMA:
        mathematics |= _gemma(fields)
    if family == "falcon":
        fields = _falcon_sizes(fields)
    mlp_dim = positive(fields, "intermediate_size")
    embed_dim, layers = positive(fields, "hidden_size"), positive(fields, "num_hidden_layers", DEEPEST)
    heads, kv_heads, head_dim = _heads(fields, embed_dim)
    rope, window_rope, max_position = parse_ropes(
        FAMILIES[family] | config, positive(fields, "max_position_embeddings"), family
    )
    _check_width(rope, head_dim)
    return ModelSpec(
        vocab_size=positive(fields, "vocab_size"),
        embed_dim=embed_dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_dim=positive(fields, "moe_intermediate_size") if "moe_intermediate_size" in fields else mlp_dim,
        max_position=max_position,
        rope=rope,
        window_rope=window_rope,
        norm_eps=number(fields, "rms_norm_eps"),
        windows=_windows(fields, config.get("layer_types"), family),
        no_rope=_no_rope(fields),
        tie_embeddings=flag(fields, "tie_word_embeddings"),
        family=family,
        **mathematics,
    )


def to_config(spec: ModelSpec) -> dict[str, Any]:
    """`config.json` in the dialect of transformers 4: what `parse_config` reads as this model.

    It is one with Llama's layers, without windows, whose rotary embedding is not scaled.
    """
    return {
        "architectures": [f"{spec.family.capitalize()}ForCausalLM"],
        "model_type": spec.family,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.embed_dim,
        "intermediate_size": spec.mlp_dim,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_position,
        "rope_theta": spec.rope.theta,
        "rms_norm_eps": spec.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": spec.tie_embeddings,
        "torch_dtype": "bfloat16",
        **({"sliding_window": None} if spec.family == "mistral" else {}),
    }


def _check_width(rope: RopeSpec, head_dim: int) -> None:
    """Raise `InputError` for a rotary embedding that does not fit heads of a width."""
    width = rope.width(head_dim)
    if rope.partial > 1 or width < 2 or width % 2:
        raise InputError(
            f"config.json: partial_rotary_factor = {rope.partial} turns {width} numbers of a head of {head_dim}, "
            "expected an even number of them, at most all"
        )
    if rope.type == "dynamic" and width == 2:
        raise InputError("config.json: rope_type = 'dynamic' has no meaning for a head of which 2 numbers turn")
    if rope.type == "longrope" and {len(rope.short_factors), len(rope.long_factors)} != {width // 2}:
        raise InputError(
            f"config.json: short_factor and long_factor have {len(rope.short_factors)} and {len(rope.long_factors)} "
            f"numbers, expected {width // 2} for heads of which {width} numbers turn"
        )


def _llama(fields: Mapping[str, Any], family: str) -> dict[str, Any]:
    """What tells Llama and its relatives apart."""
    bias = flag(fields, "attention_bias") or flag(fields, "bias")
    return {
        "qkv_bias": bias or family == "qwen2",
        "o_bias": bias,
        "mlp_bias": flag(fields, "mlp_bias"),
        "qk_norm": family in ("qwen3", "qwen3_moe", "gemma3_text"),
    }


def _gemma(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What tells Gemma 2 and 3 from Llama."""
    cap = lambda name: None if fields.get(name) is None else number(fields, name)
    return {
        "norm": "rms+1",
        "post_norms": True,
        "activation": "gelu_tanh",
        "embed_scale": positive(fields, "hidden_size") ** 0.5,
        "score_scale": number(fields, "query_pre_attn_scalar") ** -0.5,
        "score_cap": cap("attn_logit_softcapping"),
        "logit_cap": cap("final_logit_softcapping"),
    }


def _experts(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Experts as Mixtral, Qwen3-MoE and gpt-oss have them."""
    every = positive({"decoder_sparse_step": 1, **fields}, "decoder_sparse_step")
    if every > 1 or given(fields, "mlp_only_layers", []) != []:
        raise InputError(
            f"config.json: decoder_sparse_step = {every}, mlp_only_layers = "
            f"{fields['mlp_only_layers']!r}: layers without experts among those with are not supported"
        )
    count = positive(fields, "num_local_experts" if fields["num_experts"] is None else "num_experts", DEEPEST)
    chosen = positive(fields, "num_experts_per_tok", count)
    return {"experts": ExpertSpec(count, chosen, flag({"norm_topk_prob": True, **fields}, "norm_topk_prob"))}


def _gpt_oss(fields: Mapping[str, Any], experts: ExpertSpec) -> dict[str, Any]:
    """What tells gpt-oss from Mixtral."""
    quantised = given(fields, "quantization_config", {})
    if not isinstance(quantised, dict) or quantised.get("quant_method", "mxfp4") != "mxfp4":
        raise InputError(f"config.json: quantization_config = {quantised!r} is not supported; kvjax reads mxfp4")
    limit, slope = number(fields, "swiglu_limit"), number(fields, "swiglu_alpha")
    return {"sinks": True, "experts": replace(experts, bias=True, limit=limit, slope=slope)}


def _granite(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Granite's factors."""
    return {
        "embed_scale": number(fields, "embedding_multiplier"),
        "score_scale": number(fields, "attention_multiplier"),
        "residual_scale": number(fields, "residual_multiplier"),
        "logit_scale": 1 / number(fields, "logits_scaling"),
    }


def _falcon(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What tells Falcon from Llama; `new_decoder_architecture` is that of Falcon-40B."""
    bias, new, parallel = (flag(fields, name) for name in ("bias", "new_decoder_architecture", "parallel_attn"))
    norms = given(fields, "num_ln_in_parallel_attn", 2 if new else 1)
    if flag(fields, "alibi"):
        raise InputError("config.json: alibi = True is not supported; kvjax reads falcon models with rotary embeddings")
    if norms not in ((1, 2) if new else (1,)) or (new and not parallel):
        raise InputError(
            f"config.json: new_decoder_architecture = {new}, parallel_attn = {parallel}, num_ln_in_parallel_attn = "
            f"{norms}: no such falcon model; 2 norms are for the new architecture, which is always parallel"
        )
    biases = dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), bias)
    kind = {"norm": "layer", "activation": "gelu", "gated_mlp": False}
    return biases | kind | {"parallel_norms": norms if parallel else 0}


def _falcon_sizes(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Falcon's sizes under Llama's names."""
    embed_dim, heads = positive(fields, "hidden_size"), positive(fields, "num_attention_heads")
    grouped = heads if fields["num_kv_heads"] is None else positive(fields, "num_kv_heads")
    if flag(fields, "new_decoder_architecture"):
        kv_heads = grouped
    else:
        kv_heads = 1 if flag(fields, "multi_query") else heads
    inner = 4 * embed_dim if fields["ffn_hidden_size"] is None else positive(fields, "ffn_hidden_size")
    norm_eps = number(fields, "layer_norm_epsilon")
    sizes = {"num_key_value_heads": kv_heads, "head_dim": None, "intermediate_size": inner, "rms_norm_eps": norm_eps}
    return {**fields, **sizes}


class Stop(NamedTuple):
    """The ids that end a text."""

    ids: tuple[int, ...] = ()
    source: str = ""  # the file that names them, or fields of a GGUF file; "" where none does


def read_generation_config(path: Path, vocab_size: int) -> Stop:
    """The end-of-sequence ids that a checkpoint's generation_config.json names, else its config.json."""
    for name in ("generation_config.json", "config.json"):
        content = small_files.read_json(path, name)
        if content is None:
            continue
        found = given(content, "eos_token_id", [])
        ids = found if isinstance(found, list) else [found]
        if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
            raise InputError(
                f"{path / name}: eos_token_id = {found!r}, expected ids of the vocabulary, 0 to {vocab_size - 1}: "
                "correct it, or set it to null"
            )
        if ids:
            return Stop(tuple(ids), small_files.source(path, name, "eos_token_id"))
    return Stop()


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


def _text_part(config: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The text part of a model that reads images too, and where its fields are; other models are all text."""
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _VISION:
        return config, ""
    kinds, only = _VISION[family]
    known = "model_type architectures text_config vision_config tie_word_embeddings image_token_index".split()
    refuse_unknown(config, {*known, *only.split()}, "", family)
    text, classes = config.get("text_config"), given(config, "architectures", [])
    if not isinstance(text, dict) or given(text, "model_type", kinds[0]) not in kinds:
        raise InputError(f"config.json: text_config is not that of a {' or '.join(kinds)} model")
    if classes not in ([], [f"{family.capitalize()}ForConditionalGeneration"]):
        raise InputError(f"config.json: architectures = {classes!r} does not fit model_type {family!r}")
    say_once(f"this {family} model reads images too: that part is left out, its text part is read")
    tied = {"tie_word_embeddings": given(config, "tie_word_embeddings", True)}
    return {"model_type": kinds[0]} | text | tied, "text_config."


def _family(config: Mapping[str, Any]) -> str:
    """The family by `model_type`, else by `architectures`; the two must agree."""
    architectures = given(config, "architectures", [])
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise InputError(f"config.json: architectures = {architectures!r}, expected a list of names")
    by_class = {f"{name.removesuffix('_text').replace('_', '')}forcausallm": name for name in FAMILIES}
    family = config.get("model_type")
    if family is None and architectures:
        family = by_class.get(architectures[0].casefold(), architectures[0])
    if not isinstance(family, str) or family not in FAMILIES:
        raise InputError(
            f"config.json: model_type = {config.get('model_type')!r}, architectures = {architectures}: "
            f"unknown family; kvjax reads {', '.join(FAMILIES)}"
        )
    for name in architectures:
        if by_class.get(name.casefold()) != family:
            raise InputError(
                f"config.json: architectures = {architectures} is not the causal language model of "
                f"model_type {family!r}; if the weights are, pass --ignore-config architectures"
            )
    return family


def _heads(fields: Mapping[str, Any], embed_dim: int) -> tuple[int, int, int]:
    """Query heads, key/value heads and the width of a head; null means as many, and an even share of the model."""
    heads = positive(fields, "num_attention_heads")
    kv_heads = heads if fields["num_key_value_heads"] is None else positive(fields, "num_key_value_heads")
    if heads % kv_heads:
        raise InputError(
            f"config.json: num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}"
        )
    if fields["head_dim"] is None and embed_dim % heads:
        raise InputError(f"config.json: hidden_size = {embed_dim} is not a multiple of num_attention_heads = {heads}")
    head_dim = embed_dim // heads if fields["head_dim"] is None else positive(fields, "head_dim")
    if head_dim % 2:
        raise InputError(f"config.json: head_dim = {head_dim} is odd; rotary embeddings need an even one")
    return heads, kv_heads, head_dim


def _no_rope(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """Layers without rotation; in SmolLM3's list they are 0."""
    if "no_rope_layers" not in fields:
        return ()
    layers, turns = fields["num_hidden_layers"], fields["no_rope_layers"]
    if turns is None:
        interval = positive(fields, "no_rope_layer_interval")
        turns = [int((layer + 1) % interval > 0) for layer in range(layers)]
    if not isinstance(turns, list) or len(turns) < layers or not all(type(t) is int and t in (0, 1) for t in turns):
        raise InputError(f"config.json: no_rope_layers = {turns!r}, expected 0 or 1 for each of {layers} layers")
    return tuple(layer for layer in range(layers) if not turns[layer])


def _windows(fields: Mapping[str, Any], listed: Any, family: str) -> tuple[int | None, ...]:
    """Sliding window of each layer; () when no layer has one."""
    layers = fields["num_hidden_layers"]
    first = whole(fields, "max_window_layers", 0) if family in ("qwen2", "qwen3") else 0
    used = flag(fields, "use_sliding_window") if "use_sliding_window" in fields else "sliding_window" in fields
    used = used and (fields.get("sliding_window") is not None or family in _GEMMA)
    window = positive(fields, "sliding_window") if used else None
    slides = lambda layer: layer >= first
    if family in _GEMMA:  # every so many layers one looks at everything
        private = given(fields, "_sliding_window_pattern", 2 if family == "gemma2" else 6)
        pattern = given(fields, "sliding_window_pattern", private)
        pattern = positive({"sliding_window_pattern": pattern}, "sliding_window_pattern")
        slides = lambda layer: (layer + 1) % pattern > 0
    if family == "gpt_oss":
        slides = lambda layer: layer % 2 == 0
    if family == "olmo3":
        slides = lambda layer: (layer + 1) % 4 > 0
    if family == "smollm3":
        slides = lambda layer: layer in _no_rope(fields)
    types = ["sliding_attention" if window and slides(layer) else "full_attention" for layer in range(layers)]
    if listed is not None:
        accepted = ["full_attention", "sliding_attention"] if window else ["full_attention"]
        fits = isinstance(listed, list) and len(listed) == layers and all(kind in accepted for kind in listed)
        # Where a model does not look at `layer_types`, it may say no more than the other fields do.
        if not fits or (family not in _LAYER_TYPES and listed != types):
            raise InputError(
                f"config.json: layer_types = {listed} does not fit a {family} model of {layers} layers with "
                f"sliding window {window}; each may be {' or '.join(accepted)}"
            )
        types = listed
    return tuple(window if kind == "sliding_attention" else None for kind in types) if window else ()
