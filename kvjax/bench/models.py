"""Models that are measured: checkpoints, or random weights in the shape of a known model, with a gate if asked for.

Random weights are drawn on the device, matrix by matrix in the wanted dtype: no copy of the model is ever on the host.
"""

import dataclasses
from statistics import NormalDist
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from kvjax.bench.shapes import SHAPES
from kvjax.errors import InputError
from kvjax.generation import model as models
from kvjax.generation.model import Model
from kvjax.models.decoder import Decoder, native_dtype
from kvjax.models.quantized import asked
from kvjax.models.stack import modules, stacked_where_fast
from kvjax.parallel import mesh as meshes
from kvjax.spec import GateSpec, ModelSpec

WINDOWS = {"dmc": 12, "dms": 256}  # tokens, as the papers have them


def load(name: str, dtype: str | None, mesh: str | None = None, weights: str | None = None) -> Model:
    """A model by the name of a shape, or a checkpoint; on one device, or on a mesh such as `data=2,model=4`.

    Its matrices are in `weights`, int8 or int4; None = as they are.
    """
    if name in SHAPES:
        size = None if mesh is None else meshes.parse(mesh)
        return random(asked(SHAPES[name], weights), jnp.dtype(dtype or native_dtype()), f"random {name}", size)
    try:
        return models.load(name, dtype=None if dtype is None else jnp.dtype(dtype), mesh=mesh, weights=weights)
    except InputError as error:
        raise InputError(f"{error}; random weights: {', '.join(SHAPES)}") from None


def prompts(spec: ModelSpec, batch: int, context: int, padded: int | None = None) -> np.ndarray:
    """Random tokens `[batch context]`, the same in every command, padded at the end."""
    drawn = np.random.default_rng(0).integers(0, spec.vocab_size, (batch, context), np.int32)
    return np.pad(drawn, ((0, 0), (0, (padded or context) - context)))


def random(spec: ModelSpec, dtype: DTypeLike, name: str, size: meshes.Size | None = None) -> Model:
    """A model with random weights, on one device or on a mesh, where each device draws its own."""
    draw = lambda: Decoder(spec, dtype=dtype, rngs=nnx.Rngs(0))
    if size is None:
        return Model(stacked_where_fast(draw()), None, (), name)
    mesh = meshes.make(size, spec)
    with meshes.on(mesh):
        shardings = jax.tree.map(lambda part: jax.NamedSharding(mesh, part), meshes.weights(nnx.eval_shape(draw)))
        return Model(stacked_where_fast(jax.jit(draw, out_shardings=shardings)()), None, (), name)


def gated(model: Model, objective: Literal["dmc", "dms"], rate: float) -> Model:
    """The same weights with a gate that merges or evicts all but one in `rate` tokens, though it has learned nothing.

    A projection of a normed input by random weights is normally distributed: the gate borrows one coordinate, as a
    trained one does, and its offset is the quantile of the rate. Rows differ, and the rate holds in the mean.
    """
    spec = dataclasses.replace(model.spec, gate=imposed(objective, rate))
    decoder = nnx.merge(*nnx.split(model.decoder))  # the same arrays
    decoder.spec = spec
    for layer in modules(decoder):
        layer.gate = spec.gate
    return Model(decoder, model.tokenizer, model.stop, f"{model.name}, {objective} gate of rate {rate:g}")


def imposed(objective: Literal["dmc", "dms"], rate: float) -> GateSpec:
    """The gate of `gated`."""
    return GateSpec(objective, rate, WINDOWS[objective], offset=NormalDist().inv_cdf(1 / rate))


def narrow(spec: ModelSpec) -> ModelSpec:
    """A model whose cache has the same shape, and that reads a prompt in a fraction of the time.

    It has little but heads.
    """
    return dataclasses.replace(spec, embed_dim=128, mlp_dim=128, weights=None)
