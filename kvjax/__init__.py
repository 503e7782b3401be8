"""kvjax: Llama-family inference in JAX with a compressed, paged key/value cache.

Names are imported where they are first used: `import kvjax` alone imports nothing else.
"""

import importlib
from typing import TYPE_CHECKING, Any

from kvjax import interrupts  # noqa: F401  # first: it hears Ctrl-C

if TYPE_CHECKING:
    from kvjax import methods
    from kvjax.compilation import enable_compilation_cache
    from kvjax.engine.engine import Engine
    from kvjax.errors import InputError
    from kvjax.generation.allocate import init_cache
    from kvjax.generation.context import Context
    from kvjax.generation.decode import decode_step
    from kvjax.generation.model import Model, load
    from kvjax.generation.prefill import padded_length, prefill
    from kvjax.generation.results import Generation
    from kvjax.generation.sampling import Sampling
    from kvjax.methods import METHODS
    from kvjax.spec import Lengths, ModelSpec

_HOMES = {
    "METHODS": "methods",
    "Context": "generation.context",
    "Engine": "engine.engine",
    "Generation": "generation.results",
    "InputError": "errors",
    "Lengths": "spec",
    "Model": "generation.model",
    "ModelSpec": "spec",
    "Sampling": "generation.sampling",
    "decode_step": "generation.decode",
    "enable_compilation_cache": "compilation",
    "init_cache": "generation.allocate",
    "load": "generation.model",
    "padded_length": "generation.prefill",
    "prefill": "generation.prefill",
}

__all__ = [
    "METHODS",
    "Context",
    "Engine",
    "Generation",
    "InputError",
    "Lengths",
    "Model",
    "ModelSpec",
    "Sampling",
    "decode_step",
    "enable_compilation_cache",
    "init_cache",
    "load",
    "methods",
    "padded_length",
    "prefill",
]


def __getattr__(name: str) -> Any:
    if name == "methods":
        return importlib.import_module("kvjax.methods")
    if name not in _HOMES:
        raise AttributeError(f"module 'kvjax' has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(f"kvjax.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
