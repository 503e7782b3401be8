"""What the tests of the laws share: every method x every model, the prompts, and a greedy continuation."""

import functools
import inspect
import itertools
import os
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import kvjax
from kvjax import METHODS, methods
from kvjax.cache import layout
from kvjax.cache import tier as tiers_
from kvjax.checkpoint import shipped
from kvjax.models.decoder import Decoder, forward
from kvjax.parallel import mesh as meshes
from kvjax.policies.base import Recipe
from kvjax.spec import GateSpec, LatentSpec, RopeSpec
from tests.lib import oracle

STEPS, BUDGET, WINDOW = 6, 12, 4
MESH = os.environ.get("KVJAX_TEST_MESH")  # try everything on this mesh; set by tests/test_mesh.py
ARGUMENTS = {name: {"window": WINDOW} for name in ("snapkv", "pyramidkv", "adakv", "dynamickv")}
ARGUMENTS |= {name: {"chunk": 4} for name in ("kvzip", "kvzip_plus")}  # so that the longest prompts can be read again
# Besides each method as it comes: number formats. The first word is the method.
VARIANTS = {name: ARGUMENTS.get(name, {}) for name in METHODS} | {
    "full int8": {"store": "int8"},
    "full fp8": {"store": "fp8"},
    "full kivi2": {"store": "kivi2:8:16"},
    "h2o int4": {"store": "int4"},
    "tova global": {"split": "global"},
    "tova int8/int3": {"store": "int8/int3"},
    "streaming_llm int4": {"store": "int4:symmetric"},
    "adakv int2": {"store": "int2", "window": WINDOW},
    "dynamickv int8": {"store": "int8", "window": WINDOW},
    "d2o int4": {"store": "int4"},
    "mikv int8": {"store": "int8", "low_store": "int4/int2"},
    "mikv adakv": {"importance": "window", "allocate": "per_head", "window": WINDOW},
    "mikv dynamickv": {"importance": "window", "allocate": "from_scores", "window": WINDOW},
    "dmc int4": {"store": "int4", "capacity": 8},
    "dms int8": {"store": "int8", "capacity": 8},
}
LLAMA3 = RopeSpec(type="llama3", factor=8.0, original_max_position=32)
# As Gemma has it: capped scores with a scale of their own, layers of two kinds with their own rotary embeddings.
CAPPED: dict[str, Any] = dict(score_cap=2.0, score_scale=0.5, logit_cap=5.0, windows=(12, None))
CAPPED |= dict(window_rope=RopeSpec(100.0), norm="rms+1", post_norms=True, embed_scale=2.0, activation="gelu_tanh")
MODELS = {
    "gqa": dict(num_layers=2, max_position=128),
    "gqa-bf16": dict(num_layers=2, max_position=128, dtype=jnp.bfloat16),
    "mqa": dict(num_layers=2, num_kv_heads=1, qk_norm=True, tie_embeddings=True),
    "windowed": dict(num_layers=1, num_kv_heads=4, windows=(12,), qkv_bias=True, rope=LLAMA3),
    "capped": dict(num_layers=2, **CAPPED),
    "latent": dict(num_layers=2, max_position=128, latent=LatentSpec(2, ((12, 8), (8, 16)))),
    "gated": dict(num_layers=2, max_position=128, gate=GateSpec("dmc", rate=1.2, window=3, offset=0.5)),
    "gated-dms": dict(num_layers=2, max_position=128, gate=GateSpec("dms", rate=1.5, window=3, offset=-1.0)),
    **({"demo": None} if (Path(shipped.directory()) / "model.safetensors").exists() else {}),
}
BFLOAT16 = ("full int8", "full kivi2", "h2o int4", "d2o int4", "mikv int8")  # variants that are tried in it, too
LATENT = ("full", "h2o int4", "dynamickv", "d2o", "full kivi2")  # likewise, on latents
CAPS = ("full", "h2o", "snapkv", "d2o", "mikv")  # methods that are tried with capped scores
GATED = ("full", "h2o")  # methods that are tried on a model with a gate that they do not look at
WITH_BUDGET = [name for name in VARIANTS if "budget" in inspect.signature(METHODS[name.split()[0]]).parameters]
EVICTING = [name for name in WITH_BUDGET if name.split()[0] not in ("mikv", "oracle")]  # what is not kept is gone
_METHODS = [*METHODS, "full kivi2", "h2o int4", "mikv dynamickv"]
# What the laws are tried with by default: every method on the first model, and what differs most on the others.
QUICK = {
    "gqa": (*METHODS, "full kivi2", "h2o int4", "d2o int4", "mikv dynamickv"),
    "gqa-bf16": ("mikv",),
    "mqa": ("d2o",),
    "windowed": ("h2o",),
    "capped": ("full",),
    "latent": ("h2o int4",),
    "gated": ("full", "dmc", "dmc int4"),
    "gated-dms": ("dms",),
    "demo": ("full",),
}


def slow(names: Iterable[Any], some: Container[Any]) -> list[Any]:
    """Parameters of which some are left to the slow tests."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in some else []) for name in names]


def quick(names: Iterable[Any], some: Container[Any]) -> list[Any]:
    """Parameters of which all but some are left to the slow tests."""
    return [pytest.param(name, marks=[] if name in some else [pytest.mark.slow]) for name in names]


# Whole generations are tried with all; by default with those that differ in more than a score.
every_method = pytest.mark.parametrize("method", quick(_METHODS, ("full", "streaming_llm", "dynamickv", "mikv", "dms")))
every_method_and_a_full_cache = pytest.mark.parametrize(  # which refuses slots
    "method", quick([*_METHODS, "dmc int4"], ("streaming_llm", "d2o", "mikv", "full kivi2", "dmc int4"))
)


MADE_FOR = {"gated": "dmc", "gated-dms": "dms"}  # the method of a model with a gate


def model_of(method: str) -> str:
    """The model that a method is tried with first: one that was made for it."""
    return next((model for model, name in MADE_FOR.items() if name == method.split()[0]), "gqa")


def _fits(model: str, name: str) -> bool:
    """Whether a method is tried with a model."""
    if model_of(name) != "gqa" or model == "gated-dms":
        return model == model_of(name)
    some = {"gqa-bf16": (*METHODS, *BFLOAT16), "latent": LATENT, "gated": GATED, "capped": CAPS}
    return model == "gqa" or name in some.get(model, METHODS)


CASES = [
    pytest.param(model, name, marks=[] if name in QUICK[model] else [pytest.mark.slow])
    for name in VARIANTS
    for model in MODELS
    if _fits(model, name)
]
every_case = pytest.mark.parametrize(("model", "method"), CASES, scope="module")
every_model = pytest.mark.parametrize("model", MODELS)


@functools.cache
def decoder(name: str) -> Decoder:
    fields = MODELS[name]
    model = kvjax.load(dtype=jnp.float32).decoder if fields is None else oracle.random_model(5, **fields)
    model = oracle.with_gates(model)
    return model if MESH is None else on_mesh(model, MESH)


def on_mesh(model: Decoder, size: str) -> Decoder:
    """The same weights, split over devices."""
    where = meshes.make(meshes.parse(size), model.spec)
    with meshes.on(where):
        specs = meshes.weights(model)
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(where, spec)), model, specs)


def recipe_of(method: str, budget: int | str) -> Recipe:
    return methods.make(method.split()[0], budget if method in WITH_BUDGET else None, VARIANTS[method])


@functools.cache
def text(length: int, seed: int) -> list[int]:
    return np.random.default_rng((length, seed)).integers(0, 97, length).tolist()


# Batches of equal shapes, every prompt far longer than the budget.
BATCH = (text(40, 0), text(30, 0), text(24, 0))
MATES = (text(25, 1), text(30, 1), text(40, 0))
if MESH is not None:  # one more, so that two devices have equally many
    BATCH, MATES = (*BATCH, text(35, 0)), (*MATES, text(36, 1))


def teacher() -> np.ndarray:
    """Given continuations of `BATCH`."""
    return np.random.default_rng(9).integers(0, 97, (len(BATCH), STEPS))


class Greedy(NamedTuple):
    """A greedy continuation of a batch, step by step."""

    tokens: np.ndarray  # [B steps]
    logits: np.ndarray  # [steps + 1, B, V]
    positions: list  # [steps + 1][B][L][K]
    caches: list[layout.Cache]  # [steps + 1], on the host


def greedy(model: Decoder, recipe: Recipe, prompts, *, padded: int | None = None, active=None, platform=None) -> Greedy:
    """Generate `STEPS` tokens; `active [steps][B]` stops sequences; the cache is a platform's."""
    active = np.ones((STEPS, len(prompts)), bool) if active is None else active
    last, cache = oracle.start(model, recipe, prompts, STEPS, padded, platform=platform)
    caches = [jax.device_get(cache)]
    pos = np.asarray([len(p) for p in prompts], np.int32)
    tokens, logits, positions = [], [np.asarray(last)], [oracle.kept_positions(model, cache)]
    for step in range(STEPS):
        tokens.append(logits[-1].argmax(axis=-1).astype(np.int32))
        now = jnp.asarray(tokens[-1]), jnp.asarray(pos + step), jnp.asarray(active[step])
        last, cache = oracle.step(model, cache, *now, recipe=recipe)
        logits.append(np.asarray(last))
        positions.append(oracle.kept_positions(model, cache))
        caches.append(jax.device_get(cache))
    return Greedy(np.stack(tokens, axis=1), np.stack(logits), positions, caches)


@functools.cache
def small_budget(model: str, method: str) -> Greedy:
    return greedy(decoder(model), recipe_of(method, BUDGET), BATCH)


@jax.jit
def _forward(model: Decoder, tokens: jax.Array) -> jax.Array:
    return forward(model, tokens)


def reference(model: Decoder, tokens: list[int]) -> np.ndarray:
    """Logits `[T V]` without a cache; padded, so that all lengths share one compilation."""
    padded = tokens + [0] * (-len(tokens) % 64)
    return np.asarray(_forward(model, jnp.asarray([padded], jnp.int32))[0, : len(tokens)])


def describe(tree) -> tuple:
    """Structure, shapes and dtypes."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(x.shape, x.dtype) for x in leaves]


def assert_close(a: np.ndarray, b: np.ndarray, tolerance: float) -> None:
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


def parts(tier: tiers_.Tier, model: str) -> list[tiers_.Tier]:
    """What each device has of a tier that was read to the host."""
    shape = meshes.shape_of(decoder(model))
    found = []
    for d, h in itertools.product(range(shape["data"]), range(shape["heads"])):
        at = d * shape["heads"] + h

        def pool(x, at=at):
            size = x.shape[0] // tier.num_free.shape[0]
            return x[at * size : (at + 1) * size]

        def rows(x, d=d, h=h):
            b, k = x.shape[1] // shape["data"], x.shape[2] // shape["heads"]
            return x[:, d * b : (d + 1) * b, h * k : (h + 1) * k]

        split = dict.fromkeys(tiers_.PER_ROW, rows)
        found.append(tiers_.Tier(**{n: jax.tree.map(split.get(n, pool), x) for n, x in tier._asdict().items()}))
    return found


def tiers_of(cache: layout.Cache) -> list[tiers_.Tier]:
    return [tier for tiers in cache for tier in tiers]
