"""Decode attention over pages in plain jnp: the contract, and the XLA path on every platform.

Axis letters: B batch, K key/value heads, G query heads per key/value head, H head width, R and W cached widths of keys
and values, P pages of the pool, M pages of a row, S = M x page slots of a row.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from pallas_kernels.codes import DENSE
from pallas_kernels.decode_attention import packed
from pallas_kernels.pools import reading
from pallas_kernels.rotation import Rotation, rotate
from pallas_kernels.soft_cap import soft_cap

EMPTY = -1e30  # the logit of a slot that is not there; finite, so that differences of two of them are not NaN


class PagedKV(NamedTuple):
    """Slots of rows that are kept in one number format: a tier of a cache.

    Attributes:
      q: queries, as they meet these keys, grouped by key/value head.
      k, v: pages of key and value codes, every leaf `[P page ...]`.
      table: physical page of each logical page; entries behind the row's end are ignored.
      length: filled slots of each row.
      pos: position of each slot; None = slot s holds position s.
      decode_key, decode_value: turn codes into numbers of the query's dtype, the slots being those of a page or of
        several; see `pallas_kernels.codes`.
      slots: which slots are attended; None = all.
    """

    q: Float[Array, "B K G H"]
    k: Any
    v: Any
    table: Int[Array, "B K M"]
    length: Int[Array, "B K"]
    pos: Int[Array, "P page"] | None = None
    decode_key: Callable[[Any, DTypeLike], Float[Array, "*b s R"]] = DENSE
    decode_value: Callable[[Any, DTypeLike], Float[Array, "*b s W"]] = DENSE
    slots: Bool[Array, "B K S"] | None = None

    @property
    def size(self) -> int:
        """Pages of the pool."""
        return jax.tree.leaves(self.k)[0].shape[0]

    @property
    def page(self) -> int:
        """Slots of a page."""
        return jax.tree.leaves(self.k)[0].shape[1]

    @property
    def capacity(self) -> int:
        """Slots that a row's table can address."""
        return self.table.shape[-1] * self.page

    def places(self, place: Callable[[Int[Array, "B K S"]], Int[Array, "B K S"]]) -> Int[Array, "B K S"]:
        """Of all slots."""
        slot = jnp.broadcast_to(jnp.arange(self.capacity), (*self.length.shape, self.capacity))
        return place(slot if self.pos is None else self.pos.at[self.table].get(mode="clip").reshape(slot.shape))


class KeyExpansion(NamedTuple):
    """How cached vectors become keys: latents are expanded to the keys of their heads, which then are rotated.

    Attributes:
      rotation: of keys at their places.
      up: from a latent to the keys of its heads beside each other; None = cached vectors are keys before rotation.
      bias: added to them, or to cached keys.
      norm: of each head's key before rotation.
    """

    rotation: Rotation
    up: Float[Array, "K R keys"] | None = None
    bias: Float[Array, "K keys"] | None = None
    norm: Callable[[Float[Array, "*b H"]], Float[Array, "*b H"]] | None = None

    def keys(self, cached: Float[Array, "B K s R"], place: Int[Array, "B K s"]) -> Float[Array, "B K s keys"]:
        """Keys as queries meet them."""
        y = cached
        if self.up is not None:
            y = jnp.einsum("bksr,krn->bksn", cached.astype(self.up.dtype), self.up)
        if self.bias is not None:
            y = y + self.bias[:, None]
        y = y.reshape(*place.shape, -1, self.rotation.width)
        if self.norm is not None:
            y = self.norm(y)
        cos, sin = self.rotation.angles(place)
        return rotate(y, cos[..., None, :], sin[..., None, :]).reshape(*place.shape, -1)


class Partial(NamedTuple):
    """Attention over some of a row's tokens, before normalisation: partials merge exactly."""

    o: Float[Array, "B K G W"]  # sum of exp(logit - m) * value
    l: Float[Array, "B K G"]  # sum of exp(logit - m)
    m: Float[Array, "B K G"]  # largest logit; EMPTY where the row holds nothing
    logits: tuple[Float[Array, "B K G S"], ...] = ()  # of each part; EMPTY where a slot is empty or out of the window


def decode_attention(parts: Sequence[PagedKV], *, with_logits: bool = False, **options: Any) -> Partial:
    """Attention of one query per row over the first `length` slots of each part of the row, all parts together.

    Args:
      parts: disjoint sets of a row's tokens.
      with_logits: also return every slot's logit, for methods that learn from attention.
      options: those of `attend`, the same for all parts.

    Returns:
      The unnormalised result; see `merge` and `probabilities`.

    Cost: reads each filled slot once, in blocks; never a dense copy of the row.
    """
    return merge([attend(part, with_logits=with_logits, **options) for part in parts])


def attend(
    part: PagedKV,
    *,
    scale: float,
    after: Int[Array, "B K"] | None = None,
    cap: float | None = None,
    place: Callable[[Int[Array, "B K s"]], Int[Array, "B K s"]] | None = None,
    expand: KeyExpansion | None = None,
    block: int = 512,
    with_logits: bool = False,
) -> Partial:
    """`decode_attention` over one part.

    Args:
      part: the slots.
      scale: factor on the logits, usually H ** -0.5.
      after: slots at positions up to this one are not attended (a sliding window); None = all are.
      cap: logits become `cap tanh(logit / cap)` (Gemma 2); None = they stay.
      place: what positions become before `after` and `expand` see them; None = they stay.
      expand: how cached vectors become keys at their places; None = they are keys.
      block: slots per step, rounded to whole pages.
      with_logits: also return every slot's logit.
    """
    q, k, v, table, length, pos, decode_key, decode_value, slots = part
    page, capacity = part.page, part.capacity
    per_step = max(1, min(block // page, table.shape[-1]))
    steps = -(-table.shape[-1] // per_step)
    width = per_step * page
    table = jnp.pad(table, ((0, 0), (0, 0), (0, steps * per_step - table.shape[-1])))
    if slots is not None:
        slots = jnp.pad(slots, ((0, 0), (0, 0), (0, steps * width - capacity)))
    rows = table.shape[:2]

    def step(i: Array, carry: Partial, pages: Callable[[Array], Any]) -> Partial:
        keys, values, where = pages(jax.lax.dynamic_slice_in_dim(table, i * per_step, per_step, axis=2))
        slot = i * width + jnp.arange(width)
        where = jnp.broadcast_to(slot, (*rows, width)) if pos is None else where.reshape(*rows, width)
        where = where if place is None else place(where)
        seen = slot < length[..., None]
        if after is not None:
            seen &= where > after[..., None]
        if slots is not None:
            seen &= jax.lax.dynamic_slice_in_dim(slots, i * width, width, axis=2)
        s = soft_cap(_scores(q, keys, decode_key, expand, where) * scale, cap)
        s = jnp.where(seen[:, :, None], s, EMPTY)
        m = jnp.maximum(carry.m, s.max(axis=-1))
        e = jnp.where(seen[:, :, None], jnp.exp(s - m[..., None]), 0.0)
        old = jnp.exp(carry.m - m)
        weighted = _sums(e, values, decode_value, q.dtype)
        logits = tuple(jax.lax.dynamic_update_slice_in_dim(x, s, i * width, axis=3) for x in carry.logits)
        return Partial(carry.o * old[..., None] + weighted, carry.l * old + e.sum(axis=-1), m, logits)

    heads = q.shape[:3]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*rows, width, *x.shape[2:]), x.dtype), v)
    values = jax.eval_shape(lambda codes: decode_value(codes, q.dtype), shapes)
    first = Partial(
        jnp.zeros((*heads, values.shape[-1]), jnp.float32),
        jnp.zeros(heads, jnp.float32),
        jnp.full(heads, EMPTY, jnp.float32),
        (jnp.full((*heads, steps * width), EMPTY, jnp.float32),) if with_logits else (),
    )
    filled = (jnp.max(length) + width - 1) // width
    loop = lambda pages: jax.lax.fori_loop(0, filled, functools.partial(step, pages=pages), first)
    out = reading((k, v, pos), loop)
    return out._replace(logits=tuple(x[..., :capacity] for x in out.logits))


def _slots(pages: Any) -> Any:
    """Pages `[B K n page ...]` as slots `[B K s ...]`."""
    return jax.tree.map(lambda x: x.reshape(*x.shape[:2], -1, *x.shape[4:]), pages)


def _scores(
    q: Float[Array, "B K G H"], codes: Any, decode: Any, expand: KeyExpansion | None, where: Int[Array, "B K s"]
) -> Float[Array, "B K G s"]:
    """Products of queries and the keys of pages."""
    if expand is not None:
        key = expand.keys(decode(_slots(codes), q.dtype), where)
        return jnp.einsum("bkgh,bksh->bkgs", q, key, preferred_element_type=jnp.float32)

    def of_numbers(q: Array, codes: Any) -> Array:
        found = jnp.einsum("bkgh,bknph->bkgnp", q, decode(codes, q.dtype), preferred_element_type=jnp.float32)
        return found.reshape(*q.shape[:3], -1)

    if not packed.reads(decode, codes):
        return of_numbers(q, codes)
    of_codes = lambda q, codes: packed.scores(q, _slots(codes), decode)
    return jax.lax.platform_dependent(q, codes, cpu=of_codes, default=of_numbers)


def _sums(e: Float[Array, "B K G s"], codes: Any, decode: Any, dtype: DTypeLike) -> Float[Array, "B K G W"]:
    """The values of pages, weighted and added."""

    def of_numbers(e: Array, codes: Any) -> Array:
        value = decode(codes, dtype)
        e = e.astype(value.dtype).reshape(*e.shape[:3], *value.shape[2:4])
        return jnp.einsum("bkgnp,bknpr->bkgr", e, value, preferred_element_type=jnp.float32)

    if not packed.reads(decode, codes):
        return of_numbers(e, codes)
    of_codes = lambda e, codes: packed.sums(e, _slots(codes), decode, dtype)
    return jax.lax.platform_dependent(e, codes, cpu=of_codes, default=of_numbers)


def merge(parts: Sequence[Partial]) -> Partial:
    """One partial from several over disjoint sets of tokens: tiers, splits or shards."""

    def two(a: Partial, b: Partial) -> Partial:
        m = jnp.maximum(a.m, b.m)
        x, y = jnp.exp(a.m - m), jnp.exp(b.m - m)
        return Partial(a.o * x[..., None] + b.o * y[..., None], a.l * x + b.l * y, m, a.logits + b.logits)

    return functools.reduce(two, parts)


def probabilities(whole: Partial) -> tuple[Float[Array, "B K G S"], ...]:
    """Attention weights of each part's slots, normalised over all parts; 0 where a slot is empty."""
    if not whole.logits:
        raise ValueError("probabilities need a partial computed with with_logits=True")
    weight = lambda logits: jnp.exp(logits - whole.m[..., None]) / whole.l[..., None]
    return tuple(jnp.where(logits > EMPTY, weight(logits), 0.0) for logits in whole.logits)
