"""The kernels of decode attention against the reference, in the interpreters, and in the decode loop."""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvjax
from kvjax import methods
from kvjax.cache.quantize import named
from kvjax.errors import say_once
from kvjax.models.decoder import Decoder
from kvjax.spec import LatentSpec
from pallas_kernels.codes import pieces
from pallas_kernels.decode_attention import (
    PagedKV,
    decode_attention,
    gpu,
    gpu_block,
    gpu_expand,
    reference,
    tpu,
    tpu_runs,
)
from pallas_kernels.decode_attention.formats import Format
from pallas_kernels.packing import PLANES
from pallas_kernels.rotation import Rotation
from tests.lib import matrix, oracle
from tests.lib.strict import STRICT

STORES = (
    "dense", "fp8", "int8", "int4", "int3", "int2", "int8/int4", "int4:32", "int4:symmetric", "int2:16:symmetric",
)  # fmt: skip
DTYPES = (jnp.float32, jnp.bfloat16)
KERNELS = {"gpu": (gpu, True), "tpu": (tpu, True), "tpu checked": (tpu, STRICT)}


def case(
    *stores: str, dtype=jnp.float32, g: int = 3, h: int = 64, page: int = 16, m: int = 4, seed: int = 0,
    window: bool = False, lengths: Iterable[int] = (0, 1), **options,
):  # fmt: skip
    """Two sequences of two heads, a part for each store, and options."""
    rng, rows = np.random.default_rng(seed), (2, 2)
    shape = dict(dtype=dtype, g=g, h=h, page=page, m=m)
    # Parts after the first have a page more in a row, and other lengths.
    parts = [part(rng, x, lengths if i == 0 else (), **shape | {"m": m + i}) for i, x in enumerate(stores)]
    options |= dict(scale=h**-0.5)
    if window:
        options["after"] = jnp.asarray(rng.integers(0, 60, rows), jnp.int32)
    return parts, options


def part(
    rng: np.random.Generator, store: str, lengths: Iterable[int], *, dtype, g: int, h: int, page: int, m: int
) -> PagedKV:
    """Slots in shuffled pages; entries behind a row's end name no page."""
    rows, size, codec = (2, 2), 4 * m, named(store)
    drawn = lambda: jnp.asarray(rng.normal(size=(size, page, h)), dtype)
    k, v = (jax.jit(codec_.encode)(drawn()) for codec_ in (codec.key, codec.value))
    length = rng.integers(0, m * page + 1, rows).astype(np.int32)
    for row, n in zip(np.ndindex(rows), lengths, strict=False):
        length[row] = n
    table = rng.permutation(size).reshape(*rows, m).astype(np.int32)
    table = np.where(np.arange(m) * page < length[..., None], table, size)
    pos = rng.integers(0, 100, (size, page)).astype(np.int32)
    q = jnp.asarray(rng.normal(size=(*rows, g, h)), dtype)
    return PagedKV(q, k, v, *map(jnp.asarray, (table, length, pos)), codec.key.decode, codec.value.decode)


def numbers(part: reference.Partial) -> list[np.ndarray]:
    """The normalised output, the log-sum-exp and the logits; 0 where a row attends to nothing."""
    some = np.asarray(part.l) > 0
    total = np.where(some, part.l, 1.0)
    found = [np.where(some[..., None], part.o / total[..., None], 0), np.where(some, part.m + np.log(total), 0)]
    return found + [np.where(np.asarray(x) > reference.EMPTY, x, 0) for x in part.logits]


def compiled(attend: Callable[..., reference.Partial], parts: Sequence[PagedKV], **options) -> reference.Partial:
    """What `attend` makes of the parts, in one program: their arrays and the options' are its arguments."""
    leaves, structure = jax.tree.flatten((parts, options))
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]

    @jax.jit
    def program(arrays: list[jax.Array]) -> reference.Partial:
        traced = iter(arrays)
        put = [next(traced) if isinstance(leaf, jax.Array) else leaf for leaf in leaves]
        parts, options = jax.tree.unflatten(structure, put)
        return attend(parts, **options)

    return program(arrays)


def check(kernel: str, parts: list[PagedKV], options: dict) -> None:
    module, interpret = KERNELS[kernel]
    got = compiled(functools.partial(module.decode_attention, interpret=interpret), parts, **options)
    plain = {key: value for key, value in options.items() if key not in ("splits", "block")}
    want = compiled(functools.partial(decode_attention, implementation="xla"), parts, **plain)
    alike(got, want, parts[0].q.dtype)


def alike(got: reference.Partial, want: reference.Partial, dtype=jnp.float32) -> None:
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    for a, b in zip(numbers(got), numbers(want), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1e-3, np.abs(b).max()))


def _slow(store, dtype) -> bool:
    """Every store is tried in one of the two; the basic ones in both."""
    return store not in ("dense", "int4") and dtype == DTYPES[STORES.index(store) % 2]


@pytest.mark.parametrize("kernel", ["gpu", "tpu"])
@pytest.mark.parametrize(
    ("store", "dtype"),
    [
        pytest.param(store, dtype, marks=[pytest.mark.slow] if _slow(store, dtype) else [])
        for store in STORES
        for dtype in DTYPES
    ],
)
def test_every_store(kernel, store, dtype):
    check(kernel, *case(store, dtype=dtype, h=128, page=32, m=3, with_logits=True))


@pytest.mark.parametrize("kernel", ["gpu", "tpu"])
@pytest.mark.parametrize("store", matrix.quick(["int4:48", "int8:48", "int3:96:symmetric"], ["int4:48"]))
def test_a_smaller_last_group(kernel, store):
    check(kernel, *case(store, h=128, page=32, m=2, with_logits=True))


@pytest.mark.parametrize("dtype", matrix.quick(DTYPES, DTYPES[:1]), ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("store", "page"),
    [
        ("kivi2:32:128", 32),
        ("kivi4:16:64", 64),
        pytest.param("kivi2:32:128", 64, marks=pytest.mark.slow),
        pytest.param("kivi4:16:64", 32, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kernel", ["gpu", "tpu"])
def test_keys_per_channel(kernel, store, page, dtype):
    check(kernel, *case(store, dtype=dtype, page=page, with_logits=True))


TIERS = [("dense", "int2"), ("int4:32", "dense", "int8/int4")]


@pytest.mark.parametrize("kernel", ["gpu", "tpu"])
@pytest.mark.parametrize("dtype", matrix.quick(DTYPES, DTYPES[1:]), ids=["float32", "bfloat16"])
@pytest.mark.parametrize("stores", matrix.quick(TIERS, TIERS[:1]), ids="+".join)
def test_parts_in_one_launch(kernel, stores, dtype):
    check(kernel, *case(*stores, dtype=dtype, h=128, page=32, lengths=(0, 1, 128), with_logits=True, window=True))


@pytest.mark.parametrize("kernel", ["gpu", "tpu"])
def test_a_part_of_one_slot_beside_a_longer_one(kernel):
    parts, options = case("int4", "dense", h=128, page=32, with_logits=True)
    one = part(np.random.default_rng(1), "dense", (1, 1, 0, 1), dtype=jnp.float32, g=3, h=128, page=1, m=1)
    check(kernel, [parts[0], one], options)


def test_parts_merge_like_their_partials():
    parts, options = case("dense", "int4", lengths=(0, 1, 64))
    together = decode_attention(parts, implementation="interpret", with_logits=True, **options)
    apart = [decode_attention([part], implementation="interpret", with_logits=True, **options) for part in parts]
    for a, b in zip(numbers(together), numbers(reference.merge(apart)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def expanding(
    parts: list[PagedKV], heads: int, h: int, *, latent: bool
) -> tuple[list[PagedKV], reference.KeyExpansion]:
    """The parts with queries of `h` numbers in each of their `heads` places, and how their keys are made."""
    rng, dtype, rank = np.random.default_rng(1), parts[0].q.dtype, parts[0].q.shape[-1]
    drawn = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    frequency = jnp.asarray(rng.random((2, 1, h // 2)), jnp.float32)
    up, bias = drawn(2, rank, heads * h) * rank**-0.5 if latent else None, drawn(2, heads * h)
    queries = drawn(*parts[0].q.shape[:3], heads * h)
    return [x._replace(q=queries) for x in parts], reference.KeyExpansion(Rotation(frequency, 1.1), up, bias)


@pytest.mark.parametrize("kernel", matrix.quick(["gpu", "tpu", "tpu checked"], ["gpu", "tpu checked"]))
@pytest.mark.parametrize(
    ("store", "dtype", "rank", "heads"),
    [
        ("dense", jnp.float32, 48, 2),
        ("int4", jnp.bfloat16, 64, 2),
        pytest.param("int4", jnp.float32, 160, 2, marks=pytest.mark.slow),  # groups of 64, 64 and 32
        ("dense", jnp.bfloat16, 64, 0),
        ("int3", jnp.float32, 128, 0),
    ],
)
def test_keys_are_expanded_and_rotated_as_they_are_read(kernel, store, dtype, rank, heads):
    """Latents of some heads; 0 heads: keys that are cached before rotation, without a bias, at other places."""
    parts, options = case(store, dtype=dtype, h=rank, lengths=(0, 1, 64), window=not heads, with_logits=heads == 0)
    h = 32 if heads else rank
    parts, options["expand"] = expanding(parts, max(heads, 1), h, latent=heads > 0)
    if not heads:
        options["place"] = lambda at: at // 2
    check(kernel, parts, options)


def test_angles_are_reduced_to_one_turn():
    theta = np.concatenate([np.arange(2.0**17), np.random.default_rng(0).random(10000) * 2**17]).astype(np.float32)
    found = np.asarray(gpu_expand.reduced(jnp.asarray(theta)), np.float64)
    assert np.abs(found).max() < 3.15
    np.testing.assert_allclose(np.exp(1j * found), np.exp(1j * theta.astype(np.float64)), atol=1e-5)


def test_expanded_keys_are_those_of_a_loop():
    """The reference's keys, one at a time in float64."""
    parts, _ = case("dense", h=12)
    _, expand = expanding(parts, 3, 8, latent=True)
    expand = expand._replace(norm=lambda keys: keys / jnp.abs(keys).max(axis=-1, keepdims=True))
    cached = np.random.default_rng(3).normal(size=(2, 2, 5, 12))
    place = np.array([0, 7, 3, 100, 2])
    got = expand.keys(jnp.asarray(cached, jnp.float32), jnp.broadcast_to(jnp.asarray(place), (2, 2, 5)))
    up, bias = np.asarray(expand.up, np.float64), np.asarray(expand.bias, np.float64)
    for b, k, s, head in np.ndindex(2, 2, 5, 3):
        own = slice(8 * head, 8 * head + 8)
        key = cached[b, k, s] @ up[k][:, own] + bias[k, own]
        key = key / np.abs(key).max()
        for i in range(4):
            theta = place[s] * float(expand.rotation.frequency[b, 0, i])
            turned = 1.1 * np.exp(1j * theta) * (key[i] + 1j * key[i + 4])
            np.testing.assert_allclose(np.asarray(got)[b, k, s, own][[i, i + 4]], [turned.real, turned.imag], atol=1e-4)


@pytest.mark.parametrize("stores", matrix.quick([("dense",), ("int4",), ("int3",), *TIERS], TIERS[:1]), ids="+".join)
def test_no_races_and_nothing_out_of_bounds(stores):
    check("tpu checked", *case(*stores, h=128, page=16, with_logits=True, window=True))


@given(
    kernel=st.sampled_from(["gpu", "tpu"]),
    store=st.sampled_from(["dense", "int8", "int4"]),
    g=st.integers(1, 8),
    h=st.sampled_from([64, 96, 128, 256]),
    page=st.sampled_from([8, 16, 24, 64, 128, 512]),
    m=st.integers(1, 3),
    edges=st.lists(st.sampled_from([0, 1, -1, -2]), max_size=4),
    window=st.booleans(),
    cap=st.sampled_from([None, 2.0]),
    logits=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=10)
def test_any_shape(kernel, store, g, h, page, m, edges, window, cap, logits, seed):
    lengths = [n if n >= 0 else m * page + 1 + n for n in edges]  # also full rows, and one slot less
    shape = dict(g=g, h=h, page=page, m=m, lengths=lengths, window=window, seed=seed)
    check(kernel, *case(store, **shape, cap=cap, with_logits=logits))


@pytest.mark.parametrize(("splits", "block"), [(1, 64), (3, 16), (8, 64)])
def test_splits_and_blocks_change_nothing(splits, block):
    check("gpu", *case("int4", page=64, m=3, lengths=(0, 1, 64, 65), splits=splits, block=block, with_logits=True))


@pytest.mark.parametrize("dtype", matrix.quick(DTYPES, DTYPES[:1]), ids=["float32", "bfloat16"])
@pytest.mark.parametrize("store", ["int4", "int3:32", "int2:16:symmetric", "int8/int2", "int4:8", "int4:24"])
def test_codes_meet_queries_and_weights_as_their_numbers_would(store, dtype):
    (part,), options = case(store, dtype=dtype, lengths=(0, 1, 64), with_logits=True, window=True)
    decode = {"decode_key": lambda *x: part.decode_key(*x), "decode_value": lambda *x: part.decode_value(*x)}
    alike(reference.attend(part, **options), reference.attend(part._replace(**decode), **options), dtype)


@pytest.mark.parametrize(("store", "latent"), [("dense", False), ("int4", True), ("kivi2:32:128", False)])
def test_pools_that_a_tpu_lays_across_are_read_alike(store, latent, monkeypatch):
    parts, options = case(store, page=128, m=2, lengths=(0, 1, 200), with_logits=True)
    if latent:
        parts, options["expand"] = expanding(parts, 2, 32, latent=True)
    want = reference.attend(parts[0], **options)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, tpu=None, default, **_: (tpu or default)(*args))
    alike(reference.attend(parts[0], **options), want)


def test_numbers_are_linear_in_their_pieces():
    rng = np.random.default_rng(0)
    for bits, groups, most in itertools.product(PLANES, (1, 2, 4), (None, 16)):
        codec = named(f"int{bits}:{128 // groups}").key
        codes = codec.encode(jnp.asarray(rng.normal(size=(5, 128)), jnp.float32))
        found = np.zeros((5, 128))
        for p in pieces(bits, 128, 128 // groups, most):
            part = (np.asarray(codes["codes"])[:, p.at : p.at + p.width] >> p.shift) & p.mask
            found[:, p.start : p.start + p.width] += p.weight * part.astype(int)
            assert p.group == p.start // (128 // groups) == (p.start + p.width - 1) // (128 // groups)
        raw = codec.decode({**codes, "scale": codes["scale"] * 0 + 0x3F80, "zero": codes["zero"] * 0}, jnp.float32)
        np.testing.assert_array_equal(found, raw)  # 0x3F80 is 1


def test_the_assembly_adds_128_to_a_code():
    """A little machine for the four instructions of `gpu_block.assembly`, on every byte."""
    byte = lambda word, i: word >> np.uint64(8 * i) & np.uint64(0xFF)

    def run(text: str, word: np.ndarray) -> list[np.ndarray]:
        held = {"$2": word, "0": np.zeros_like(word)}
        value = lambda name: held[name] if name in held else np.full_like(word, int(name, 16 if "x" in name else 10))
        for line in re.findall(r"(?:shr|mov|prmt|lop3)[^;]*(?=;)", text):
            name, *args = re.split(r"[ ,]+", line.strip())
            to, *given = args
            if name.startswith("mov"):
                held[to] = value(given[0])
            elif name.startswith("shr"):
                held[to] = value(given[0]) >> value(given[1])
            elif name.startswith("prmt"):
                chosen = [int(given[2], 16) >> 4 * i & 7 for i in range(4)]
                parts = [byte(value(given[i // 4]), i % 4) << np.uint64(8 * n) for n, i in enumerate(chosen)]
                held[to] = np.bitwise_or.reduce(parts)
            else:
                a, b, c = map(value, given[:3])
                assert int(given[3], 16) == 0xEA  # (a & b) | c
                held[to] = (a & b) | c
        return [held["$0"], held["$1"]]

    every = np.arange(256, dtype=np.uint64)
    word = every | (255 - every) << np.uint64(8) | (every ^ np.uint64(0x5A)) << np.uint64(16) | every << np.uint64(24)
    for bits in (2, 3, 4):
        for piece in pieces(bits, 64, 64):
            halves = run(gpu_block.assembly(piece), word)
            for n in range(4):
                half = halves[n // 2] >> np.uint64(16 * (n % 2)) & np.uint64(0xFFFF)
                number = (half << np.uint64(16)).astype(np.uint32).view(np.float32)
                np.testing.assert_array_equal(number, 128 + ((byte(word, n).astype(int) >> piece.shift) & piece.mask))


@pytest.mark.parametrize("kernel", ["tpu", "interpret"])
def test_what_a_kernel_cannot_do_is_said(kernel):
    parts, options = case("dense")
    normed, expand = expanding(parts, 1, 64, latent=True)
    with pytest.raises(NotImplementedError, match="with a norm"):
        decode_attention(normed, implementation=kernel, expand=expand._replace(norm=jnp.tanh), **options)
    still = expand.rotation._replace(still=8)
    with pytest.raises(NotImplementedError, match="heads that turn in part"):
        decode_attention(normed, implementation=kernel, expand=expand._replace(rotation=still), **options)
    narrow, expand = expanding(parts, 1, 24, latent=True)
    with pytest.raises(NotImplementedError, match="halves of rotated heads are 12 numbers"):
        decode_attention(narrow, implementation=kernel, expand=expand, **options)
    chosen = [parts[0]._replace(slots=jnp.ones((2, 2, 64), bool))]
    with pytest.raises(NotImplementedError, match="choice of slots"):
        decode_attention(chosen, implementation=kernel, **options)


def test_wide_latents_of_few_bits_are_for_xla():
    parts, options = case("int4", g=32, h=512)
    parts, expand = expanding(parts, 2, 32, latent=True)
    with pytest.raises(NotImplementedError, match="512 numbers for 32 query heads"):
        decode_attention(parts, implementation="interpret", expand=expand, **options)


def test_a_format_that_a_kernel_cannot_read_is_said():
    parts, options = case("int2", h=32)
    with pytest.raises(NotImplementedError, match="less than 16"):
        decode_attention(parts, implementation="interpret", **options)


@pytest.mark.parametrize(("width", "page", "said"), [(24, 16, "keys of 24 numbers"), (32, 24, "across two of them")])
def test_runs_that_a_tpu_cannot_read_are_said(width, page, said):
    key = Format(pieces(2, width, width), jnp.dtype(jnp.float32), 1, width, 2, run=16)
    with pytest.raises(NotImplementedError, match=said):
        tpu_runs.cut(key, page)


def test_another_function_than_a_format_is_for_xla():
    (part,), options = case("dense")
    with pytest.raises(NotImplementedError, match="xla only"):
        decode_attention([part._replace(decode_key=lambda codes, _: codes)], implementation="interpret", **options)


# In the decode loop

SMALL = dict(num_layers=1, head_dim=64, max_position=128)
ONLY_XLA = ("tova int8/int3", "full kivi2")  # pieces of 8 numbers: 64 in 8 planes, groups of 8
FAST = ("full kivi2", "h2o int4", "mikv")


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in matrix.VARIANTS]
)
def test_kernels_change_nothing(method, capsys):
    unchanged(method, capsys, oracle.random_model(5, **SMALL))


@pytest.mark.parametrize("method", ["h2o", pytest.param("h2o int4", marks=[pytest.mark.slow])])
def test_kernels_change_nothing_on_latents(method, capsys):
    latent = LatentSpec(2, ((48, 32),))
    unchanged(method, capsys, oracle.random_model(5, **SMALL | {"head_dim": 32}, latent=latent))


def unchanged(method: str, capsys: pytest.CaptureFixture[str], model: Decoder) -> None:
    """The same positions and logits as on XLA."""
    recipe = matrix.recipe_of(method, 24)
    rng = np.random.default_rng(0)
    prompts, teacher = [rng.integers(0, 97, n).tolist() for n in (40, 30)], rng.integers(0, 97, (2, 3))
    say_once.cache_clear()
    logits, positions, _ = oracle.run(model, recipe._replace(kernels="interpret"), prompts, teacher)
    told = capsys.readouterr().err.count("decode attention on XLA")
    want, there, _ = oracle.run(model, recipe._replace(kernels="xla"), prompts, teacher)
    assert positions == there
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    assert told == (method in ONLY_XLA or method == "oracle")


def test_kernels_of_another_platform_are_refused():
    with pytest.raises(kvjax.InputError, match="cannot run on cpu"):
        kvjax.load().generate(["river: 217 130\n! river:"], methods.make("full", None, {"kernels": "gpu"}))
    with pytest.raises(kvjax.InputError, match="kernels=cuda is not one of xla, cpu, tpu, gpu, interpret, auto"):
        methods.make("full", None, {"kernels": "cuda"})


def test_the_default_is_the_platforms():
    parts, options = case("dense")
    assert jax.default_backend() == "cpu"
    got, want = (decode_attention(parts, implementation=how, **options) for how in (None, "cpu"))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)
