"""How long the decode loop takes to compile: of a tiny model with many layers."""

import time
from typing import Any

import jax.numpy as jnp
from flax import nnx

from kvjax.bench.report import Column, Section
from kvjax.generation import decode, sampling
from kvjax.generation.allocate import init_cache
from kvjax.models.decoder import Decoder
from kvjax.policies.base import Recipe
from kvjax.spec import Lengths, ModelSpec

COLUMNS = (Column("trace (s)", "trace_s", "{:.1f}".format), Column("compile (s)", "compile_s", "{:.1f}".format))


def seconds(recipe: Recipe, layers: int) -> tuple[float, float]:
    """Seconds to trace and to compile the decode loop of a tiny model with that many layers, without any cache."""
    spec = ModelSpec(
        vocab_size=97, embed_dim=32, num_layers=layers, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64,
        max_position=2048,
    )  # fmt: skip
    model, lengths = Decoder(spec, rngs=nnx.Rngs(0)), Lengths((100,), 64, 128)
    chooser, ends = sampling.chooser(sampling.Sampling(), 1), decode.ends((), 64, 1)
    length, logits = jnp.full((1,), 100, jnp.int32), jnp.zeros((1, spec.vocab_size))
    cache = init_cache(model, recipe, lengths)
    state = decode.first_token(logits, cache, length, chooser, ends, jnp.zeros(logits.shape, bool))
    start = time.perf_counter()
    lowered = decode.decode_loop.lower(model, state, chooser, ends, recipe=recipe, chunk=16)
    traced = time.perf_counter()
    lowered.compile()
    return traced - start, time.perf_counter() - traced


def section(recipes: dict[str, Recipe], layers: int) -> Section:
    """A row for every method."""
    rows: list[dict[str, Any]] = []
    for label, recipe in recipes.items():
        rows.append({"name": label, **dict(zip(("trace_s", "compile_s"), seconds(recipe, layers), strict=True))})
    return Section(f"decode loop of {layers} layers, tiny width", rows)
