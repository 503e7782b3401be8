"""kvjax: Llama-family inference in JAX with a compressed, paged key/value cache."""

from kvjax import interrupts, methods  # noqa: F401  # interrupts first: it hears Ctrl-C
from kvjax.errors import InputError
from kvjax.generation.allocate import init_cache
from kvjax.generation.decode import decode_step
from kvjax.generation.model import Model, load
from kvjax.generation.prefill import padded_length, prefill
from kvjax.generation.results import Generation
from kvjax.generation.sampling import Sampling
from kvjax.methods import METHODS
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
    "init_cache",
    "load",
    "methods",
    "padded_length",
    "prefill",
]
