"""The kernels that are measured: an entry of `KERNELS` for each, with what it is given, what it must move, its rivals.

Another kernel is a function that makes a `Case`, and a line of `KERNELS`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from kvjax.bench.rivals import DECODE, Call, prompt_attention
from kvjax.bench.shapes import STORES, Shape
from kvjax.cache import pages
from kvjax.cache.quantize import named
from pallas_kernels import prefill_attention, segment_merge
from pallas_kernels.decode_attention import PagedKV, decode_attention
from pallas_kernels.implementation import Implementation
from pallas_kernels.prefill_scores import column_max, column_sums
from pallas_kernels.topk_retain import topk_retain

MIKV = (("dense", 0.2), ("int2", 0.8))  # tiers and their shares of the tokens
Settings = Mapping[str, Any]
Make = Callable[[Shape, str, DTypeLike], "KernelCase"]


class KernelCase(NamedTuple):
    """A kernel with its arguments.

    Attributes:
      run: the kernel as a function of arrays and `implementation=`.
      args: arrays.
      bytes: that are read and written at least.
      flop: of its products, a multiplication and an addition apart.
      rivals: by name, functions that make a `Call` or raise `NotImplementedError`.
      attention: the products [FLOP] of a rival of that name, which does something else.
    """

    run: Callable[..., Any]
    args: tuple[Any, ...]
    bytes: int
    flop: float
    rivals: dict[str, Callable[[], Call]] = {}  # noqa: RUF012  (never changed)
    attention: float = 0.0


class Kernel(NamedTuple):
    """An entry of the registry.

    Attributes:
      make: `(shape, store, dtype) -> Case`, on the device.
      stores: number formats that it is tried with; `("",)` = it reads none.
      prompt: works on prompts: tried with one.
      cpu: there is one in C++ for CPUs.
      tries: settings that `bench tune` compares, by implementation.
    """

    make: Make
    stores: tuple[str, ...] = ("",)
    prompt: bool = False
    cpu: bool = False
    tries: dict[Implementation, Sequence[Settings]] = {}  # noqa: RUF012  (never changed)


def _normal(seed: int, *shape: int, dtype: DTypeLike) -> Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def _size(*trees: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(trees))


# Decode attention


def _tier(shape: Shape, store: str, slots: int, dtype: DTypeLike) -> tuple[Any, Any, Array, Array]:
    """Full rows of random codes in shuffled pages: keys, values, table, length."""
    (k, _, h), codec = shape.heads, named(store)
    page = max(pages.page_size(slots), codec.key.run)
    each = pages.pages_for(slots, page)
    size = shape.batch * k * each
    draw = lambda of, seed: jax.jit(lambda: of.encode(_normal(seed, size, page, h, dtype=dtype)))()
    table = jax.random.permutation(jax.random.key(2), size).reshape(shape.batch, k, each).astype(jnp.int32)
    return draw(codec.key, 0), draw(codec.value, 1), table, jnp.full((shape.batch, k), slots, jnp.int32)


def attention(shape: Shape, store: str, dtype: DTypeLike) -> KernelCase:
    """One query per row over a full cache: of one store, or MiKV's two tiers."""
    (k, g, h), parts = shape.heads, MIKV if store == "mikv" else ((store, 1.0),)
    slots = [max(1, round(share * shape.context)) for _, share in parts]
    tiers = [_tier(shape, name, n, dtype) for (name, _), n in zip(parts, slots, strict=True)]
    q = _normal(3, shape.batch, k, g, h, dtype=dtype)

    codecs = [named(name) for name, _ in parts]

    def run(q: Array, tiers: list, implementation: Implementation) -> Array:
        formats = [(codec.key.decode, codec.value.decode) for codec in codecs]
        read = [
            PagedKV(q, *tier, decode_key=key, decode_value=value)
            for tier, (key, value) in zip(tiers, formats, strict=True)
        ]
        whole = decode_attention(read, scale=h**-0.5, implementation=implementation)
        return whole.o / whole.l[..., None]

    def rival(decode: Callable[..., Call]) -> Call:
        keys, values, table, _ = tiers[0]
        dense = lambda x: x[table].reshape(shape.batch, k, -1, h)[:, :, : shape.context]
        return decode(q, dense(keys), dense(values))

    others = {name: functools.partial(rival, each.decode) for name, each in DECODE.items()}
    counted = _size(q, tiers) + 4 * q.size
    return KernelCase(run, (q, tiers), counted, 4.0 * q.size * shape.context, others if store == "dense" else {})


# Scores of a prompt


def scores(shape: Shape, store: str, dtype: DTypeLike, *, recent: int | None = None) -> KernelCase:
    """Column sums of attention over a prompt of random queries and keys; beside attention itself."""
    (k, g, h), t, b = shape.heads, shape.context, shape.batch
    q, key, value = (_normal(i, b, t, n, h, dtype=dtype) for i, n in enumerate((k * g, k, k)))
    lse = jnp.broadcast_to(jnp.log(jnp.arange(1.0, t + 1)) + 0.5, (b, k * g, t)).astype(jnp.float32)  # in the mean

    def run(q: Array, key: Array, lse: Array, length: Array, implementation: Implementation) -> Array:
        return column_sums(q, key, lse, length, scale=h**-0.5, recent=recent, implementation=implementation)

    queries = t if recent is None else min(recent, t)
    read = _size(key) + (_size(q, lse) * queries) // t + _size(lse)
    pairs = queries * (2 * t - queries + 1) / 2
    others = {"attention": lambda: prompt_attention(q, key, value)}
    args, heads = (q, key, lse, jnp.full((b,), t, jnp.int32)), h * k * g * b
    return KernelCase(run, args, read, 2.0 * pairs * heads, others, 2.0 * t * t * heads)


def maxima(shape: Shape, store: str, dtype: DTypeLike, *, chunk: int = 2048) -> KernelCase:
    """Maxima of attention within chunks of a prompt of random queries and keys; beside attention itself."""
    (k, g, h), t, b = shape.heads, shape.context, shape.batch
    chunk = min(chunk, t)
    tokens = -(-t // chunk) * chunk
    q, key, value = (
        _normal(i, b, size, n, h, dtype=dtype) for i, (n, size) in enumerate(((k * g, tokens), (k, t), (k, t)))
    )
    others, gain = jnp.ones((b, k * g, tokens), jnp.float32), jnp.zeros((b, tokens), jnp.float32)

    def run(*args: Array, implementation: Implementation) -> Array:
        return column_max(*args, chunk=chunk, scale=h**-0.5, implementation=implementation)

    args = (q, key, others, gain, jnp.full((b,), t, jnp.int32))
    rivals, heads = {"attention": lambda: prompt_attention(q[:, :t], key, value)}, h * k * g * b
    return KernelCase(
        run, args, _size(args) + 4 * b * k * g * t, 2.0 * tokens * chunk * heads, rivals, 2.0 * t * t * heads
    )


# Segments


def segments(shape: Shape, store: str, dtype: DTypeLike, *, window: int = 12, rate: float = 8.0) -> KernelCase:
    """DMC's means of segments over a prompt, at a given rate of merging."""
    (k, _, h), t, b = shape.heads, shape.context, shape.batch
    x, weight = _normal(0, b, t, k, h, dtype=dtype), jnp.ones((b, t, k), jnp.float32)
    merged = jax.random.bernoulli(jax.random.key(1), 1 - 1 / rate, (b, t, k)).astype(jnp.float32)

    def run(x: Array, merged: Array, weight: Array, implementation: Implementation) -> Array:
        return segment_merge.pool(x, merged, weight, window=window, implementation=implementation)

    return KernelCase(run, (x, merged, weight), _size(x, x, merged, weight), 2.0 * window * x.size)


# A prompt's own attention, and what is kept of it


def prompt(shape: Shape, store: str, dtype: DTypeLike) -> KernelCase:
    """Causal attention over a prompt, with log-sum-exps."""
    (k, g, h), t, b = shape.heads, shape.context, shape.batch
    vectors = [_normal(i, b, t, n, h, dtype=dtype) for i, n in enumerate((k * g, k, k))]

    def run(*args: Array, implementation: Implementation) -> Array:
        return prefill_attention.attention(*args, implementation=implementation)[0]

    args = (*vectors, jnp.full((b,), t, jnp.int32))
    return KernelCase(run, args, _size(vectors, vectors[0]), 2.0 * t * t * h * k * g * b)


def retention(shape: Shape, store: str, dtype: DTypeLike, *, keep: float = 0.2) -> KernelCase:
    """The best fifth of a prompt's tokens, and their copy."""
    (k, _, h), t, b = shape.heads, shape.context, shape.batch
    key, value = (_normal(i, b, k, t, h, dtype=dtype) for i in range(2))
    priority, n = jax.random.uniform(jax.random.key(2), (b, k, t)), max(1, round(keep * t))
    pos = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), priority.shape)

    def run(priority: Array, count: Array, *vectors: Array, implementation: Implementation) -> Array:
        kept = topk_retain(priority, count, *vectors, n=n, implementation=implementation)
        return jnp.concatenate([kept.k, kept.v], axis=-1)

    args = (priority, jnp.full((b, k), n, jnp.int32), key, value, pos, priority)
    return KernelCase(run, args, _size(priority) + 2 * round(keep * _size(key, value, pos, priority)), 0.0)


def _blocks(*sizes: int) -> list[Settings]:
    return [{"block": size} for size in sizes]


_SQUARE = [{"block": block, "queries": queries} for block in (32, 64, 128) for queries in (32, 64, 128)]
KERNELS = {
    "decode_attention": Kernel(
        attention,
        STORES,
        cpu=True,
        tries={
            "xla": _blocks(128, 256, 512, 1024, 2048),
            "gpu": _blocks(32, 64, 128, 256),
            "tpu": _blocks(512, 1024, 2048, 4096),
            "interpret": _blocks(32, 64),
        },
    ),
    "column_sums": Kernel(
        scores,
        prompt=True,
        tries={
            "xla": _blocks(128, 256, 512, 1024),
            "gpu": _SQUARE,
            "tpu": _blocks(256, 512, 1024, 2048),
            "interpret": _blocks(32, 64),
        },
    ),
    "column_max": Kernel(maxima, prompt=True, tries={"gpu": _SQUARE, "tpu": _blocks(256, 512, 1024, 2048)}),
    "window_sums": Kernel(functools.partial(scores, recent=32), prompt=True),
    "prefill_attention": Kernel(prompt, prompt=True, cpu=True),
    "topk_retain": Kernel(retention, prompt=True),
    "segment_merge": Kernel(segments, prompt=True),
}
