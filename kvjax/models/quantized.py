"""Matrices of few bits: a code for each number, and for each group of `GROUP` inputs what makes numbers of codes.

    8 bits   number = (code - 128) scale         symmetric: the largest number of a group is 127 scale
    4 bits   number = code scale + zero          of eleven ranges the one that loses least, fitted by least squares

Scales and zeros are bfloat16, so a number takes 8.5 and 5 bits. Two codes of 4 bits share a byte: byte j of a group
holds the numbers j (low bits) and j + 16. A product reads these halves apart, so codes are never put together. Only
weights are quantised, and each product is computed in the dtype of its input.
"""

import contextlib
import functools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import BFloat16, Float, Int, UInt8

from kvjax.errors import InputError
from kvjax.parallel import mesh
from kvjax.spec import WEIGHT_BITS as BITS
from kvjax.spec import WEIGHT_GROUP as GROUP
from kvjax.spec import ModelSpec, WeightFormat
from pallas_kernels.chosen_product import cpu
from pallas_kernels.implementation import Implementation, resolve

LEAVES = tuple(f"{of}.{leaf}" for of in ("embedding", "kernel", "kernels") for leaf in ("codes", "scale", "zero"))
_RANGES = tuple(1 - 0.03 * i for i in range(11))  # of a group's own, that its codes may span
_BLOCK = {"cpu": 2**20}  # numbers that are made at once, for they stay in a CPU's cache
_LARGEST = 2**24  # elsewhere, where XLA may hold so many
_ROWS = 4096  # tokens whose vectors are made at once
_PART = 2**21  # numbers that are encoded together


class Quantized(nnx.Module):
    """A matrix of codes: `x @ it` is a product, `it[i]` the i-th part of its first axis.

    Args:
      drawn: the numbers, `[*e in out]`, or `[out in]` with `axis=-1`.
      weights: how many bits.
      axis: that of the inputs, in groups along which codes share scales.
    """

    def __init__(self, drawn: Float[Array, "..."], weights: WeightFormat, axis: int):
        self.axis, self.bits = axis, BITS[weights]
        encoded = _encode(drawn.reshape(-1, drawn.shape[-1]), self.bits, axis)
        made = {name: nnx.Param(x.reshape(*drawn.shape[:-2], -1, x.shape[-1])) for name, x in encoded.items()}
        self.codes, self.scale, self.zero = made["codes"], made["scale"], made.get("zero")

    def __getitem__(self, key: object) -> "Quantized":
        return self if key is Ellipsis else jax.tree.map(lambda x: x[key], self)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of its numbers."""
        shape = list(self.codes.shape)
        shape[self.axis] *= 8 // self.bits
        return tuple(shape)

    def __rmatmul__(self, x: Float[Array, "*b inner"]) -> Float[Array, "*b outer"]:
        return product(x, [self], 0)

    def _product(self, x: Float[Array, "*b inner"]) -> Float[Array, "*b outer"]:
        each = 8 // self.bits
        apart = x.reshape(*x.shape[:-1], -1, each, GROUP // each)
        over = ((x.ndim - 1,), (2 + self.axis,)), ((), ())
        y = sum(
            jax.lax.dot_general(
                apart[..., i, :].reshape(*x.shape[:-1], -1), part, over, preferred_element_type=jnp.float32
            )
            for i, part in enumerate(self._parts(x.dtype))
        )
        return y.astype(x.dtype)  # pyright: ignore[reportAttributeAccessIssue]

    def _parts(self, dtype: DTypeLike) -> list[Float[Array, "..."]]:
        """Numbers of all codes that lie at the same place of their bytes, for each such place."""
        codes, axis, bits = self.codes[...], self.codes.ndim + self.axis, self.bits
        scale = self.scale[...].astype(jnp.float32)
        zero = -(2 ** (bits - 1)) * scale if self.zero is None else self.zero[...].astype(jnp.float32)
        grouped = codes.reshape(*codes.shape[:axis], scale.shape[axis], -1, *codes.shape[axis + 1 :])
        scale, zero = jnp.expand_dims(scale, axis + 1), jnp.expand_dims(zero, axis + 1)
        places = [(grouped >> jnp.uint8(i)) & jnp.uint8(2**bits - 1) for i in range(0, 8, bits)]
        return [(place.astype(jnp.float32) * scale + zero).astype(dtype).reshape(codes.shape) for place in places]


def chosen_product(
    x: Float[Array, "*b inner"],
    options: Sequence[Quantized],
    index: Int[Array, ""] | int,
    kernels: Implementation | None,
) -> Float[Array, "*b outer"]:
    """`x @ options[index]` of equal matrices whose inputs are their rows; of the others nothing is read."""
    if resolve(kernels, cpu=True) == "cpu":
        parts = [[y[...] for y in (o.codes, o.scale, o.zero) if y is not None] for o in options]
        with contextlib.suppress(NotImplementedError):
            return cpu.coded_product(x, parts, jnp.asarray(index))
    return product(x, options, index)


def product(
    x: Float[Array, "*b inner"], options: Sequence[Quantized], index: Int[Array, ""] | int
) -> Float[Array, "*b outer"]:
    """`x @ options[index]` of equal matrices, some outputs at a time; of the others nothing is read."""
    first, inner = options[0], x.shape[-1]
    axis = -3 - first.axis  # of the outputs
    outer = first.codes.shape[axis]
    block = min(outer, max(1, _BLOCK.get(mesh.platform(), _LARGEST) // inner))

    def some(i: Array | int, y: Float[Array, "*b outer"]) -> Float[Array, "*b outer"]:
        start = jnp.minimum(i * block, outer - block)  # the last block may overlap with the one before
        cut = lambda option: jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, block, axis), option)
        part = cut(first) if len(options) == 1 else jax.lax.switch(index, [functools.partial(cut, o) for o in options])
        return jax.lax.dynamic_update_slice_in_dim(y, part._product(x), start, axis=-1)

    if block == outer and len(options) == 1:
        return first._product(x)
    return jax.lax.fori_loop(0, -(-outer // block), some, jnp.zeros((*x.shape[:-1], outer), x.dtype))


def rows(table: Quantized, index: Int[Array, "*b"], dtype: DTypeLike) -> Float[Array, "*b D"]:
    """Rows of an embedding, `_ROWS` at a time, since a TPU lays groups on lanes that stay empty."""
    take = lambda one: numbers(table[one], dtype)
    if index.size <= _ROWS:
        return take(index)
    return jax.lax.map(take, index.reshape(-1), batch_size=_ROWS).reshape(*index.shape, -1)


def numbers(matrix: Quantized, dtype: DTypeLike) -> Float[Array, "..."]:
    """The numbers of a matrix, all at once."""
    axis, scale = matrix.codes.ndim + matrix.axis, matrix.scale
    cut = lambda x: x.reshape(*x.shape[:axis], scale.shape[axis], -1, *x.shape[axis + 1 :])
    return jnp.concatenate([cut(part) for part in matrix._parts(dtype)], axis + 1).reshape(matrix.shape)


def matrix(drawn: Float[Array, "..."], weights: WeightFormat | None, axis: int = -2) -> Any:
    """What a module keeps of a matrix: an `nnx.Param`, or a `Quantized` one."""
    return nnx.Param(drawn) if weights is None else Quantized(drawn, weights, axis)


def finer(weights: WeightFormat | None) -> WeightFormat | None:
    """How matrices are kept that lose most: values, outputs of attention, embedding and head."""
    return None if weights is None else "int8"


def asked(spec: ModelSpec, weights: str | None) -> ModelSpec:
    """The model with its matrices in `weights`; None = as they are. Raises `InputError` where that cannot be."""
    if weights is None:
        return spec
    if weights not in BITS:
        raise InputError(f"weights {weights!r}: expected one of {', '.join(BITS)}")
    if spec.weights is not None:
        raise InputError(f"weights {weights}: those of this model are {spec.weights} already: leave it out")
    widths = {spec.embed_dim, spec.num_heads * spec.head_dim, spec.mlp_dim}
    if odd := sorted(width for width in widths if width % GROUP):
        raise InputError(f"weights {weights}: matrices of {odd[0]} inputs cannot be cut into groups of {GROUP}")
    return replace(spec, weights=weights)


def encode(array: np.ndarray, bits: int, axis: int) -> dict[str, np.ndarray]:
    """A matrix as the arrays of a `Quantized` one, some rows at a time.

    Cost: host memory of the result, and device memory of a dozen times `_PART` numbers.
    """
    flat = array.reshape(-1, array.shape[-1])
    step = max(1, _PART // flat.shape[1] // GROUP) * GROUP
    parts = [_encode(flat[i : i + step], bits, axis) for i in range(0, len(flat), step)]
    whole = lambda name: np.concatenate([np.asarray(part[name]) for part in parts])
    return {name: x.reshape(*array.shape[:-2], -1, x.shape[-1]) for name in parts[0] for x in [whole(name)]}


def encoded(
    arrays: Iterable[tuple[str, np.ndarray]], wanted: Collection[str], dtype: DTypeLike | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Parameters by path as a model wants them: its matrices encoded, the others cast to `dtype`, if there is one."""
    for path, array in arrays:
        if f"{path}.codes" not in wanted:
            yield path, array if dtype is None else array.astype(dtype, copy=False)
            continue
        bits = 8 if f"{path}.zero" not in wanted else 4
        found = encode(array, bits, -1 if path == "embedding" else -2)
        del array
        yield from ((f"{path}.{name}", x) for name, x in found.items())


@functools.partial(jax.jit, static_argnames=("bits", "axis"))
def _encode(
    numbers: Float[Array, "rows columns"], bits: int, axis: int
) -> dict[str, UInt8[Array, "m n"] | BFloat16[Array, "m n"]]:
    axis += 2
    x = numbers.astype(jnp.float32)
    x = x.reshape(*x.shape[:axis], -1, GROUP, *x.shape[axis + 1 :])
    codes, found = _symmetric(x, axis + 1) if bits == 8 else _fitted(x, axis + 1, 2**bits - 1)
    each = 8 // bits
    apart = jnp.stack(jnp.split(codes.astype(jnp.uint8), each, axis + 1))
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8).reshape(each, *[1] * codes.ndim)
    packed = jnp.sum(apart << shifts, axis=0, dtype=jnp.uint8)
    flat = packed.reshape(*packed.shape[:axis], -1, *packed.shape[axis + 2 :])
    return {"codes": flat} | {name: jnp.squeeze(value, axis + 1) for name, value in found.items()}


def _symmetric(x: Float[Array, "..."], axis: int) -> tuple[Int[Array, "..."], dict[str, Array]]:
    scale = _rounded(jnp.max(jnp.abs(x), axis, keepdims=True) / 127)
    codes = jnp.clip(jnp.round(x / _nonzero(scale)), -127, 127)
    return codes.astype(jnp.int32) + 128, {"scale": scale.astype(jnp.bfloat16)}


def _fitted(x: Float[Array, "..."], axis: int, most: int) -> tuple[Int[Array, "..."], dict[str, Array]]:
    """Codes from 0 to `most`, and the scale and zero of those of several ranges that lose least."""
    low, high = jnp.min(x, axis, keepdims=True), jnp.max(x, axis, keepdims=True)
    mean = functools.partial(jnp.mean, axis=axis, keepdims=True)

    def tried(share: Array | float) -> tuple[Array, Array, Array]:
        """Scale, zero and squared error for a share of the range."""
        scale = share * (high - low) / most
        codes = _nearest(x, scale, (low + high) / 2 - scale * most / 2, most)
        spread = codes - mean(codes)
        fitted = mean(spread * x) / _nonzero(mean(spread * spread))
        scale = _rounded(jnp.where(fitted > 0, fitted, scale))
        zero = _rounded(mean(x) - scale * mean(codes))
        return scale, zero, mean(jnp.square(_nearest(x, scale, zero, most) * scale + zero - x))

    best = tried(_RANGES[0])

    def better(i: Array, best: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        found = tried(jnp.asarray(_RANGES, jnp.float32)[i])
        return jax.tree.map(functools.partial(jnp.where, found[2] < best[2]), found, best)

    scale, zero, _ = jax.lax.fori_loop(1, len(_RANGES), better, best)
    kept = {"scale": scale.astype(jnp.bfloat16), "zero": zero.astype(jnp.bfloat16)}
    return _nearest(x, scale, zero, most).astype(jnp.int32), kept


def _nearest(x: Array, scale: Array, zero: Array, most: int) -> Array:
    return jnp.clip(jnp.round((x - zero) / _nonzero(scale)), 0, most)


def _nonzero(x: Array) -> Array:
    return jnp.where(x == 0, 1, x)


def _rounded(x: Array) -> Float[Array, "..."]:
    """Float32 numbers that bfloat16 has."""
    return jax.lax.reduce_precision(x, 8, 7)
