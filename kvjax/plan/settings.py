"""What is planned: what the flags of a plan mean."""

import argparse
import functools
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from kvjax import methods
from kvjax.cache.pages import LARGEST
from kvjax.errors import InputError
from kvjax.generation import prefill
from kvjax.generation.model import Model
from kvjax.methods import default_budget, make
from kvjax.models.named import NAMED, named
from kvjax.parallel import mesh
from kvjax.parallel.collectives import HEADS
from kvjax.parallel.mesh import Size
from kvjax.plan.chips import Chip, Platform
from kvjax.plan.dry_run import read_spec, without_weights
from kvjax.plan.flags import devices
from kvjax.policies.base import Recipe
from kvjax.spec import Lengths, ModelSpec


class Setting(NamedTuple):
    """What is planned; hashable."""

    spec: ModelSpec
    dtype: str
    recipe: Recipe
    context: int  # tokens of each prompt
    new: int  # tokens that may follow
    batch: int
    platform: Platform
    devices: Size = Size()

    @property
    def mesh(self) -> AbstractMesh | None:
        """The mesh, of devices that need not be there; None = one device."""
        return None if self.devices == Size() else mesh.imagined(self.devices, self.spec)

    @property
    def share(self) -> "Setting":
        """What one device has, as if it were alone: fewer sequences, heads and hidden numbers."""
        if self.mesh is None:
            return self
        own = mesh.share(self.spec, self.mesh.shape[HEADS])
        own = replace(own, mlp_dim=own.mlp_dim // self.devices.model)
        return self._replace(spec=own, batch=self.batch // self.devices.data, devices=Size())

    @property
    def lengths(self) -> Lengths:
        """What a cache is made for."""
        padded = prefill.padded_length(self.context)
        return Lengths((self.context,) * self.batch, self.new, padded, self.devices.data, self.platform)

    @property
    def model(self) -> Model:
        """Shapes only."""
        return _model(self.spec, self.dtype, self.mesh)


@functools.lru_cache(maxsize=64)
def _model(spec: ModelSpec, dtype: str, devices: AbstractMesh | None) -> Model:
    model = without_weights(spec, jnp.dtype(dtype), None, "")
    return replace(model, decoder=mesh.placed(devices, mesh.weights, model.decoder))


def find_model(name: str, ignore: Collection[str] = ()) -> tuple[ModelSpec, str]:
    """The shape of a model and where it is from; nothing is downloaded.

    Args:
      name: a directory, GGUF file or `config.json`, a key of `NAMED`, or a hub id whose config is in the hub's cache or
        whose shape is known.
      ignore: config fields that may be ignored although kvjax does not know them.
    """
    path, known = Path(name), named(name)
    if path.exists():
        return read_spec(path, ignore), f"{path if path.is_file() else path / 'config.json'}"
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        import huggingface_hub

        found = huggingface_hub.try_to_load_from_cache(name, "config.json")
        if isinstance(found, str):
            return read_spec(Path(found), ignore), f"{name} in the hub's cache"
    if known is None:
        raise InputError(
            f"{name}: no such directory or config.json, not in the hub's cache, and not a shape that is known"
            f" ({', '.join(NAMED)}); a plan downloads nothing"
        )
    return NAMED[known], f"the known shape {known}"


def setting(args: argparse.Namespace, spec: ModelSpec, chip: Chip, method: str) -> Setting:
    """What the flags say of one method."""
    arguments: Mapping[str, object] = args.arguments
    budget = args.budget
    if args.all_methods:  # as far as a method has them
        arguments = methods.taken(method, args.arguments)
        budget = None if default_budget(method) is None else budget
    recipe = make(method, budget if budget is not None else default_budget(method), arguments)
    if recipe.kernels not in ("xla", "cpu", None, chip.platform):
        raise InputError(f"kernels={recipe.kernels} cannot run on {chip.name}: use auto or xla")
    kernels = {None: chip.platform, "cpu": "xla"}.get(recipe.kernels, recipe.kernels)  # no plan is for a CPU
    recipe = recipe._replace(kernels=kernels)
    longer = replace(spec, max_position=2 * LARGEST)  # bytes do not depend on what a model is made for
    return Setting(longer, args.dtype, recipe, args.context, args.new_tokens, args.batch, chip.platform, devices(args))


def method_of(args: argparse.Namespace, spec: ModelSpec) -> str:
    """The method that is planned: the given one, or what the model is made for."""
    return args.method or methods.of(spec)
