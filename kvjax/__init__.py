"""kvjax: Llama-family inference in JAX with a compressed, paged key/value cache."""

from kvjax import methods
from kvjax.decode import decode_step, init_cache, padded_length, prefill
from kvjax.errors import InputError
from kvjax.generation import Generation, Model, generate, load
from kvjax.methods import METHODS
from kvjax.sampling import Sampling
from kvjax.spec import Lengths, ModelSpec

__all__ = [
    "METHODS",
    "Generation",
    "InputError",
    "Lengths",
    "Model",
    "ModelSpec",
    "Sampling",
    "decode_step",
    "generate",
    "init_cache",
    "load",
    "methods",
    "padded_length",
    "prefill",
]
