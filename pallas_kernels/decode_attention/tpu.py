"""Decode attention on TPUs: Pallas, lowered by Mosaic.

The grid is (row, step); the steps of a row's first part come first. A step reads a few pages, which the row's table,
prefetched as scalars, names to the pipeline that fetches them; pages behind a row's end name its last one again, which
is not fetched twice. Codes become numbers in vector memory, piece by piece (`pallas_kernels.codes.pieces`), since a
piece needs no shuffle of lanes. They are not scaled: with number = code x scale + zero,

    q . key      = scale (q . codes) + zero (sum of q)                  once per slot and group
    sum p value  = sum (p scale) codes + sum p zero                     once per slot and group

A TPU's memory has rows of 128 lanes. XLA lays a pool's narrow vectors across its slots instead of padding them, so here
such pages are seen with slots on the lanes, `[R page]`; the transposition costs nothing.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from pallas_kernels.blocks import LANES
from pallas_kernels.codes import assemble
from pallas_kernels.decode_attention import tpu_expand
from pallas_kernels.decode_attention.formats import Format, format_of
from pallas_kernels.decode_attention.reference import EMPTY, Expand, Part, Partial, merge
from pallas_kernels.decode_attention.tpu_page import Page, dot
from pallas_kernels.soft_cap import soft_cap

SLOTS = 2048  # of a step, which costs about 300 bundles whatever it does
PAGES = 32  # of a step at most: each is an operand
VMEM = 64 << 20  # bytes that a kernel may use
SMEM = 768 << 10  # bytes that tables may use


def decode_attention(
    parts: Sequence[Part],
    *,
    scale: float,
    after: Int[Array, "B K"] | None = None,
    cap: float | None = None,
    place: Callable[[Int[Array, "B K S"]], Int[Array, "B K S"]] | None = None,
    expand: Expand | None = None,
    with_logits: bool = False,
    block: int | None = None,
    interpret: Any = False,
) -> Partial:
    """Attention of one query per row: the contract of `reference.decode_attention`, in one launch.

    Args:
      block: slots of a step, rounded to whole pages; None = by what a page costs.
      interpret: run without a TPU, slowly: True, or `pltpu.InterpretParams`.
    """
    rows = parts[0].length.size
    block = block or (tpu_expand.SLOTS if expand is not None and expand.up is not None else SLOTS)
    if (bytes_ := sum(4 * part.table.size for part in parts)) > SMEM:
        raise NotImplementedError(f"page tables of {bytes_} bytes exceed scalar memory: use larger pages")
    flat = lambda x: x.reshape(rows, *x.shape[2:])
    scalars = [jnp.full((rows,), -1, jnp.int32) if after is None else flat(after)]
    plans: list[_Plan] = []
    inputs: list[Array] = []
    in_specs: list[pl.BlockSpec] = []
    if expand is not None:
        scale *= expand.rotation.magnitude
    for part in parts:
        pools = _pools(part, place is None and (after is not None or expand is not None))
        plan = _plan(part, pools, block, len(scalars), sum(plan.steps for plan in plans), with_logits)
        # An entry behind a row's end may name no page; an empty row names the first.
        scalars += [jnp.clip(flat(part.table), 0, part.size - 1), flat(part.length)]
        arrays, specs = _beside(part, plan, place, expand)
        leaves = jax.tree.leaves(pools)
        inputs += [*jax.tree.leaves(arrays), *leaves * plan.each]
        in_specs += [*jax.tree.leaves(specs), *(_of_page(plan, j, x) for j in range(plan.each) for x in leaves)]
        plans.append(plan._replace(beside=jax.tree.structure(arrays)))
    g = parts[0].q.shape[2]
    outs = [out for plan in plans for out in _results(plan, g)]
    found = pl.pallas_call(
        functools.partial(_kernel, plans=plans, scale=scale, cap=cap, windowed=after is not None),
        out_shape=[jax.ShapeDtypeStruct((rows, *shape), jnp.float32) for shape, _ in outs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(rows, sum(plan.steps for plan in plans)),
            in_specs=in_specs,
            out_specs=[spec for _, spec in outs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for plan in plans for shape in _kept(plan, g)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM),
        interpret=interpret,
        name="decode_attention",
    )(*scalars, *inputs)
    each = iter(found)
    return merge([_partial(part, plan, each) for part, plan in zip(parts, plans, strict=True)])


class _Plan(NamedTuple):
    """How a part is read."""

    key: Format
    value: Format
    across: tuple[bool, bool]  # whether pages of keys, and of values, have their slots on the lanes
    tree: Any  # of a page's operands
    page: int  # slots
    each: int  # pages of a step
    scalars: int  # the place of its table among the scalars; its lengths follow
    start: int  # first step of a row
    steps: int
    logits: bool
    beside: Any = None  # tree of its other operands

    @property
    def kept(self) -> int:
        """Arrays that are kept from step to step: sums of values, of zero terms, of weights; the largest logit."""
        return len(self.value.pieces) + self.value.groups + 2

    def own(self, step: Any) -> Any:
        """The part's own step, the nearest one while another part is read."""
        return jnp.clip(step - self.start, 0, self.steps - 1)


def _pools(part: Part, windowed: bool) -> tuple:
    """Keys, values and positions as the kernel's pages are cut from them."""
    turned = lambda pool: jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2) if _lies_across(x) else x, pool)
    return turned(part.k), turned(part.v), part.pos[:, None] if windowed and part.pos is not None else None


def _plan(part: Part, pools: tuple, block: int, scalars: int, start: int, logits: bool) -> _Plan:
    key = format_of("keys", part.decode_key, part.k, part.q.dtype)
    value = format_of("values", part.decode_value, part.v, part.q.dtype)
    if key.run or value.run:
        raise NotImplementedError("scales per channel are for xla only")
    width = part.table.shape[-1]
    each = max(1, min(block // part.page, width, PAGES))
    k, v = (_lies_across(pool["codes"] if isinstance(pool, dict) else pool) for pool in (part.k, part.v))
    tree = jax.tree.structure(pools)
    return _Plan(key, value, (k, v), tree, part.page, each, scalars, start, pl.cdiv(width, each), logits)


def _lies_across(pool: Array) -> bool:
    """Whether XLA lays a pool `[P page width]` with slots on the lanes."""
    _, page, width = pool.shape
    return page % LANES == 0 and width % LANES > 0


def _of_row(*shape: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, *shape), lambda r, i, *_: (r, *[0] * len(shape)))


def _of_page(plan: _Plan, j: int, x: Array) -> pl.BlockSpec:
    """The j-th page of a step; behind the row's end, its last one."""

    def index(r: Array, i: Array, *scalars: Any) -> tuple:
        table, length = scalars[plan.scalars : plan.scalars + 2]
        last = jnp.maximum(pl.cdiv(length[r], plan.page) - 1, 0)
        return table[r, jnp.minimum(plan.own(i) * plan.each + j, last)], *[0] * (x.ndim - 1)

    return pl.BlockSpec((1, *x.shape[1:]), index)


def _beside(
    part: Part, plan: _Plan, place: Callable[[Array], Array] | None, expand: Expand | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a part's pages are read with, and how: queries, places, what keys are expanded by."""
    heads, g = part.q.shape[1:3]
    q = part.q.reshape(-1, *part.q.shape[2:])
    pieces = plan.key.pieces if expand is None else []
    queries = [q[..., p.start : p.start + p.width] for p in pieces] or [q]
    arrays: dict[str, Any] = {"queries": queries}
    specs: dict[str, Any] = {"queries": [_of_row(g, x.shape[-1]) for x in queries]}
    if place is not None:
        block = plan.each * plan.page
        found = part.places(place).reshape(-1, 1, part.capacity)
        arrays["place"] = jnp.pad(found, ((0, 0), (0, 0), (0, plan.steps * block - part.capacity)))
        specs["place"] = pl.BlockSpec((1, 1, block), lambda r, i, *_: (r, 0, plan.own(i)))
    if expand is not None:
        arrays["expand"] = tpu_expand.operands(expand, plan.key)
        of_head = lambda x: pl.BlockSpec((1, *x.shape[1:]), lambda r, i, *_: (r % heads, *[0] * (x.ndim - 1)))
        specs["expand"] = jax.tree.map(of_head, arrays["expand"])
        b, k, half, _ = arrays["expand"]["frequency"].shape
        specs["expand"]["frequency"] = pl.BlockSpec(
            (1, 1, half, 1), lambda r, i, *_: (r // heads % b, r % heads % k, 0, 0)
        )
    return arrays, specs


def _kept(plan: _Plan, g: int) -> list[tuple[int, int]]:
    """Shapes of what is kept from step to step."""
    return [(g, p.width) for p in plan.value.pieces] + [(g, LANES)] * (plan.value.groups + 2)


def _results(plan: _Plan, g: int) -> list[tuple[tuple[int, int], pl.BlockSpec]]:
    """Shapes of what is written of a row, and how."""
    found = [(shape, _of_row(*shape)) for shape in _kept(plan, g)]
    if plan.logits:
        block = plan.each * plan.page
        spec = pl.BlockSpec((1, g, block), lambda r, i, *_: (r, 0, plan.own(i)))
        found.append(((g, plan.steps * block), spec))
    return found


def _partial(part: Part, plan: _Plan, found: Iterator[Array]) -> Partial:
    """A part's results, taken from all of them."""
    take = lambda n: list(itertools.islice(found, n))
    o = assemble(plan.value.pieces, take(len(plan.value.pieces)))
    if zeros := take(plan.value.groups):
        zero = jnp.stack([x[..., 0] for x in zeros], axis=-1)
        o = o + jnp.repeat(zero, o.shape[-1] // len(zeros), axis=-1)
    l, m = take(2)
    by_row = lambda x: x.reshape(*part.length.shape, *x.shape[1:])
    logits = tuple(by_row(x[..., : part.capacity]) for x in take(int(plan.logits)))
    return Partial(by_row(o), by_row(l[..., 0]), by_row(m[..., 0]), logits)


def _kernel(*refs: Any, plans: Sequence[_Plan], scale: float, cap: float | None, windowed: bool) -> None:
    each = iter(refs)
    take = lambda n: list(itertools.islice(each, n))
    scalars = take(1 + 2 * len(plans))
    inputs = [(take(plan.beside.num_leaves), take(plan.each * plan.tree.num_leaves)) for plan in plans]
    outs = [(take(plan.kept), take(int(plan.logits))) for plan in plans]
    scratch = [take(plan.kept) for plan in plans]
    row, step = pl.program_id(0), pl.program_id(1)

    @pl.when(step == 0)
    def _() -> None:
        for *sums, largest in scratch:
            for ref in sums:
                ref[...] = jnp.zeros_like(ref)
            largest[...] = jnp.full_like(largest, EMPTY)

    for plan, (beside, pages), out, kept in zip(plans, inputs, outs, scratch, strict=True):
        logits = out[1]
        length = scalars[plan.scalars + 1][row]
        after = scalars[0][row] if windowed else None
        of_part = functools.partial(
            _attend, plan, plan.own(step), length, after, beside, pages, logits, kept, scale, cap
        )
        pl.when((step >= plan.start) & (step < plan.start + plan.steps))(of_part)

    @pl.when(step == pl.num_programs(1) - 1)
    def _() -> None:
        for (results, _), kept in zip(outs, scratch, strict=True):
            for out, ref in zip(results, kept, strict=True):
                out[0] = ref[...]


def _attend(plan: _Plan, step: Array, length: Array, after: Array | None, beside: list, pages: list, logits: list,
            kept: list, scale: float, cap: float | None) -> None:  # fmt: skip
    """A step of a part: its pages."""
    first = step * plan.each * plan.page
    accs, (*zeros, l_ref, m_ref) = kept[: len(plan.value.pieces)], kept[len(plan.value.pieces) :]
    for ref in logits:
        ref[...] = jnp.full_like(ref, EMPTY)

    @pl.when(first < length)
    def _() -> None:
        other = jax.tree.unflatten(plan.beside, beside)
        expand, place = other.get("expand"), other.get("place")
        query = [ref[0] if expand else ref[0].astype(plan.key.dtype) for ref in other["queries"]]
        for j in range(plan.each):
            leaves = pages[j * plan.tree.num_leaves : (j + 1) * plan.tree.num_leaves]
            k, v, pos = jax.tree.unflatten(plan.tree, leaves)
            slots = slice(j * plan.page, (j + 1) * plan.page)
            slot = first + j * plan.page + jax.lax.broadcasted_iota(jnp.int32, (1, plan.page), 1)
            where = place[0, :, slots] if place is not None else slot if pos is None else pos[0]
            keys = Page(k, plan.across[0], plan.key)
            s = scale * (tpu_expand.scores(keys, query[0], expand, where) if expand else _scores(keys, query))
            s = soft_cap(s, cap)
            seen = slot < length
            if after is not None:
                seen &= where > after
            s = jnp.where(seen, s, EMPTY)
            for ref in logits:
                ref[0, :, slots] = s
            m = jnp.maximum(m_ref[...], s.max(axis=1, keepdims=True))
            old, p = jnp.exp(m_ref[...] - m), jnp.where(seen, jnp.exp(s - m[:, :1]), 0.0)
            l_ref[...] = l_ref[...] * old + p.sum(axis=1, keepdims=True)
            m_ref[...] = m
            _add_values(Page(v, plan.across[1], plan.value), p, old, accs, zeros)


def _scores(page: Page, query: list[Array]) -> Float[Array, "G page"]:
    """Before the scale of logits."""
    read, total = page.read, None
    for group in range(max(read.groups, 1)):
        own = [(p, x) for p, x in zip(read.pieces, query, strict=True) if p.group == group]
        part = functools.reduce(jnp.add, (dot(x, page.numbers(p), (1, 1 - page.axis)) * p.weight for p, x in own))
        if read.groups:
            low = (x.astype(jnp.float32) for p, x in own if p.weight == 1)
            sums = functools.reduce(jnp.add, (x.sum(axis=1, keepdims=True) for x in low))
            part = page.scale(group) * part + page.zero(group) * sums
        total = part if total is None else total + part
    return total  # pyright: ignore[reportReturnType]


def _add_values(page: Page, p: Array, old: Array, accs: Sequence[Any], zeros: Sequence[Any]) -> None:
    """Values and zero terms of a page, added to the sums."""
    read = page.read
    weights = [p * page.scale(group) for group in range(read.groups)] or [p]
    for group, ref in enumerate(zeros):
        ref[...] = ref[...] * old + (p * page.zero(group)).sum(axis=1, keepdims=True)
    for piece, acc in zip(read.pieces, accs, strict=True):
        weight = (weights[piece.group] * piece.weight).astype(read.dtype)
        acc[...] = acc[...] * old[:, :1] + dot(weight, page.numbers(piece), (1, page.axis))
