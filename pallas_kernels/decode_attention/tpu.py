"""Decode attention on TPUs: Pallas, lowered by Mosaic.

A program reads a row, part after part, a block of a few pages at a time. Pools stay where they are: while a block is
attended, the copies of the next one are under way, of the row's next pages or of the next row's first ones. The kernel
starts them itself, because an operand for each page costs some 100 instruction bundles of bookkeeping per step, more
than the attention of its slots. Pages behind a row's end are not read.

Codes become numbers in vector memory, piece by piece (`pallas_kernels.codes.pieces`), since a piece needs no shuffle of
lanes. They are not scaled: with number = code x scale + zero,

    q . key      = scale (q . codes) + zero (sum of q)                  once per slot and group
    sum p value  = sum (p scale) codes + sum p zero                     once per slot and group

Bytes are masked where their bits lie and read with a sign, which leaves a factor and an offset for the sums
(`tpu_page.affine`).

A TPU's memory has rows of 128 lanes. XLA lays a pool's narrow vectors across its slots instead of padding them, so here
such pages are seen with slots on the lanes, `[R page]`; the transposition costs nothing.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from pallas_kernels.codes import Piece, assemble, to_numbers
from pallas_kernels.decode_attention import tpu_expand, tpu_runs
from pallas_kernels.decode_attention.formats import Format, format_of
from pallas_kernels.decode_attention.reference import EMPTY, KeyExpansion, PagedKV, Partial, merge
from pallas_kernels.decode_attention.tpu_page import Page, affine, dot, lines
from pallas_kernels.pools import lies_across
from pallas_kernels.soft_cap import soft_cap

SLOTS = 2048  # of a block
PAGES = 32  # of a block at most: each is copied by itself
VMEM = 64 << 20  # bytes that a kernel may use
LOGITS = 16 << 20  # bytes of a row's logits at most
SMEM = 768 << 10  # bytes that tables may use


def decode_attention(
    parts: Sequence[PagedKV],
    *,
    scale: float,
    after: Int[Array, "B K"] | None = None,
    cap: float | None = None,
    place: Callable[[Int[Array, "B K S"]], Int[Array, "B K S"]] | None = None,
    expand: KeyExpansion | None = None,
    with_logits: bool = False,
    block: int | None = None,
    interpret: Any = False,
) -> Partial:
    """Attention of one query per row: the contract of `reference.decode_attention`, in one launch.

    Args:
      block: slots of a block, rounded to whole pages; None = 2,048, 512 of keys that are expanded.
      interpret: run without a TPU, slowly: True, or `pltpu.InterpretParams`.
    """
    rows, g = parts[0].length.size, parts[0].q.shape[2]
    block = block or (tpu_expand.SLOTS if expand is not None and expand.up is not None else SLOTS)
    if (bytes_ := sum(4 * part.table.size for part in parts)) > SMEM:
        raise NotImplementedError(f"page tables of {bytes_} bytes exceed scalar memory: use larger pages")
    flat = lambda x: x.reshape(rows, *x.shape[2:])
    scalars = [jnp.full((rows,), -1, jnp.int32) if after is None else flat(after)]
    cores = 2 - rows % 2  # programs of one core follow each other, so that each may fetch for the next
    of_row = functools.partial(_of_row, rows // cores)
    plans: list[_Plan] = []
    inputs: list[Array] = []
    in_specs: list[pl.BlockSpec] = []
    scratch: list[Any] = [pltpu.SMEM((len(parts),), jnp.int32)]
    if expand is not None:
        scale *= expand.rotation.magnitude
    for part in parts:
        pools = _pools(part, place is None and (after is not None or expand is not None))
        plan = _plan(part, pools, block, with_logits)
        if plan.key.run and expand is not None:
            raise NotImplementedError("low-rank or unrotated keys with scales per channel are for xla only")
        if plan.logits and (bytes_ := 4 * g * plan.steps * plan.block) > LOGITS:
            raise NotImplementedError(f"logits of {bytes_} bytes per row exceed vector memory")
        # An entry behind a row's end may name no page; an empty row names the first.
        scalars += [jnp.clip(flat(part.table), 0, part.size - 1), flat(part.length)]
        arrays, specs = _beside(part, plan, place, expand, of_row)
        leaves = jax.tree.leaves(pools)
        inputs += [*jax.tree.leaves(arrays), *leaves]
        in_specs += [*jax.tree.leaves(specs), *[pl.BlockSpec(memory_space=pl.ANY)] * len(leaves)]
        scratch += [pltpu.VMEM((2, plan.each, *x.shape[1:]), x.dtype) for x in leaves]
        scratch.append(pltpu.SemaphoreType.DMA((2,)))
        plans.append(plan._replace(beside=jax.tree.structure(arrays)))
    outs = [shape for plan in plans for shape in _results(plan, g)]
    found = iter(
        pl.pallas_call(
            functools.partial(_kernel, plans=plans, g=g, scale=scale, cap=cap, windowed=after is not None),
            out_shape=[jax.ShapeDtypeStruct((rows, *shape), jnp.float32) for shape in outs],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=(cores, rows // cores),
                in_specs=in_specs,
                out_specs=[of_row(*shape) for shape in outs],
                scratch_shapes=scratch,
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"),
                vmem_limit_bytes=VMEM,
                disable_bounds_checks=True,  # pages are clipped; two checks take longer than to start a copy
            ),
            interpret=interpret,
            name="decode_attention",
        )(*scalars, *inputs)
    )
    return merge(
        [
            _partial(part, plan, itertools.islice(found, 1 + plan.logits))
            for part, plan in zip(parts, plans, strict=True)
        ]
    )


class _Plan(NamedTuple):
    """How a part is read."""

    key: Format
    value: Format
    across: tuple[bool, bool]  # whether pages of keys, and of values, have their slots on the lanes
    tree: Any  # of a page's arrays
    page: int  # slots
    each: int  # pages of a block
    steps: int  # blocks of a full row
    logits: bool
    beside: Any = None  # tree of its other operands

    @property
    def block(self) -> int:
        """Slots of a block."""
        return self.each * self.page

    @property
    def pieces(self) -> list[Piece]:
        """Of values, as they are summed."""
        return [line.piece for line in lines(self.value.pieces, self.across[1])]


def _pools(part: PagedKV, windowed: bool) -> tuple:
    """Keys, values and positions as the kernel's pages are cut from them."""
    turned = lambda pool: jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2) if lies_across(x) else x, pool)
    return turned(part.k), turned(part.v), part.pos[:, None] if windowed and part.pos is not None else None


def _plan(part: PagedKV, pools: tuple, block: int, logits: bool) -> _Plan:
    key = format_of("keys", part.decode_key, part.k, part.q.dtype)
    value = format_of("values", part.decode_value, part.v, part.q.dtype)
    if value.run:
        raise NotImplementedError("values with scales per channel are for xla only")
    if key.run:
        key = key._replace(pieces=tpu_runs.cut(key, part.page))
    width = part.table.shape[-1]
    each = max(1, min(block // part.page, width, PAGES))
    k, v = (lies_across(pool["codes"] if isinstance(pool, dict) else pool) for pool in (part.k, part.v))
    return _Plan(key, value, (k, v), jax.tree.structure(pools), part.page, each, pl.cdiv(width, each), logits)


def _of_row(each: int, *shape: int) -> pl.BlockSpec:
    """A row's part of an array; a core has `each` rows."""
    return pl.BlockSpec((1, *shape), lambda core, i, *_: (core * each + i, *[0] * len(shape)))


def _beside(
    part: PagedKV, plan: _Plan, place: Callable[[Array], Array] | None, expand: KeyExpansion | None, of_row: Callable
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a part's pages are read with, and how: queries, places, what keys are expanded by."""
    heads = part.q.shape[1]
    q = part.q.reshape(-1, *part.q.shape[2:])
    q = tpu_runs.queries(q, plan.key.run, plan.page) if plan.key.run else q if expand else q.astype(plan.key.dtype)
    arrays: dict[str, Any] = {"query": q}
    if place is not None:
        found = part.places(place).reshape(-1, 1, part.capacity)
        arrays["place"] = jnp.pad(found, ((0, 0), (0, 0), (0, plan.steps * plan.block - part.capacity)))
    specs = {name: of_row(*x.shape[1:]) for name, x in arrays.items()}
    if expand is not None:
        arrays["expand"] = tpu_expand.operands(expand, plan.key)
        row = lambda core, i: of_row().index_map(core, i)[0]
        of_head = lambda x: pl.BlockSpec((1, *x.shape[1:]), lambda *at: (row(*at[:2]) % heads, *[0] * (x.ndim - 1)))
        specs["expand"] = jax.tree.map(of_head, arrays["expand"])
        b, k, half, _ = arrays["expand"]["frequency"].shape
        specs["expand"]["frequency"] = pl.BlockSpec(
            (1, 1, half, 1), lambda *at: (row(*at[:2]) // heads % b, row(*at[:2]) % heads % k, 0, 0)
        )
    return arrays, specs


def _results(plan: _Plan, g: int) -> list[tuple[int, ...]]:
    """Shapes of what is written of a row: sums of values and of zero terms, weights, the largest logit; logits."""
    kept = len(plan.pieces) + plan.value.groups + 2
    found: list[tuple[int, ...]] = [(kept, g, max(p.width for p in plan.pieces))]
    return [*found, (g, plan.steps * plan.block)] if plan.logits else found


def _partial(part: PagedKV, plan: _Plan, found: Iterable[Array]) -> Partial:
    """A part's results, of what was written."""
    sums, *logits = found
    o = assemble(plan.pieces, [sums[:, i, :, : p.width] for i, p in enumerate(plan.pieces)])
    *zeros, l, m = (sums[:, i, :, 0] for i in range(len(plan.pieces), sums.shape[1]))
    if zeros:
        o = o + to_numbers(jnp.stack(zeros, axis=-1), plan.value.size, plan.value.width)
    by_row = lambda x: x.reshape(*part.length.shape, *x.shape[1:])
    return Partial(by_row(o), by_row(l), by_row(m), tuple(by_row(x[..., : part.capacity]) for x in logits))


def _kernel(*refs: Any, plans: Sequence[_Plan], g: int, scale: float, cap: float | None, windowed: bool) -> None:
    each = iter(refs)
    take = lambda n: list(itertools.islice(each, n))
    after, *scalars = take(1 + 2 * len(plans))
    inputs = [(take(plan.beside.num_leaves), take(plan.tree.num_leaves)) for plan in plans]
    outs = [take(1 + plan.logits) for plan in plans]
    (turns,) = take(1)
    core, i, rows = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    row, fetches = core * rows + i, []
    for p, (plan, given) in enumerate(zip(plans, inputs, strict=True)):
        held, done = take(plan.tree.num_leaves), take(1)[0]
        fetches.append(_Fetch(plan, given[1], held, done, *scalars[2 * p : 2 * p + 2]))

    @pl.when(i == 0)
    def _() -> None:
        for p, fetch in enumerate(fetches):
            turns[p] = 0
            fetch.clear()
            fetch.start(row, 0, 0)

    for p, (plan, fetch, given, out) in enumerate(zip(plans, fetches, inputs, outs, strict=True)):
        other, turn, blocks = jax.tree.unflatten(plan.beside, given[0]), turns[p], fetch.blocks(row)
        for ref in out[1:]:
            ref[...] = jnp.full_like(ref, EMPTY)

        def attend(index: Array, sums: list, plan: Any = plan, fetch: Any = fetch, other: Any = other, turn: Any = turn,
                   blocks: Any = blocks, out: Any = out) -> list:  # fmt: skip
            slot, last = (turn + index) % 2, index + 1 == blocks

            @pl.when(~last | (i + 1 < rows))
            def _() -> None:
                fetch.start(jnp.where(last, row + 1, row), jnp.where(last, 0, index + 1), 1 - slot)

            fetch.wait(row, index, slot)
            floor = after[row] if windowed else None
            return _attend(plan, index, fetch.length[row], floor, other, fetch.pages(slot), out[1:], sums, scale, cap)

        widths = [*(piece.width for piece in plan.pieces), *[1] * (plan.value.groups + 1)]
        start = [jnp.zeros((g, width), jnp.float32) for width in widths]
        sums = jax.lax.fori_loop(0, blocks, attend, [*start, jnp.full((g, 1), EMPTY, jnp.float32)])
        turns[p] = turn + blocks
        for at, x in enumerate(sums):
            out[0][0, at, :, : x.shape[1]] = x


class _Fetch:
    """Copies of a part's pages, two blocks of which are in vector memory."""

    def __init__(self, plan: _Plan, pools: list, held: list, done: Any, table: Any, length: Any):
        self._plan, self._pools, self._held, self._done = plan, pools, held, done
        self._table, self.length = table, length

    def clear(self) -> None:
        """What no page is copied to must be a number: it meets weights of 0."""
        _, values, _ = jax.tree.unflatten(self._plan.tree, self._held)

        def clear(j: Array, _: Any) -> None:
            for ref in jax.tree.leaves(values):
                for slot in range(2):
                    ref[slot, j] = jnp.zeros(ref.shape[2:], ref.dtype)

        jax.lax.fori_loop(0, self._plan.each, clear, None)

    def blocks(self, row: Array) -> Array:
        """Of a row; an empty one has a block, too."""
        return jnp.maximum(pl.cdiv(self.length[row], self._plan.block), 1)

    def start(self, row: Array, block: Any, slot: Any) -> None:
        """Copy the pages of a block."""
        self._each(row, block, slot, lambda copy: copy.start())

    def wait(self, row: Array, block: Any, slot: Any) -> None:
        """Until they are there."""
        full = (block + 1) * self._plan.block <= self.length[row]

        @pl.when(full)
        def _() -> None:
            for ref in self._held:  # counts bytes
                pltpu.make_async_copy(ref.at[slot], ref.at[slot], self._done.at[slot]).wait()

        pl.when(~full)(lambda: self._each(row, block, slot, lambda copy: copy.wait()))

    def _each(self, row: Array, block: Any, slot: Any, do: Callable[[Any], None]) -> None:
        first, length = block * self._plan.each, self.length[row]
        for j in range(self._plan.each):

            @pl.when((first + j) * self._plan.page < length)
            def _(j: int = j) -> None:
                page = self._table[row, first + j]
                for pool, ref in zip(self._pools, self._held, strict=True):
                    do(pltpu.make_async_copy(pool.at[page], ref.at[slot, j], self._done.at[slot]))

    def pages(self, slot: Any) -> list:
        """Keys, values and positions of each page of a block."""
        views = ([ref.at[slot, pl.ds(j, 1)] for ref in self._held] for j in range(self._plan.each))
        return [jax.tree.unflatten(self._plan.tree, view) for view in views]


def _attend(plan: _Plan, block: Array, length: Array, after: Array | None, other: dict[str, Any], pages: list,
            logits: list, sums: list, scale: float, cap: float | None) -> list:  # fmt: skip
    """A block of a part: what was summed before, and now."""
    first, query, expand = pl.multiple_of(block * plan.block, plan.block), other["query"][0], other.get("expand")
    slot = first + jax.lax.broadcasted_iota(jnp.int32, (1, plan.block), 1)
    slots = pl.ds(first if plan.steps > 1 else 0, plan.block)
    of_page = lambda x, j: x[:, j * plan.page : (j + 1) * plan.page]
    where = slot
    if "place" in other:
        where = other["place"][0, :, slots]
    elif pages[0][2] is not None:
        where = jnp.concatenate([pos[0] for _, _, pos in pages], axis=1)

    score = _scores_of(plan, query, expand)
    s = [score(Page(k, plan.across[0], plan.key), of_page(where, j)) for j, (k, _, _) in enumerate(pages)]
    s = soft_cap(scale * jnp.concatenate(s, axis=1)[: sums[0].shape[0]], cap)
    seen = slot < length
    if after is not None:
        seen &= where > after
    s = jnp.where(seen, s, EMPTY)
    for ref in logits:
        ref[0, :, slots] = s
    *totals, l, largest = sums
    m = jnp.maximum(largest, s.max(axis=1, keepdims=True))
    old, p = jnp.exp(largest - m), jnp.where(seen, jnp.exp(s - m), 0.0)
    values = [Page(v, plan.across[1], plan.value) for _, v, _ in pages]
    new = _values(plan.value, plan.across[1], [(page, of_page(p, j)) for j, page in enumerate(values)])
    totals = [total * old + x for total, x in zip(totals, new, strict=True)]
    return [*totals, l * old + p.sum(axis=1, keepdims=True), m]


def _scores_of(plan: _Plan, query: Array, expand: dict[str, Any] | None) -> Callable[[Page, Array], Array]:
    """What gives the scores of a page whose slots are at some places."""
    if expand is not None:
        return lambda page, where: tpu_expand.scores(page, query, expand, where)
    if plan.key.run:
        return lambda page, _: tpu_runs.scores(page, query)
    scores = _scores(plan.key, plan.across[0], query)
    return lambda page, _: scores(page)


def _scores(read: Format, across: bool, query: Float[Array, "G R"]) -> Callable[[Page], Float[Array, "G page"]]:
    """What gives a page's scores, before the scale of logits."""
    parts = []
    whole: list[Any] = [0.0] * read.groups
    offsets: list[Any] = [0.0] * read.groups
    for line in lines(read.pieces, across):
        x = query[:, line.piece.start : line.piece.start + line.piece.width]
        for member in line.members:
            own, (factor, offset) = line.only(member, x), affine(read, member)
            parts.append((line, member, own, factor))
            if read.groups:
                total = own.astype(jnp.float32).sum(axis=1, keepdims=True)
                whole[member.group] += total if member.weight == 1 else 0.0
                offsets[member.group] += total * offset

    def scores(page: Page) -> Array:
        codes = {line: page.signed(line.piece) for line, *_ in parts}
        groups: list[Array] = []
        for group in range(max(read.groups, 1)):
            own = [(line, x, factor) for line, member, x, factor in parts if member.group == group]
            part = functools.reduce(jnp.add, (dot(x, codes[line], (1, 1 - page.axis)) * f for line, x, f in own))
            if read.groups:
                part = page.scale(group) * (part + offsets[group]) + page.zero(group) * whole[group]
            groups.append(part)
        return functools.reduce(jnp.add, groups)

    return scores


def _values(read: Format, across: bool, pages: Sequence[tuple[Page, Float[Array, "G page"]]]) -> list[Array]:
    """Weighted sums of values, line by line, and of zero terms, group by group."""
    add = lambda terms: functools.reduce(jnp.add, terms)
    weights = [[p * page.scale(group) for page, p in pages] for group in range(read.groups)] or [[p for _, p in pages]]
    total = [add(each).sum(axis=1, keepdims=True) for each in weights]
    found = []
    for line in lines(read.pieces, across):
        codes, parts = [page.signed(line.piece) for page, _ in pages], []
        for member in line.members:
            factor, offset = affine(read, member)
            scaled = [(x * factor).astype(read.dtype) for x in weights[member.group]]
            part = add(dot(x, y, (1, int(across))) for x, y in zip(scaled, codes, strict=True))
            parts.append(line.only(member, part + total[member.group] * offset if offset else part))
        found.append(add(parts))
    zeros = (add(p * page.zero(group) for page, p in pages) for group in range(read.groups))
    return [*found, *(zero.sum(axis=1, keepdims=True) for zero in zeros)]
