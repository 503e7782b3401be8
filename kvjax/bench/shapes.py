"""What can be measured, by name: models with random weights, kernels, stores, other libraries."""

import dataclasses
from typing import NamedTuple

from kvjax.errors import InputError
from kvjax.models.named import NAMED
from kvjax.spec import ModelSpec

DEFAULT = "llama-88m"
CONTEXT = 1 << 20  # tokens: random weights know no limit
_LLAMA = ModelSpec(
    vocab_size=8192, embed_dim=768, num_layers=12, num_heads=12, num_kv_heads=4, head_dim=64, mlp_dim=2048,
    max_position=CONTEXT,
)  # fmt: skip
SHAPES = {
    "llama-tiny": dataclasses.replace(
        _LLAMA, vocab_size=256, embed_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=128
    ),
    DEFAULT: _LLAMA,
} | {name: dataclasses.replace(spec, max_position=CONTEXT) for name, spec in NAMED.items()}

KERNELS = (
    "decode_attention",
    "column_sums",
    "column_max",
    "window_sums",
    "prefill_attention",
    "topk_retain",
    "segment_merge",
)
STORES = ("dense", "int8", "int4", "int3", "int2", "fp8", "kivi2", "mikv")  # that decode attention is tried with
ATTENTION = ("jax.nn", "torch", "flashinfer")  # libraries that attend to a dense cache
PEERS = ("transformers", "llama.cpp", "llama.cpp+q8_0", "llama.cpp+q4_0")  # that run a model; + its cache's format
# Of `bench device`.
STAGES = ("correctness", "decode-attention", "step", "step-methods", "throughput", "prompt-kernels", "prefill")
LLAMA_CPP = "KVJAX_LLAMA_CPP"  # the environment variable that names a folder with node_modules/node-llama-cpp
SMALL, LARGE = "llama-88m:4096", "llama-3-8b:32768:16"  # shapes of kernels, on CPU and elsewhere
ALL = [
    f"{model}:{context}:{batch}"
    for model in ("llama-3-8b", "llama-2-7b", "qwen2-7b")
    for context, batch in ((4096, 16), (32768, 16 if model != "llama-2-7b" else 4), (131072, 1))
]


class Shape(NamedTuple):
    """What a kernel is run at."""

    model: str  # a name of `SHAPES`
    context: int  # tokens
    batch: int  # sequences

    @property
    def heads(self) -> tuple[int, int, int]:
        """K, G, H."""
        spec = SHAPES[self.model]
        return spec.num_kv_heads, spec.group_size, spec.head_dim

    @property
    def name(self) -> str:
        """As the command line has it."""
        return f"{self.model}:{self.context}:{self.batch}"


def read_shape(text: str) -> Shape:
    """A shape from `model:context:batch`.

    >>> read_shape("llama-3-8b:32768:16").heads
    (8, 4, 128)
    """
    model, *numbers = text.split(":")
    if model not in SHAPES:
        raise InputError(f"--shapes {text}: no model {model!r}: choose from {', '.join(SHAPES)}")
    if len(numbers) not in (1, 2) or not all(n.isdecimal() and int(n) > 0 for n in numbers):
        raise InputError(f"--shapes {text}: give model:context or model:context:batch, such as llama-3-8b:32768:16")
    return Shape(model, int(numbers[0]), int(numbers[1]) if len(numbers) == 2 else 1)
