"""Top-k retention on GPUs: Pallas, lowered by Triton.

The least priority that is kept is found digit by digit, the highest first: eight passes, each of which counts how many
priorities, seen as integers in the same order, reach each value that the next four bits can have. A row is shared by
many programs, so that a batch of one fills the chip; each of them reads what all counted in the pass before, hence
nothing runs between two passes. One more pass writes which tokens are kept, in the order of time, each program from
where those before it end. Only these are sorted, by XLA. Then keys, values, positions and scores are copied at once.

No program holds more than a part of a row, so rows may be of any length.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Float, Int, Shaped

from pallas_kernels.blocks import powers
from pallas_kernels.topk_retain.reference import LEAST, Kept, check, ordered

BITS = 4  # of a digit
VALUES = 1 << BITS
AT_ONCE = 128  # priorities that are compared at once with all values of a digit


def topk_retain(
    priority: Float[Array, "B K T"],
    count: Int[Array, "B K"],
    k: Shaped[Array, "B K T R"],
    v: Shaped[Array, "B K T W"],
    pos: Int[Array, "B K T"],
    stat: Float[Array, "B K T"],
    *,
    n: int,
    chunk: int = 2048,
    block: int = 64,
    interpret: bool = False,
) -> Kept:
    """The best tokens of each row: the contract of `reference.topk_retain`.

    Args:
      chunk: tokens of a program that counts, a power of two, at least 128.
      block: slots of a program that copies, a power of two.
      interpret: run without a GPU, slowly.
    """
    check(n, priority)
    b, heads, t = priority.shape
    flat = lambda x: x.reshape(b * heads, *x.shape[2:])
    count = jnp.clip(flat(count), 0, n)
    index = _select(flat(priority).astype(jnp.float32), count, n, chunk, interpret)
    sources = [flat(x) for x in (k, v, pos, stat)]
    found = pl.pallas_call(
        functools.partial(_copy, block=block, tokens=t),
        out_shape=[jax.ShapeDtypeStruct((b * heads, n, *x.shape[2:]), x.dtype) for x in sources],
        grid=(b * heads, pl.cdiv(n, block)),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        name="topk_retain_copy",
    )(index, *sources)
    return Kept(*(x.reshape(b, heads, *x.shape[1:]) for x in (index, *found)))


def _select(priority: Float[Array, "r T"], count: Int[Array, " r"], n: int, chunk: int, interpret: bool) -> Array:
    """Indices `[r n]` of the best tokens, best first; T in slots that stay empty."""
    rows, t = priority.shape
    parts = pl.cdiv(t, chunk)
    call = functools.partial(
        pl.pallas_call,
        grid=(rows, parts),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
    )
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    state = ints(rows), ints(rows, parts), ints(rows, parts, VALUES)
    pass_ = call(functools.partial(_count, chunk=chunk), out_shape=state, name="topk_retain_count")

    def narrow(i: Array | int, state: tuple) -> tuple:
        shift = jnp.full((1,), 32 - BITS, jnp.int32) - BITS * i
        return tuple(pass_(priority, count, shift, *state))

    # As if a pass before the first had found no priority above the least.
    start = tuple(jnp.full(x.shape, fill, x.dtype) for x, fill in zip(state, (LEAST, 0, -1), strict=True))
    state = jax.lax.fori_loop(0, 32 // BITS, narrow, start)
    # One slot more, where the interpreter writes what is not kept.
    wide = [ints(rows, n + 1)] * 2
    place = call(functools.partial(_place, chunk=chunk, n=n), out_shape=wide, name="topk_retain_place")
    index, key = (x[:, :n] for x in place(priority, count, *state))
    filled = jnp.arange(n) < count[:, None]
    falling = jnp.where(filled, ~key, ~jnp.int32(LEAST))
    return jax.lax.sort((falling, jnp.where(filled, index, t)), num_keys=1, is_stable=True)[1]


def _keys(priority_ref: Any, row: Array, start: Array, size: int) -> Int[Array, " size"]:
    """A part of a row's priorities as integers; the least one behind the row's end."""
    t = priority_ref.shape[1]
    at = priority_ref.at[row, pl.ds(start, size)]
    if t % size == 0:
        return ordered(at[...])
    real = start + jnp.arange(size) < t
    return jnp.where(real, ordered(plt.load(at, mask=real, other=0)), jnp.full((size,), LEAST, jnp.int32))


def _parts(ref: Any, row: Array) -> Int[Array, "parts *rest"]:
    """What the programs of a row wrote, padded with zeros to a power of two."""
    _, parts, *rest = ref.shape
    shape = (1 << (parts - 1).bit_length(), *rest)
    # Not as a slice, which must not end behind the axis.
    part, *others = (jax.lax.broadcasted_iota(jnp.int32, shape, i) for i in range(len(shape)))
    at = ref.at[(row, part, *others)]
    return at[...] if shape[0] == parts else plt.load(at, mask=part < parts, other=0)


def _digit(counts: Int[Array, "parts values"], count: Array) -> Int[Array, ""]:
    """The largest value of a digit that at least `count` priorities reach; `counts` are those of 1, 2, ..."""
    enough = (counts.sum(axis=0) >= count).astype(jnp.int32).sum()
    return jnp.minimum(enough, VALUES - 1)


def _count(priority_ref: Any, count_ref: Any, shift_ref: Any, low_ref: Any, least_ref: Any, counts_ref: Any,
           new_low_ref: Any, new_least_ref: Any, new_counts_ref: Any, *, chunk: int) -> None:  # fmt: skip
    """Fix a digit by what the last pass counted, and count for the next one."""
    row, part = pl.program_id(0), pl.program_id(1)
    shift = shift_ref[0]
    digit = _digit(_parts(counts_ref, row), count_ref[row])
    low = low_ref[row] + (digit << BITS << shift)
    # "Above" instead of "at least", because the bound behind the last value of the first digit is no integer.
    bound = low - 1 + ((1 + jnp.arange(VALUES, dtype=jnp.int32)) << shift)

    def add(i: Array, total: tuple[Array, Array]) -> tuple[Array, Array]:
        key = _keys(priority_ref, row, part * chunk + i * AT_ONCE, AT_ONCE)
        least, counts = total
        reaches = (key[:, None] > bound[None, :]).astype(jnp.int32)
        return least + (key >= low).astype(jnp.int32), counts + reaches

    nothing = jnp.zeros((AT_ONCE,), jnp.int32), jnp.zeros((AT_ONCE, VALUES), jnp.int32)
    least, counts = jax.lax.fori_loop(0, chunk // AT_ONCE, add, nothing)
    new_low_ref[row] = low  # as all programs of the row say
    new_least_ref[row, part] = least.sum()
    new_counts_ref.at[row, part, :][...] = counts.sum(axis=0)


def _place(priority_ref: Any, count_ref: Any, low_ref: Any, least_ref: Any, counts_ref: Any, index_ref: Any,
           key_ref: Any, *, chunk: int, n: int) -> None:  # fmt: skip
    """Write the tokens that are kept and their priorities as integers, in the order of time."""
    row, part = pl.program_id(0), pl.program_id(1)
    count, counts = count_ref[row], _parts(counts_ref, row)
    digit = _digit(counts, count)
    threshold = low_ref[row] + digit
    value = jnp.arange(VALUES, dtype=jnp.int32)[None, :]
    column = lambda at: jnp.where(value == at, counts, jnp.zeros_like(counts)).sum(axis=1)
    above = column(digit)  # in each part
    ties = jnp.where(digit == 0, _parts(least_ref, row), column(digit - 1)) - above
    before = jnp.arange(above.shape[0]) < part
    sum_before = lambda x: jnp.where(before, x, jnp.zeros_like(x)).sum()
    wanted, tied = count - above.sum(), sum_before(ties)  # ties that are kept, and those in the parts before

    key = _keys(priority_ref, row, part * chunk, chunk)
    tie = key == threshold
    keep = (key > threshold) | (tie & (tied + jnp.cumsum(tie.astype(jnp.int32)) <= wanted))
    slot = sum_before(above) + jnp.minimum(tied, wanted) + jnp.cumsum(keep.astype(jnp.int32)) - 1
    slot = jnp.where(keep, slot, jnp.full_like(slot, n))
    plt.store(index_ref.at[row, slot], part * chunk + jnp.arange(chunk, dtype=jnp.int32), mask=keep)
    plt.store(key_ref.at[row, slot], key, mask=keep)


def _copy(index_ref: Any, k_ref: Any, v_ref: Any, pos_ref: Any, stat_ref: Any, k_out: Any, v_out: Any, pos_out: Any,
          stat_out: Any, *, block: int, tokens: int) -> None:  # fmt: skip
    """Copy what a block of slots keeps."""
    row, n, first = pl.program_id(0), index_ref.shape[1], pl.program_id(1) * block
    slots = pl.ds(first, block)
    inside = None if n % block == 0 else first + jnp.arange(block) < n
    token = plt.load(index_ref.at[row, slots], mask=inside, other=None if inside is None else tokens)
    kept = token < tokens
    token = jnp.where(kept, token, jnp.zeros_like(token))
    wide = lambda x, width: None if x is None else jnp.broadcast_to(x[:, None], (block, width))
    for source, out in ((k_ref, k_out), (v_ref, v_out)):
        for start, width in powers(source.shape[2]):
            column = start + jax.lax.broadcasted_iota(jnp.int32, (block, width), 1)
            x = plt.load(source.at[row, wide(token, width), column], mask=wide(kept, width), other=0)
            plt.store(out.at[row, slots, pl.ds(start, width)], x, mask=wide(inside, width))
    for source, out, empty in ((pos_ref, pos_out, -1), (stat_ref, stat_out, 0)):
        plt.store(out.at[row, slots], plt.load(source.at[row, token], mask=kept, other=empty), mask=inside)
