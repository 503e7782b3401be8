"""Low-bit stores against numpy in float64, their bytes bit by bit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.cache.quantize import fp8, named, per_channel, rtn
from kvjax.cache.store import Balance, KVStore, dense
from kvjax.errors import InputError
from pallas_kernels.packing import pack, packed_bytes, unpack

BITS = [8, 4, 3, 2]
WIDTH = 64
GROUPS = {None: 32, 8: 8, 16: 16, 32: 32, 64: 64, 100: 64}  # what is asked for in vectors of 64, and what it means
E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)


def places(width: int, bits: int):
    """For every bit of every number: the number, the bit, and the byte and the bit of it where it lies."""
    start = low = 0
    for plane in (2, 1) if bits == 3 else (bits,):
        n = width * plane // 8
        for number in range(width):
            for bit in range(plane):
                yield number, low + bit, start + number % n, number // n * plane + bit
        start, low = start + n, low + plane


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    out = np.zeros((*codes.shape[:-1], codes.shape[-1] * bits // 8), np.uint8)
    for number, bit, byte, place in places(codes.shape[-1], bits):
        out[..., byte] |= ((codes[..., number] >> bit) & 1) << place
    return out


def unpacked(data, bits: int) -> np.ndarray:
    data = np.asarray(data)
    codes = np.zeros((*data.shape[:-1], data.shape[-1] * 8 // bits), np.uint8)
    for number, bit, byte, place in places(codes.shape[-1], bits):
        codes[..., number] |= ((data[..., byte] >> place) & 1) << bit
    return codes


def numbers(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def scales(leaf) -> np.ndarray:
    """Bfloat16 numbers from their bits."""
    return numbers(np.asarray(leaf).view(ml_dtypes.bfloat16))


def below(x: np.ndarray) -> np.ndarray:
    """The largest bfloat16 that is not above x."""
    near = x.astype(ml_dtypes.bfloat16)
    return numbers(np.where(numbers(near) > x, np.nextafter(near, ml_dtypes.bfloat16(-np.inf)), near))


def above(x: np.ndarray) -> np.ndarray:
    return -below(-x)


def check(x: np.ndarray, codes: np.ndarray, scale, zero, bits: int) -> np.ndarray:
    """Codes and scales of groups `[... group]` are the formula's, without `zero` the symmetric one's; decodes them.

    The step is rounded in float32 before it is rounded up, and so are the quotients before they become codes: next to
    a boundary either side will do.
    """
    scale = scales(scale)
    if zero is None:
        first, top = -(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1
        origin, most = np.zeros_like(scale), np.abs(x).max(-1)
    else:
        first, top = 0, 2**bits - 1
        origin, most = scales(zero), x.max(-1)
        np.testing.assert_array_equal(origin, below(x.min(-1)))
    step, slack = (most - origin) / top, 2**-22 * np.maximum(np.abs(most), np.abs(origin)) / top
    assert (above(step - slack) <= scale).all() and (scale <= above(step + slack)).all()
    quotient = (x - origin[..., None]) / np.where(scale == 0, 1, scale)[..., None]
    levels = codes.astype(np.float64) + first
    assert (np.abs(levels - np.clip(quotient, first, top)) <= 0.5 + 1e-4).all()
    back = levels * scale[..., None] + origin[..., None]
    assert (np.abs(back - x) <= scale[..., None] / 2 + rounding(x)).all()
    return back


def rounding(x: np.ndarray) -> np.ndarray:
    """What float32 may add to an error in groups `[... group]`."""
    return 2**-21 * np.abs(x).max(-1, keepdims=True)


def check_rtn(x, codes, bits: int, group: int, symmetric: bool) -> np.ndarray:
    grouped = numbers(x).reshape(*x.shape[:-1], -1, group)
    assert set(codes) == {"codes", "scale"} | ({"zero"} if not symmetric else set())
    number = unpacked(codes["codes"], bits).reshape(grouped.shape)
    return check(grouped, number, codes["scale"], codes.get("zero"), bits).reshape(x.shape)


def check_decoded(got, want: np.ndarray, x: np.ndarray) -> None:
    """`got` is `want` rounded to its dtype, up to float32's rounding of vectors `x`."""
    assert (np.abs(numbers(got) - want) <= float(jnp.finfo(got.dtype).eps) * 0.51 * np.abs(want) + rounding(x)).all()


def data(dtype) -> jax.Array:
    """Every kind of vectors, `[kind 5 64]`."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(5, WIDTH))
    constant = np.repeat(rng.normal(size=(5, WIDTH // 8)), 8, axis=1)
    zeros = np.where(normal > 0, 0.0, -0.0)
    outlier = np.where(np.arange(WIDTH) == 37, 1e4, normal)
    signed = np.where(rng.random((5, WIDTH)) < 0.5, zeros, np.abs(normal))
    kinds = [normal, 0.1 * normal + 1000, 0.1 * normal - 1000, constant, constant * 1e30, normal * 1e30, normal * 1e-30]
    kinds += [zeros, signed, -signed, outlier, -outlier, np.abs(normal), rng.integers(-8, 8, (5, WIDTH)), 1e30 + zeros]
    return jnp.asarray(np.stack(kinds), dtype)


def decoded(store, codes, dtype=jnp.float32) -> jax.Array:
    return jax.jit(store.decode, static_argnums=1)(codes, dtype)


def round_trip(store):
    return jax.jit(lambda x: store.decode(store.encode(x), jnp.float32))


def tokens(shape, seed=0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("bits, widths", [(8, (1, 3, 64)), (4, (2, 6, 128)), (3, (8, 24, 40, 128)), (2, (4, 12, 128))])
def test_packing_is_the_layout_bit_by_bit(bits, widths):
    for width in widths:
        codes = np.random.default_rng(width).integers(0, 2**bits, (2, 3, width), np.uint8)
        got = jax.jit(pack, static_argnums=1)(codes, bits)
        assert got.shape[-1] == packed_bytes(width, bits) == width * bits / 8
        np.testing.assert_array_equal(got, packed(codes, bits))
        np.testing.assert_array_equal(jax.jit(unpack, static_argnums=1)(got, bits), codes)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("symmetric", [False, True], ids=["affine", "symmetric"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_rtn_is_the_formula(bits, group, symmetric, dtype):
    store, x = rtn(bits, group, symmetric=symmetric), data(dtype)
    codes = jax.jit(store.encode)(x)
    want = check_rtn(x, codes, bits, GROUPS[group], symmetric)
    check_decoded(decoded(store, codes, dtype), want, numbers(x))


@pytest.mark.parametrize("symmetric", [False, True], ids=["affine", "symmetric"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "group, width, sizes",
    [
        (32, 72, [32, 32, 8]),
        (32, 112, [32, 32, 32, 16]),
        (24, 64, [24, 24, 16]),
        (None, 80, [40, 40]),
        (None, 256, [64] * 4),  # at most half a head of 128
        (None, 624, [64] * 9 + [48]),  # 61% of 1024, a latent
    ],
)
def test_the_last_group_may_be_smaller(group, width, sizes, bits, symmetric):
    store, x = rtn(bits, group, symmetric=symmetric), tokens((3, width))
    codes, ends = jax.jit(store.encode)(x), np.cumsum(sizes)
    number, want = unpacked(codes["codes"], bits), []
    assert codes["scale"].shape == (3, len(sizes)) and ends[-1] == width
    for i, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        own = slice(end - size, end)
        zero = None if symmetric else codes["zero"][:, i]
        want.append(check(numbers(x)[:, own], number[:, own], codes["scale"][:, i], zero, bits))
    check_decoded(decoded(store, codes), np.concatenate(want, axis=1), numbers(x))
    room = jax.eval_shape(lambda: store.init(2, 8, width, jnp.bfloat16))
    assert {name: leaf.shape[-1] for name, leaf in room.items()} == {name: x.shape[-1] for name, x in codes.items()}


@pytest.mark.parametrize("shape", [(48,), (3, 1, 5, 16), (7, 8)])
@pytest.mark.parametrize("symmetric", [False, True], ids=["affine", "symmetric"])
@pytest.mark.parametrize("bits", BITS)
def test_rtn_takes_any_leading_axes_and_compiles_to_the_same(bits, symmetric, shape):
    store, x = rtn(bits, symmetric=symmetric), tokens(shape)
    codes = store.encode(x)
    back = store.decode(codes, jnp.float32)
    check_decoded(back, check_rtn(x, codes, bits, shape[-1] // 2, symmetric), numbers(x))
    compiled = jax.jit(store.encode)(x)
    assert all((compiled[leaf] == codes[leaf]).all() for leaf in codes)
    np.testing.assert_allclose(round_trip(store)(x), back, rtol=1e-6, atol=1e-6)


MAGNITUDES = st.floats(2**-100, 2**100, width=32)
NUMBERS = st.one_of(MAGNITUDES, MAGNITUDES.map(lambda x: -x), st.sampled_from([0.0, -0.0]))


@pytest.mark.parametrize("store", ["int8:8", "int4:8", "int3:8", "int2:8", "int8:8:symmetric", "int2:8:symmetric"])
@settings(max_examples=50)
@given(x=st.lists(NUMBERS, min_size=8, max_size=8))
def test_any_group_is_the_formula(store, x):
    x = jnp.asarray(x, jnp.float32)
    check_rtn(x, jax.jit(named(store).key.encode)(x), int(store[3]), 8, "symmetric" in store)


@pytest.mark.parametrize("bits", BITS)
def test_constant_groups_of_bfloat16_numbers_come_back_exactly(bits):
    constants = jnp.asarray([0, -0.0, 1, -1, 3.140625, -1000, 1e30, -1e30], jnp.bfloat16).astype(jnp.float32)
    for store, x in ((rtn(bits, 8), jnp.repeat(constants, 8)), (per_channel(bits, 2), jnp.tile(constants, (4, 1)))):
        np.testing.assert_array_equal(round_trip(store)(x), x)


@pytest.mark.parametrize("bits", BITS)
def test_steps_are_hardly_larger_than_needed(bits):
    x = tokens((500, WIDTH))
    affine, even = (scales(jax.jit(rtn(bits, 64, symmetric=s).encode)(x)["scale"])[:, 0] for s in (False, True))
    affine, even = affine / np.ptp(x, axis=-1) * (2**bits - 1), even / np.abs(x).max(-1) * (2 ** (bits - 1) - 1)
    assert min(affine.min(), even.min()) > 1 - 1e-6
    assert affine.max() < 1.0125 and affine.mean() < 1.008 and even.max() < 1.008


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group, width", [(32, 48), (32, 8), (32, 128), (8, 48), (8, 8), (2, 16)])
def test_per_channel_is_the_formula_over_tokens(bits, group, width):
    store, x = per_channel(bits, group), tokens((2, 3 * group, width)) * 5 + tokens(width, 1) * 10
    codes = jax.jit(store.encode)(x)
    across = lambda a: np.asarray(a).reshape(2, 3, group, width).swapaxes(-1, -2)  # [2 runs width group]
    columns = lambda leaf: np.asarray(leaf).reshape(2, 3, group, -1).swapaxes(-1, -2)
    beside = lambda leaf: columns(leaf).reshape(2, 3, -1)[..., :width]  # the columns of a run one after the other
    assert codes["scale"].shape == codes["zero"].shape == (2, 3 * group, -(-width // group))
    number = across(unpacked(codes["codes"], bits))
    back = check(across(numbers(x)), number, beside(codes["scale"]), beside(codes["zero"]), bits)
    check_decoded(decoded(store, codes), back.swapaxes(-1, -2).reshape(x.shape), numbers(x))


def test_runs_are_independent():
    store, x = per_channel(3, 8), tokens((2, 32, 24))
    encode, codes = jax.jit(store.encode), jax.jit(store.encode)(x)
    for at in (slice(0, 8), slice(8, 16), slice(16, 32)):
        part = encode(x[:, at])
        assert all((part[leaf] == codes[leaf][:, at]).all() for leaf in codes)
        np.testing.assert_array_equal(decoded(store, part), decoded(store, codes)[:, at])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fp8_is_the_nearest_e4m3_number(dtype):
    x = data(dtype)
    codes = jax.jit(fp8().encode)(x)
    exact, scale = numbers(x), scales(codes["scale"])
    ideal = np.abs(exact).max(-1, keepdims=True) / 448
    assert (above(ideal * (1 - 2**-22)) <= scale).all() and (scale <= above(ideal * (1 + 2**-22))).all()
    quotient, code = (
        exact / np.where(scale == 0, 1, scale),
        numbers(np.asarray(codes["codes"]).view(ml_dtypes.float8_e4m3fn)),
    )
    nearest = np.nanmin(np.abs(quotient[..., None] - E4M3), axis=-1)
    assert (np.abs(code - quotient) <= nearest + 1e-3 * np.abs(quotient)).all()
    back = numbers(decoded(fp8(), codes))
    np.testing.assert_allclose(back, code * scale, rtol=1e-6)
    assert (np.abs(back - exact) <= np.maximum(np.abs(exact) / 16, scale * 2**-10) * (1 + 1e-5)).all()
    assert (back[exact == 0] == 0).all()


STORES = {"fp8": fp8()} | {f"int{bits}": rtn(bits, 16) for bits in BITS}
STORES |= {f"int{bits}:symmetric": rtn(bits, 16, symmetric=True) for bits in BITS}
STORES |= {f"int{bits} per channel": per_channel(bits, 16) for bits in BITS}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", STORES)
def test_numbers_that_are_not_finite_are_refused_or_spoil_their_group_alone(name, bad):
    store, x = STORES[name], tokens((32, WIDTH))
    spoilt = x.at[17, 35].set(bad)
    with pytest.raises(ValueError, match="finite"):
        store.encode(spoilt)
    group = np.zeros(x.shape, bool)
    if store.run > 1:
        group[16:32, 35] = True
    else:
        group[17, slice(None) if name == "fp8" else slice(32, 48)] = True
    back = round_trip(store)
    np.testing.assert_array_equal(back(spoilt), np.where(group, np.nan, back(x)))


@pytest.mark.parametrize("name", ["dense", *STORES])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_codes_are_what_init_makes_room_for(name, dtype):
    store = (STORES | {"dense": dense})[name]
    room = jax.eval_shape(lambda: store.init(3, 16, WIDTH, dtype))
    codes = jax.eval_shape(store.encode, jax.ShapeDtypeStruct((3, 16, WIDTH), dtype))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), room) == jax.tree.map(lambda a: (a.shape, a.dtype), codes)
    back = jax.jit(lambda: store.decode(store.init(3, 16, WIDTH, dtype), dtype))()
    assert back.shape == (3, 16, WIDTH) and back.dtype == dtype and not back.any()


def cost(store, width: int) -> float:
    """Bytes of a vector."""
    room = jax.eval_shape(lambda: store.init(2, 128, width, jnp.bfloat16))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(room)) / 256


@pytest.mark.parametrize("bits", BITS)
def test_bytes_are_the_codes_and_two_per_scale(bits):
    for width in (8, 64, 128):
        for group in (None, 8, 16, 64, 256):
            if group is None or width % min(group, width) == 0:
                groups = 2 if group is None else width // min(group, width)
                assert cost(rtn(bits, group), width) == width * bits / 8 + 4 * groups
                assert cost(rtn(bits, group, symmetric=True), width) == width * bits / 8 + 2 * groups
        assert cost(per_channel(bits, 32), width) == width * bits / 8 + 4 * -(-width // 32)
    assert (cost(fp8(), 128), cost(dense, 128)) == (130, 256)


def test_sizes_are_the_papers():
    percent = lambda store: cost(store, 128) / 256 * 100
    for bits, want in ((8, 53.1), (4, 28.1), (3, 21.9), (2, 15.6)):
        assert round(percent(rtn(bits, 64)), 1) == want
    for name, want in (("kivi2:32", 18.75), ("kivi4:32", 31.25)):
        assert percent(named(name).key) == percent(named(name).value) == want


def test_balance_cancels_in_logits_and_decoding_undoes_it():
    store, balance = KVStore(balanced=True), jnp.exp(tokens((2, 3, 16)))
    q, k, v = tokens((2, 3, 4, 16), 1), tokens((2, 3, 5, 16), 2), tokens((2, 3, 5, 8), 3)
    codes = store.encode(k, v, balance)
    np.testing.assert_allclose(codes[0], numbers(k) * numbers(balance)[:, :, None], rtol=1e-6)
    logits = np.einsum("bkgh,bknh->bkgn", numbers(store.query(q, balance)), numbers(codes[0]))
    np.testing.assert_allclose(logits, np.einsum("bkgh,bknh->bkgn", numbers(q), numbers(k)), atol=1e-5)
    keys, values = store.decode(*codes, balance)
    np.testing.assert_allclose(keys, k, rtol=1e-6)
    np.testing.assert_array_equal(values, v)
    assert store.query(q.astype(jnp.bfloat16), balance).dtype == jnp.bfloat16
    plain = KVStore()
    assert plain.query(q, ()) is q and plain.encode(k, v, ())[0] is k


def test_balance_halves_the_error_of_int2_with_outlier_channels():
    """MiKV's observation: a few large key channels stretch the steps of the others."""
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1024, 128))
    k[:, rng.choice(128, 4, replace=False)] *= 12
    balance = jnp.asarray(np.sqrt(np.abs(q).max(0) / np.abs(k).max(0)), jnp.float32)[None, None]
    queries, keys = (jnp.asarray(x, jnp.float32)[None, None] for x in (q, k))

    def error(store: KVStore, balance: Balance) -> float:
        codes = store.encode(keys, keys, balance)
        logits = q @ numbers(store.decode(*codes, balance)[0])[0, 0].T
        encoded = (
            numbers(store.query(queries, balance))[0, 0] @ numbers(store.key.decode(codes[0], jnp.float32))[0, 0].T
        )
        np.testing.assert_allclose(encoded, logits, atol=1e-3)
        return np.sqrt(np.mean((logits - q @ k.T) ** 2))

    assert 2 * error(KVStore(rtn(2, 64), balanced=True), balance) < error(KVStore(rtn(2, 64)), ())


def test_names_are_stores():
    for bits in BITS:
        assert named(f"int{bits}") == KVStore(rtn(bits), rtn(bits))
        assert named(f"int{bits}:32") == KVStore(rtn(bits, 32), rtn(bits, 32))
        for name, per_scale in (
            (f"int{bits}:symmetric", 4),
            (f"int{bits}:32:symmetric", 8),
            (f"int{bits}:symmetric:32", 8),
        ):
            assert cost(named(name).key, 128) == 16 * bits + per_scale and named(name) == named(name)
    assert named("dense") == KVStore() and named("dense").is_dense and not named("dense/int4").is_dense
    assert named("fp8") == KVStore(fp8(), fp8()) and named("fp8").name == "fp8"
    assert named("int8/int4:32") == KVStore(rtn(8), rtn(4, 32)) and named("int8/int4").name == "int8/int4"
    assert named("int2")._replace(balanced=True).name == "balanced int2"
    for name, bits, group, residual in (("kivi2", 2, 32, 128), ("kivi4:64", 4, 64, 128), ("kivi2:16:48", 2, 16, 48)):
        assert named(name) == KVStore(per_channel(bits, group), rtn(bits, group), residual=residual)
        assert (named(name).key.run, named(name).value.run) == (group, 1)


WRONG = {
    "is not a name": ["", "int4/", "/int4", "a/b/c", "/"],
    "is not one of": ["int5", "int", "Int4", "int4 ", "4"],
    "group=0": ["int4:0"],
    "its options are": ["int4:x", "int4:32:32", "int4:", "int4:-8", "int4:1.5", "int4:32:symmetric:8"],
    "has no options": ["dense:4", "fp8:4", "int4/dense:symmetric"],
    "is not kivi4 or kivi2": ["kivi3", "kivi", "kivi2:x", "kivi2:", "kivi2:32:128:1"],
    "kivi: group=": ["kivi2:5", "kivi2:0"],
    "kivi: residual=": ["kivi2:32:100", "kivi2:32:0", "kivi2:64:32"],
    "kivi is a store of keys and values together": ["kivi2/int4", "int4/kivi2"],
}


@pytest.mark.parametrize("name, message", [(name, message) for message, names in WRONG.items() for name in names])
def test_wrong_names_say_what_is_wrong(name, message):
    with pytest.raises(InputError, match=message):
        named(name)


def test_vectors_that_cannot_be_packed_or_grouped_are_refused():
    for bits in (0, 1, 5, 16):
        for make in (lambda bits: rtn(bits), lambda bits: per_channel(bits, 32)):
            with pytest.raises(InputError, match=f"bits={bits} is not one of 8, 4, 3, 2"):
                make(bits)
    for bits, width, multiple in ((4, 7, 2), (3, 12, 8), (2, 6, 4)):
        for store in (rtn(bits, 1), per_channel(bits, 2)):
            with pytest.raises(InputError, match=f"int{bits} packs vectors of a multiple of {multiple} "):
                store.init(1, 8, width, jnp.float32)
        with pytest.raises(InputError, match=f"int{bits} packs vectors of a multiple of {multiple} "):
            rtn(bits, 1).encode(tokens((2, width)))
    for bits, width, others in ((3, 100, "int2 or int4 or int8"), (2, 62, "int4 or int8"), (4, 7, "int8")):
        with pytest.raises(InputError, match=f"not of {width}: take {others}$"):
            rtn(bits).init(1, 8, width, jnp.float32)
    for group in (0, -1):
        with pytest.raises(InputError, match=f"group={group} is not at least 1"):
            rtn(4, group)
