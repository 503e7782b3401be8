"""Where a Hugging Face checkpoint has a parameter: the tensor's name, and its rows of a tensor that packs several."""

import re
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import TypeVar

import numpy as np
from jaxtyping import Int

from kvjax.spec import ModelSpec

# kvjax's module -> the checkpoint's. Modules of a layer are relative to the layer.
_LLAMA = {
    "layers": "model.layers",
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_INTERNLM2 = {
    "layers": "model.layers",
    "embedding": "model.tok_embeddings",
    "norm": "model.norm",
    "head": "output",
    "attention_norm": "attention_norm",
    "attention.q": "attention.wqkv",
    "attention.k": "attention.wqkv",
    "attention.v": "attention.wqkv",
    "attention.o": "attention.wo",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "feed_forward.w1",
    "mlp.up": "feed_forward.w3",
    "mlp.down": "feed_forward.w2",
}
_FALCON = {
    "layers": "transformer.h",
    "embedding": "transformer.word_embeddings",
    "norm": "transformer.ln_f",
    "head": "lm_head",
    "attention_norm": "input_layernorm",
    "attention.q": "self_attention.query_key_value",
    "attention.k": "self_attention.query_key_value",
    "attention.v": "self_attention.query_key_value",
    "attention.o": "self_attention.dense",
    "mlp_norm": "post_attention_layernorm",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}
_FALCON_TWO_NORMS = {"attention_norm": "ln_attn", "mlp_norm": "ln_mlp"}
_PHI3 = _LLAMA | dict.fromkeys(("attention.q", "attention.k", "attention.v"), "self_attn.qkv_proj")
_PHI3 |= dict.fromkeys(("mlp.gate", "mlp.up"), "mlp.gate_up_proj")
_GEMMA = _LLAMA | {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_OLMO = _LLAMA | {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
_QWEN3_MOE = _LLAMA | {"mlp.router": "mlp.gate"}
_QWEN3_MOE |= {f"mlp.{module}": f"mlp.experts.*.{module}_proj" for module in ("gate", "up", "down")}
_MIXTRAL = _LLAMA | {"mlp.router": "block_sparse_moe.gate"}
_MIXTRAL |= {
    f"mlp.{ours}": f"block_sparse_moe.experts.*.{name}"
    for ours, name in zip(("gate", "down", "up"), ("w1", "w2", "w3"), strict=True)
}
_GPT_OSS = _LLAMA | {"attention": "self_attn", "mlp.router": "mlp.router", "mlp.down": "mlp.experts.down_proj"}
_GPT_OSS |= dict.fromkeys(("mlp.gate", "mlp.up"), "mlp.experts.gate_up_proj")
_NAMES = {  # every other family has Llama's names
    "internlm2": _INTERNLM2,
    "falcon": _FALCON,
    "phi3": _PHI3,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt_oss": _GPT_OSS,
    "mixtral": _MIXTRAL,
    "olmo2": _OLMO,
    "olmo3": _OLMO,
    "qwen3_moe": _QWEN3_MOE,
}
_VISION = r"^(model\.)?(vision_tower|multi_modal_projector)\."  # tensors that only images need
T = TypeVar("T")
_LEAVES = {"kernel": "weight", "kernels": "weight", "scale": "weight", "bias": "bias", "sink": "sinks"}


def part(target: str) -> str:
    """The part of a model that a parameter belongs to; the final norm belongs to the head.

    >>> part("embedding"), part("layers.12.attention.q.kernel"), part("norm.scale"), part("head.kernel")
    ('embedding', 'layers.12', 'head', 'head')
    """
    found = re.match(r"embedding|layers\.\d+", target)
    return found[0] if found else "head"


def modules(family: str, parallel_norms: int = 0) -> dict[str, str]:
    """kvjax's modules, and what a checkpoint of a family calls them."""
    found = _NAMES.get(family, _LLAMA)
    return found | _FALCON_TWO_NORMS if family == "falcon" and parallel_norms == 2 else found


def source(target: str, spec: ModelSpec) -> str:
    """The checkpoint's name of a parameter; `*` in it stands for an expert's number, each of which has a tensor."""
    names = modules(spec.family, spec.parallel_norms)
    if target == "embedding":
        return f"{names[target]}.weight"
    module, _, leaf = target.rpartition(".")
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", module)
    module = f"{names['layers']}.{layer[1]}.{names[layer[2]]}" if layer else names[module]
    if spec.family == "gpt_oss" and leaf in ("kernels", "biases"):
        return module if leaf == "kernels" else f"{module}_bias"
    return f"{module}.{_LEAVES[leaf]}"


def sources(target: str, spec: ModelSpec) -> list[str]:
    """The checkpoint's names of the tensors that make a parameter: one, or one of each expert in their order."""
    name = source(target, spec)
    if "*" not in name or spec.experts is None:
        return [name]
    return [name.replace("*", str(expert)) for expert in range(spec.experts.count)]


def text_part(stored: Mapping[str, T]) -> Mapping[str, T]:
    """The tensors of a model that reads images too without those that only images need, as its text part names them.

    >>> text_part({"language_model.model.norm.weight": 1, "vision_tower.norm.weight": 2})
    {'model.norm.weight': 1}
    """
    text = r"^(model\.)?language_model\."
    if not any(re.match(text, name) for name in stored):
        return stored
    seen = {name: one for name, one in stored.items() if not re.match(_VISION, name)}
    return {re.sub(text, r"\1", name): one for name, one in seen.items()}


def num_layers(stored: Iterable[str], spec: ModelSpec) -> int:
    """How many layers the tensors of a checkpoint are of."""
    of_layer = re.compile(rf"{re.escape(_NAMES.get(spec.family, _LLAMA)['layers'])}\.(\d+)\.")
    return len({found[1] for name in stored if (found := of_layer.match(name))})


def packed_size(target: str, spec: ModelSpec) -> int | None:
    """How many rows the tensor has that packs a parameter with others; None = it has a tensor of its own."""
    *_, owner, module, _ = ("", "", *target.split("."))
    if spec.family in ("internlm2", "falcon", "phi3") and owner == "attention" and module in ("q", "k", "v"):
        return (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    return 2 * spec.mlp_dim if spec.family == "phi3" and owner == "mlp" and module in ("gate", "up") else None


def rows(target: str, spec: ModelSpec) -> Int[np.ndarray, " rows"] | None:
    """Which rows of a packed tensor are a parameter's; None = all."""
    size = packed_size(target, spec)
    if size is None:
        return None
    *_, owner, module, _ = target.split(".")
    if spec.family == "phi3":  # one after the other
        kv_size = spec.num_kv_heads * spec.head_dim
        sizes = {"q": spec.num_heads * spec.head_dim, "k": kv_size, "v": kv_size}
        sizes = sizes if owner == "attention" else {"gate": spec.mlp_dim, "up": spec.mlp_dim}
        start = sum(islice(sizes.values(), list(sizes).index(module)))
        return np.arange(start, start + sizes[module])
    # For each key/value head its G query heads, its key, its value.
    packed = np.arange(size).reshape(spec.num_kv_heads, spec.group_size + 2, spec.head_dim)
    part = {"q": slice(0, -2), "k": slice(-2, -1), "v": slice(-1, None)}[module]
    return packed[:, part].reshape(-1)


def columns(target: str, spec: ModelSpec) -> slice | None:
    """Which numbers of a tensor's last axis are a parameter's, where those of another lie between; None = all."""
    found = re.search(r"mlp\.(gate|up)\.(kernels|biases)$", target)
    return slice(int(found[1] == "up"), None, 2) if found and spec.family == "gpt_oss" else None


def is_transposed(target: str, spec: ModelSpec) -> bool:
    """Whether the checkpoint's tensor for a parameter is [out, in], as torch's `Linear` is."""
    return target.endswith((".kernel", ".kernels")) and not (spec.family == "gpt_oss" and target.endswith("s"))


def stored_shape(target: str, shape: tuple[int, ...], spec: ModelSpec) -> tuple[int, ...]:
    """The shape that the checkpoint's tensor for a parameter must have; that of one expert, where each has a tensor."""
    shape = shape[1:] if "*" in source(target, spec) else shape
    shape = shape[::-1] if is_transposed(target, spec) else shape
    shape = (*shape[:-1], 2 * shape[-1]) if columns(target, spec) else shape
    return (packed_size(target, spec) or shape[0], *shape[1:])
