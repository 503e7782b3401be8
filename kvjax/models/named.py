"""The shapes of well-known models, for plans and measurements without a checkpoint.

Source: the `config.json` of each checkpoint on the Hugging Face hub; `HUB` has its id.
"""

import math
import re
from dataclasses import replace

from kvjax.spec import ExpertSpec, ModelSpec, RopeSpec

_LLAMA_2 = ModelSpec(
    vocab_size=32000, embed_dim=4096, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128, mlp_dim=11008,
    max_position=4096, norm_eps=1e-5,
)  # fmt: skip
_LLAMA_3 = replace(
    _LLAMA_2, vocab_size=128256, num_kv_heads=8, mlp_dim=14336, max_position=8192, rope=RopeSpec(theta=500000.0)
)
_SCALED = RopeSpec(500000.0, "llama3", factor=8.0, original_max_position=8192)
_LLAMA_3_1 = replace(_LLAMA_3, max_position=131072, rope=_SCALED)
_LLAMA_3_2 = replace(_LLAMA_3_1, tie_embeddings=True, rope=replace(_SCALED, factor=32.0))
_QWEN_2 = ModelSpec(
    vocab_size=152064, embed_dim=3584, num_layers=28, num_heads=28, num_kv_heads=4, head_dim=128, mlp_dim=18944,
    max_position=131072, rope=RopeSpec(theta=1000000.0), qkv_bias=True, family="qwen2",
)  # fmt: skip


def _wide(spec: ModelSpec) -> ModelSpec:
    """The 70B model of a generation."""
    return replace(spec, embed_dim=8192, num_layers=80, num_heads=64, num_kv_heads=8, mlp_dim=28672)


NAMED: dict[str, ModelSpec] = {
    "llama-2-7b": _LLAMA_2,
    "llama-2-13b": replace(_LLAMA_2, embed_dim=5120, num_layers=40, num_heads=40, num_kv_heads=40, mlp_dim=13824),
    "llama-2-70b": _wide(_LLAMA_2),
    "llama-3-8b": _LLAMA_3,
    "llama-3-70b": _wide(_LLAMA_3),
    "llama-3.1-8b": _LLAMA_3_1,
    "llama-3.1-70b": _wide(_LLAMA_3_1),
    "llama-3.2-1b": replace(_LLAMA_3_2, embed_dim=2048, num_layers=16, head_dim=64, mlp_dim=8192),
    "llama-3.2-3b": replace(_LLAMA_3_2, embed_dim=3072, num_layers=28, num_heads=24, mlp_dim=8192),
    "mistral-7b": replace(
        _LLAMA_3, vocab_size=32768, max_position=32768, rope=RopeSpec(theta=1000000.0), family="mistral"
    ),
    "qwen2-7b": replace(_QWEN_2, norm_eps=1e-6),
    "qwen3-8b": ModelSpec(
        vocab_size=151936, embed_dim=4096, num_layers=36, num_heads=32, num_kv_heads=8, head_dim=128, mlp_dim=12288,
        max_position=40960, rope=RopeSpec(theta=1000000.0), qk_norm=True, family="qwen3",
    ),
    "smollm3-3b": ModelSpec(
        vocab_size=128256, embed_dim=2048, num_layers=36, num_heads=16, num_kv_heads=4, head_dim=128, mlp_dim=11008,
        max_position=65536, rope=RopeSpec(theta=5000000.0), no_rope=tuple(range(3, 36, 4)), tie_embeddings=True,
        family="smollm3",
    ),
    "mixtral-8x7b": replace(
        _LLAMA_3, vocab_size=32000, max_position=32768, rope=RopeSpec(theta=1000000.0), experts=ExpertSpec(8, 2),
        family="mixtral",
    ),
    "qwen3-30b-a3b": ModelSpec(
        vocab_size=151936, embed_dim=2048, num_layers=48, num_heads=32, num_kv_heads=4, head_dim=128, mlp_dim=768,
        max_position=40960, rope=RopeSpec(theta=1000000.0), qk_norm=True, experts=ExpertSpec(128, 8),
        family="qwen3_moe",
    ),
    "gpt-oss-20b": ModelSpec(
        vocab_size=201088, embed_dim=2880, num_layers=24, num_heads=64, num_kv_heads=8, head_dim=64, mlp_dim=2880,
        max_position=131072, norm_eps=1e-5, windows=(128, None) * 12, qkv_bias=True, o_bias=True, sinks=True,
        experts=ExpertSpec(32, 4, bias=True, limit=7.0, slope=1.702), family="gpt_oss",
        rope=RopeSpec(
            150000.0, "yarn", 32.0, 4096, attention_factor=0.1 * math.log(32) + 1, truncate=False
        ),
    ),
}  # fmt: skip

HUB = {
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-2-70b": "meta-llama/Llama-2-70b-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3-70b": "meta-llama/Meta-Llama-3-70B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "qwen2-7b": "Qwen/Qwen2-7B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "gpt-oss-20b": "openai/gpt-oss-20b",
}


def named(name: str) -> str | None:
    """The key of `NAMED` that a name or hub id means, in any case, chat versions having their base model's shape.

    >>> named("Llama-3-8B"), named("meta-llama/Llama-3.1-8B-Instruct"), named("some/model")
    ('llama-3-8b', 'llama-3.1-8b', None)
    """
    plain = re.sub(r"-(instruct|chat)", "", name.lower())
    return next((key for key in NAMED if plain in (key, HUB[key].lower())), None)
