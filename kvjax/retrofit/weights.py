"""The weights of a model that is being retrofitted: a flat dict of parameter paths, as they are stored."""

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from kvjax.checkpoint import hf
from kvjax.models import gate as gates
from kvjax.models.decoder import Decoder
from kvjax.parallel import mesh
from kvjax.spec import GateSpec, ModelSpec

Params = dict[str, Array]  # parameter path -> array


def of_model(model: Decoder) -> Params:
    """The weights of a decoder in float32."""
    return {path: jnp.asarray(leaf, jnp.float32) for path, leaf in hf.parameters(model)}


def to_model(weights: Params, spec: ModelSpec, dtype: DTypeLike) -> Decoder:
    """A decoder with these weights; those that it does not have are left out."""
    wanted, tree = hf.abstract(spec, dtype)
    return jax.tree.unflatten(tree, [weights[path].astype(dtype) for path in wanted])


def begin_gates(weights: Params, spec: ModelSpec) -> Params:
    """Weights of closed gates: what produces the borrowed coordinate is zero, or there is a new projection of zeros."""
    gate = spec.gate
    assert gate is not None
    if gate.neuron is None:
        wanted, _ = hf.abstract(spec, jnp.float32)
        fresh = {path: leaf for path, leaf in wanted.items() if path not in weights}
        return weights | {
            path: jnp.ones(leaf.shape) if path.endswith("scale") else jnp.zeros(leaf.shape)
            for path, leaf in fresh.items()
        }
    return {path: _silenced(path, leaf, spec, gate) for path, leaf in weights.items()}


def _silenced(path: str, leaf: Array, spec: ModelSpec, gate: GateSpec) -> Array:
    """A projection of queries or keys without what the gate reads."""
    *_, layer, module, leaf_name = ("", "", *path.split("."))[-3:]
    if layer != "attention" or module not in ("q", "k") or leaf_name not in ("kernel", "bias"):
        return leaf
    if gate.objective == "dms" and module == "k":
        return leaf
    heads = leaf.reshape(*leaf.shape[:-1], -1, spec.head_dim)
    return gates.silence(gate, heads, spec.num_kv_heads).reshape(leaf.shape)


def trained(path: str, gate: GateSpec) -> bool:
    """Whether a weight is trained: all are, but for gates with weights of their own, where only those are."""
    return gate.neuron is not None or ".adapter." in path


def parts(weights: Params, spec: ModelSpec, dtype: DTypeLike) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """The weights of a gated decoder as a converted checkpoint stores them."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for path in hf.abstract(spec, dtype)[0]:
        head, *rest = path.split(".")
        name = f"{head}.{rest[0]}" if head == "layers" else "embedding" if head == "embedding" else "head"
        found.setdefault(name, {})[path] = mesh.read(weights[path].astype(dtype))
    yield from found.items()


def about(
    source: str, ignore: Collection[str], spec: ModelSpec, dtype: DTypeLike, merged: np.ndarray
) -> dict[str, Any]:
    """What a retrofitted checkpoint notes of itself; `merged` is as in `objective.Losses`, as measured."""
    gate = spec.gate
    assert gate is not None
    return {
        "dtype": np.dtype(dtype).name,
        "source": source,
        "ignore_config": sorted(ignore),
        "gate": dataclasses.asdict(gate),
        "slots": np.round(1 - merged, 4).tolist(),
    }
