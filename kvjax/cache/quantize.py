"""Low-bit stores: a few bits per value, with a scale for each group of values; and stores by their names.

Scales and zero points are bfloat16: 16 bits like the papers' float16, with a range that keys and values do not leave
(1e-30 to 1e30 is tested). They are rounded so that a group's largest and smallest value stay within the codes: the
round trip is never off by more than half a stored step.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Float, UInt16

from kvjax.cache.pages import LARGEST
from kvjax.cache.store import KVStore, Store, dense
from kvjax.errors import InputError
from kvjax.spec import PyTree
from pallas_kernels.codes import Affine, Float8, PerChannel, to_groups, to_numbers
from pallas_kernels.packing import PLANES, pack, packed_bytes

SCALE = jnp.uint16  # the bits of a bfloat16: some platforms would convert whole pools of those to write one


@functools.cache
def rtn(bits: int, group: int | None = None, *, symmetric: bool = False) -> Store:
    """Round to nearest, per token and group of neighbouring channels.

        scale = (max - min) / (2^bits - 1)    zero = min    code = round((x - zero) / scale)

    `symmetric`: scale = max |x| / (2^(bits-1) - 1), no zero point, codes around 2^(bits-1) - 1.

    Args:
      bits: 8, 4, 3 or 2.
      group: channels that share a scale, the last ones of a vector perhaps fewer; None = half of the vector, at most 64
        (`pallas_kernels.codes.Affine`). A larger group than the vector is the vector.
      symmetric: without zero points.

    Source: MiKV (arXiv 2402.18096), Eq. 1-4, and its groups, half a head of 128; the uniform quantisation that papers
      compare with.
    Differs: scale and zero point are bfloat16, rounded so that they cover the group.
    Cost: `bits + 32 / group` bits per value, `bits + 16 / group` if symmetric.
    """
    if bits not in PLANES:
        raise InputError(f"bits={bits} is not one of {', '.join(map(str, sorted(PLANES, reverse=True)))}")
    if group is not None and group < 1:
        raise InputError(f"group={group} is not at least 1")
    read = Affine(bits, symmetric, group)
    top = read.middle  # of symmetric codes

    def init(pages: int, page: int, width: int, dtype: DTypeLike) -> PyTree:
        _check_width(width, bits)
        groups = -(-width // read.size(width))
        zeros = lambda size, dtype: jnp.zeros((pages, page, size), dtype)
        codes = {"codes": zeros(packed_bytes(width, bits), jnp.uint8), "scale": zeros(groups, SCALE)}
        return codes if symmetric else codes | {"zero": zeros(groups, SCALE)}

    def encode(x: Float[Array, "*b R"]) -> PyTree:
        width = x.shape[-1]
        _check_width(width, bits)
        x, size = _check(x), read.size(width)
        grouped = to_groups(x, size, "edge")
        if symmetric:
            scale = _rounded(jnp.abs(grouped).max(axis=-1) / top, jnp.inf)
            codes = jnp.clip(jnp.round(x / _divisor(to_numbers(scale, size, width))), -top, top) + top
            return {"codes": pack(codes.astype(jnp.uint8), bits), "scale": _upper(scale)}
        zero, scale = _affine(grouped.min(axis=-1), grouped.max(axis=-1), bits)
        codes = _affine_codes(x, to_numbers(zero, size, width), to_numbers(scale, size, width), bits)
        return {"codes": pack(codes, bits), "scale": _upper(scale), "zero": _upper(zero)}

    name = f"int{bits}{'' if group is None else f':{group}'}{':symmetric' * symmetric}"
    return Store(init, encode, read, name)


@functools.cache
def fp8() -> Store:
    """8-bit floating point (e4m3) with a scale per token.

    Cost: 8 bits per value and 16 per vector; platforms without the format convert in software.
    """
    largest = float(jnp.finfo(jnp.float8_e4m3fn).max)

    def init(pages: int, page: int, width: int, dtype: DTypeLike) -> PyTree:
        zeros = lambda size, dtype: jnp.zeros((pages, page, size), dtype)
        return {"codes": zeros(width, jnp.uint8), "scale": zeros(1, SCALE)}

    def encode(x: Float[Array, "*b R"]) -> PyTree:
        scale = _rounded(jnp.abs(_check(x)).max(axis=-1, keepdims=True) / largest, jnp.inf)
        codes = x.astype(jnp.float32) / _divisor(scale)
        codes = jnp.clip(codes, -largest, largest).astype(jnp.float8_e4m3fn)
        return {"codes": jax.lax.bitcast_convert_type(codes, jnp.uint8), "scale": _upper(scale)}

    return Store(init, encode, Float8(), "fp8")


@functools.cache
def per_channel(bits: int, group: int) -> Store:
    """As `rtn`, but the values of a group are those of one channel in `group` tokens that follow each other.

    A run of `group` slots is encoded at once, so this is no store for slots that move: its scales lie beside its slots,
    each slot holding those of `width / group` channels (`PerChannel`).

    Source: KIVI (arXiv 2402.02750), keys; `quant/new_pack.py`.
    Differs: scale and zero point are bfloat16, rounded so that they cover the group.
    Cost: `bits + 32 / group` bits per value.
    """
    if bits not in PLANES:
        raise InputError(f"bits={bits} is not one of {', '.join(map(str, sorted(PLANES, reverse=True)))}")
    if group < 1:
        raise InputError(f"group={group} is not at least 1")

    def init(pages: int, page: int, width: int, dtype: DTypeLike) -> PyTree:
        _check_width(width, bits)
        scale = lambda: jnp.zeros((pages, page, -(-width // group)), SCALE)
        codes = jnp.zeros((pages, page, packed_bytes(width, bits)), jnp.uint8)
        return {"codes": codes, "scale": scale(), "zero": scale()}

    def encode(x: Float[Array, "*b n R"]) -> PyTree:
        runs = _check(x).reshape(*x.shape[:-2], x.shape[-2] // group, group, x.shape[-1])
        zero, scale = _affine(runs.min(axis=-2), runs.max(axis=-2), bits)
        codes = _affine_codes(runs, zero[..., None, :], scale[..., None, :], bits).reshape(x.shape)
        return {"codes": pack(codes, bits), "scale": spread(_upper(scale)), "zero": spread(_upper(zero))}

    def spread(scale: UInt16[Array, "*b runs R"]) -> UInt16[Array, "*b n columns"]:
        columns = -(-scale.shape[-1] // group)
        padded = jnp.pad(scale, [(0, 0)] * (scale.ndim - 1) + [(0, columns * group - scale.shape[-1])])
        of_slots = jnp.swapaxes(padded.reshape(*scale.shape[:-1], columns, group), -1, -2)
        return of_slots.reshape(*scale.shape[:-2], scale.shape[-2] * group, columns)

    return Store(init, encode, PerChannel(bits, group), f"kivi{bits}:{group}", run=group)


def kivi(bits: int, group: int = 32, residual: int = 128) -> KVStore:
    """Keys per channel, values per token, the newest `residual` tokens unquantised.

    Source: KIVI (arXiv 2402.02750); `models/llama_kivi.py`.
    Differs: scale and zero point are bfloat16, rounded so that they cover the group.
    Cost: `bits + 32 / group` bits per value beside the residual.
    """
    if group not in (8, 16, 32, 64, 128):
        raise InputError(f"kivi: group={group} is not 8, 16, 32, 64 or 128")
    if not group <= residual <= LARGEST or residual % group:
        raise InputError(f"kivi: residual={residual} is not a multiple of group={group}, at most {LARGEST}")
    return KVStore(per_channel(bits, group), rtn(bits, group), residual=residual)


@functools.cache
def named(text: str) -> KVStore:
    """A store by its name, or two as `keys/values`.

    `dense`, `int8`, `int4`, `int3`, `int2`, `fp8`; `intN` may name a group and `symmetric` after colons. `kivi4` and
    `kivi2`, after a colon the group and after another the residual.

    >>> named("int4:32").name, named("int8/int4").name
    ('int4:32', 'int8/int4')
    """
    parts = text.split("/")
    if len(parts) > 2 or not all(parts):
        raise InputError(f"store {text!r} is not a name such as int4, or two such as int8/int4 for keys and values")
    if len(parts) == 1 and parts[0].startswith("kivi"):
        name, *numbers = parts[0].split(":")
        if name not in ("kivi4", "kivi2") or len(numbers) > 2 or not all(n.isdecimal() for n in numbers):
            raise InputError(f"store {text!r} is not kivi4 or kivi2, or such as kivi2:32:128 with group and residual")
        return kivi(int(name[-1]), *map(int, numbers))
    key, value = (_codec(part) for part in (parts[0], parts[-1]))
    return KVStore(key, value)


def _codec(text: str) -> Store:
    name, *options = text.split(":")
    codecs = {"dense": lambda: dense, "fp8": fp8} | {f"int{bits}": functools.partial(rtn, bits) for bits in PLANES}
    if name.startswith("kivi"):
        raise InputError(f"store {text!r}: kivi is a store of keys and values together")
    if name not in codecs:
        raise InputError(f"store {name!r} is not one of {', '.join(codecs)}, kivi4, kivi2")
    if name in ("dense", "fp8"):
        if options:
            raise InputError(f"store {text!r}: {name} has no options")
        return codecs[name]()
    groups = [int(option) for option in options if option.isdecimal()]
    if len(groups) + ("symmetric" in options) != len(options) or len(groups) > 1:
        raise InputError(f"store {text!r}: its options are a group and symmetric, such as {name}:32:symmetric")
    return codecs[name](*groups, symmetric=True) if "symmetric" in options else codecs[name](*groups)


def _check_width(width: int, bits: int) -> None:
    """Raises `InputError` for vectors that cannot be packed."""
    packs = lambda bits: width * min(PLANES[bits]) % 8 == 0
    if not packs(bits):
        others = " or ".join(f"int{other}" for other in PLANES if packs(other))
        multiple = 8 // min(PLANES[bits])
        raise InputError(f"int{bits} packs vectors of a multiple of {multiple} values, not of {width}: take {others}")


def _check(x: Array) -> Float[Array, "..."]:
    """Values in float32; raises for NaN and infinity, which inside `jit` make their whole group NaN."""
    if not isinstance(x, Tracer) and not bool(jnp.isfinite(x).all()):
        raise ValueError("only finite values can be quantised")
    return jnp.where(jnp.isfinite(x), x.astype(jnp.float32), jnp.nan)


def _affine(low: Array, high: Array, bits: int) -> tuple[Array, Array]:
    """Zero point and scale that cover the values from `low` to `high`.

    Halves, because they are exact: compilers compute a scale twice, once for the codes, and may fuse a product with a
    sum in one of the two; rounded up, the two would then be a step of bfloat16 apart. The difference of two values of
    float32 may be too large for it.
    """
    top = 2**bits - 1
    zero = _rounded(low, -jnp.inf)
    return zero, _rounded((high / 2 - zero / 2) * (2 / top), jnp.inf)


def _affine_codes(x: Array, zero: Array, scale: Array, bits: int) -> Array:
    codes = jnp.round((x - zero) / _divisor(scale))
    return jnp.clip(codes, 0, 2**bits - 1).astype(jnp.uint8)


def _divisor(scale: Array) -> Array:
    """The scale; 1 where it is 0, as for a group of equal values."""
    return jnp.where(scale == 0, 1.0, scale)


def _rounded(x: Array, toward: float) -> Array:
    """The nearest number up, or down, that bfloat16 can hold: float32 has 16 more bits."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    shorter = bits & jnp.uint32(0xFFFF0000)  # toward zero
    lengthen = (bits != shorter) & ((x > 0) == (toward > 0))
    return jax.lax.bitcast_convert_type(jnp.where(lengthen, shorter + jnp.uint32(0x10000), shorter), jnp.float32)


def _upper(x: Array) -> Array:
    """A float32 that bfloat16 can hold, as that one's bits; `pallas_kernels.codes.whole` is the inverse."""
    return (jax.lax.bitcast_convert_type(x, jnp.uint32) >> jnp.uint32(16)).astype(SCALE)
