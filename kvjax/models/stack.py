"""Equal layers in one array of each kind: a program for TPUs is compiled for one of them, however many there are.

There XLA reads a layer's part of such an array inside the product that needs it. On GPUs it copies that part first
where a product has several rows, and on CPUs always: there layers lie apart.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.core import Tracer
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

from kvjax.models.decoder import Decoder, Layer
from kvjax.parallel import mesh


class LayerStack(nnx.Module):
    """Equal layers that follow each other: one layer, of whose arrays each has those of all along its first axis."""

    def __init__(self, layers: Sequence[Layer]):
        leaves, structures = zip(*map(jax.tree.flatten, layers), strict=True)
        self.stack: Layer = jax.tree.unflatten(structures[0], [_stacked(kind) for kind in zip(*leaves, strict=True)])
        self.size = len(layers)

    def at(self, index: Int[Array, ""] | int) -> Layer:
        """One of the layers."""
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), self.stack)


class StackedLayers(nnx.Module):
    """The layers of a decoder in stacks; as a sequence, it copies those that are looked at."""

    def __init__(self, layers: Sequence[Layer]):
        kind = lambda layer: (jax.tree.structure(layer), *((x.shape, x.dtype) for x in jax.tree.leaves(layer)))
        self.stacks = nnx.List([LayerStack([*alike]) for _, alike in itertools.groupby(layers, kind)])

    def __len__(self) -> int:
        return sum(stack.size for stack in self.stacks)

    def __iter__(self) -> Iterator[Layer]:
        return (stack.at(i) for stack in self.stacks for i in range(stack.size))

    def __getitem__(self, index: int) -> Layer:
        stack, place = self.find(index)
        return stack.at(place)

    def find(self, index: int) -> tuple[LayerStack, int]:
        """The stack that a layer lies in, and its place there."""
        for stack in self.stacks:
            if index < stack.size:
                return stack, index
            index -= stack.size
        raise IndexError(index)


def modules(model: Decoder) -> list[Layer]:
    """The modules that settings of its layers are in: one of each stack, or each layer."""
    layers = model.layers
    return [stack.stack for stack in layers.stacks] if isinstance(layers, StackedLayers) else list(layers)


def stacked(model: Decoder) -> Decoder:
    """The decoder with its layers in stacks. Those that it had are gone.

    Cost: memory of the model and of the largest kind of array, of all layers.
    """
    model.layers = StackedLayers(list(model.layers))  # pyright: ignore[reportAttributeAccessIssue]
    return model


def stacked_where_fast(model: Decoder) -> Decoder:
    """The decoder as this platform decodes it fast: on TPUs with its layers in stacks.

    Not those of experts, nor low-rank ones: what reads them would copy them first.
    """
    fast = mesh.platform() == "tpu" and model.spec.latent is None and model.spec.experts is None
    return stacked(model) if fast else model


def _stacked(arrays: Sequence[Any]) -> Array:
    """Equal arrays as one. They are deleted one after the other, unless they are being traced."""
    first, shape = arrays[0], (len(arrays), *arrays[0].shape)
    if isinstance(first, Tracer):
        return jnp.stack(arrays)
    where = first.sharding
    where = NamedSharding(where.mesh, P(None, *where.spec)) if isinstance(where, NamedSharding) else where
    whole = jnp.zeros(shape, first.dtype, device=where)
    for i, array in enumerate(arrays):
        whole = _put(where)(whole, array, i)
        array.delete()
    return whole


@functools.cache
def _put(where: jax.sharding.Sharding) -> Any:
    put = lambda whole, array, i: jax.lax.dynamic_update_index_in_dim(whole, array, i, 0)
    return jax.jit(put, donate_argnums=0, out_shardings=where)
