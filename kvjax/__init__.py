"""kvjax: Llama-family inference in JAX with a compressed, paged key/value cache."""

from kvjax import interrupts, methods  # noqa: F401  # interrupts first: it hears Ctrl-C
from kvjax.decode import decode_step
from kvjax.errors import InputError
from kvjax.generation import Generation, Model, generate, load
from kvjax.layout import init_cache
from kvjax.likelihood import divergence, log_likelihood, references
from kvjax.methods import METHODS
from kvjax.prefilling import padded_length, prefill
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
    "divergence",
    "generate",
    "init_cache",
    "load",
    "log_likelihood",
    "methods",
    "padded_length",
    "prefill",
    "references",
]
