"""The file of a model's gates (`kvjax.models.keep`), which lies beside its weights: safetensors.

A tensor holds a parameter of all layers that have a gate, `[layers ...]`, in float32.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from kvjax.checkpoint import hf
from kvjax.errors import InputError
from kvjax.files import output
from kvjax.models.decoder import Decoder
from kvjax.models.keep import KeepGate, gated
from kvjax.parallel import mesh
from kvjax.policies.budgets import profile
from kvjax.spec import ModelSpec

BESIDE = "kvjax-gate.safetensors"
HEADER, FORMAT = "kvjax", "gate 1"


def shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The file's tensors for a model, by name."""
    one, _ = hf.by_path(nnx.eval_shape(lambda: KeepGate(spec, nnx.Rngs(0))))
    return {name: (len(gated(spec)), *leaf.shape) for name, leaf in one.items()}


def write(path: Path, gates: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Write the gates of all layers, as `shapes` has them; `about` says how they came to be."""
    header = json.dumps({"format": FORMAT, **about})
    arrays = {name: np.ascontiguousarray(x, np.float32) for name, x in gates.items()}
    output.write(path, safetensors.numpy.save(arrays, {HEADER: header}))


def read(path: Path, spec: ModelSpec) -> dict[str, np.ndarray]:
    """Read the gates of all layers of a model.

    Raises:
      InputError: the file cannot be read, or is that of another model.
    """
    try:
        with safetensors.safe_open(path, "np") as file:
            about = json.loads((file.metadata() or {}).get(HEADER, "{}"))
            found = {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as gates of a model ({error})") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise InputError(f"{path}: is not a file of gates that this kvjax reads ({FORMAT}): train them again")
    if {name: x.shape for name, x in found.items()} != shapes(spec):
        raise InputError(f"{path}: gates of a model of another shape: remove the file, or train gates for this model")
    if not all(x.dtype == np.float32 and np.isfinite(x).all() for x in found.values()):
        raise InputError(f"{path}: has what is not a number: train the gates again")
    return found


def attach(model: Decoder, gates: Mapping[str, np.ndarray], where: Any = None) -> Decoder:
    """The model with gates; it computes what it did.

    Args:
      model: the decoder, whose layers are given them.
      gates: of all layers, as `shapes` has them.
      where: the mesh that its weights lie on; None = one device.
    """
    wanted, tree = hf.by_path(nnx.eval_shape(lambda: KeepGate(model.spec, nnx.Rngs(0))))
    for place, index in enumerate(gated(model.spec)):
        put = lambda name, place=place: mesh.place_weight(where, f"keep.{name}", gates[name][place])
        model.layers[index].keep = jax.tree.unflatten(tree, [put(name) for name in wanted])
    return model


def noted(model: Decoder, checkpoint: Path) -> Decoder:
    """The model with the gates that lie beside its weights, if they do."""
    path = profile.beside(checkpoint, BESIDE)
    return attach(model, read(path, model.spec), mesh.of(model)) if path.is_file() else model
