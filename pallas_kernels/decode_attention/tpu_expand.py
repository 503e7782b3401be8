"""Keys of a page that a TPU kernel expands from latents and rotates as it reads them.

Slots are on the lanes: a head's key is `[H page]`, whose two halves, which the rotation mixes, are whole registers.
Scales and zero points of latents multiply what their codes are expanded to.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.codes import to_groups
from pallas_kernels.decode_attention.formats import Format
from pallas_kernels.decode_attention.reference import KeyExpansion
from pallas_kernels.decode_attention.tpu_page import Page, dot

SLOTS = 512  # of a step: the products of one page are many
SUBLANES = 16  # rows of a register of 16-bit numbers


def operands(expand: KeyExpansion, key: Format) -> dict[str, Any]:
    """What the kernel reads beside a part, every leaf `[K ...]` but the frequencies `[#B #K half 1]`."""
    half = expand.rotation.frequency.shape[-1]
    if expand.norm is not None:
        raise NotImplementedError("keys of latents with a norm are for xla only")
    if expand.rotation.still:
        raise NotImplementedError("heads that turn in part when they are read are for xla only")
    if half % SUBLANES:
        raise NotImplementedError(f"the halves of rotated heads are {half} numbers, not a multiple of {SUBLANES}")
    found: dict[str, Any] = {"frequency": expand.rotation.frequency[..., None]}
    if expand.up is not None:
        up = jnp.swapaxes(expand.up, 1, 2)  # K keys R
        found["ups"] = [up[..., p.start : p.start + p.width] for p in key.pieces]
        if key.groups:
            found["sums"] = to_groups(up.astype(jnp.float32), key.size, "constant").sum(axis=-1)
    if expand.bias is not None:
        found["bias"] = expand.bias[..., None]
    return found


def scores(
    page: Page, query: Float[Array, "G keys"], expand: dict[str, Any], where: Int[Array, "1 page"]
) -> Float[Array, "G page"]:
    """Before the scale of logits."""
    frequency = expand["frequency"][0, 0]
    theta, half = frequency * where.astype(jnp.float32), frequency.shape[0]
    cos, sin, total = jnp.cos(theta), jnp.sin(theta), None
    numbers = [page.numbers(piece) for piece in page.read.pieces]
    for first in range(0, query.shape[1], 2 * half):
        key = _expanded(page, numbers, expand, first, 2 * half) if "ups" in expand else _stored(page, numbers)
        if "bias" in expand:
            key = key + expand["bias"][0, first : first + 2 * half].astype(jnp.float32)
        key = key.astype(query.dtype).astype(jnp.float32)
        a, b = key[:half], key[half:]
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=0).astype(query.dtype)
        part = dot(query[:, first : first + 2 * half], turned, (1, 0))
        total = part if total is None else total + part
    return total  # pyright: ignore[reportReturnType]


def _expanded(
    page: Page, numbers: list[Array], expand: dict[str, Any], first: int, size: int
) -> Float[Array, "size page"]:
    """Numbers from `first` on of the keys of latents."""
    read, total = page.read, None
    rows = slice(first, first + size)
    for group in range(max(read.groups, 1)):
        each = zip(read.pieces, numbers, expand["ups"], strict=True)
        own = [(p, x, ref[0, rows]) for p, x, ref in each if p.group == group]
        parts = (dot(up, x.astype(up.dtype), (1, 1 - page.axis)) * p.weight for p, x, up in own)
        part = functools.reduce(jnp.add, parts)
        if read.groups:
            part = page.scale(group) * part + page.zero(group) * expand["sums"][0, rows, group : group + 1]
        total = part if total is None else total + part
    assert total is not None
    return total


def _stored(page: Page, numbers: list[Array]) -> Float[Array, "R page"]:
    """Cached keys."""
    planes: dict[int, list[Array]] = {}
    for piece, number in zip(page.read.pieces, numbers, strict=True):
        number = number.astype(jnp.float32)
        number = (number if page.axis else number.T) * piece.weight
        if page.read.groups:
            number = number * page.scale(piece.group)
            if piece.weight == 1:
                number = number + page.zero(piece.group)
        planes.setdefault(piece.weight, []).append(number)
    return functools.reduce(jnp.add, (jnp.concatenate(each, axis=0) for each in planes.values()))
