"""What a converted checkpoint notes of itself in `kvjax.json`, checked: it decides what its weights mean."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from kvjax.errors import InputError
from kvjax.models.config_fields import LARGEST
from kvjax.spec import WEIGHT_BITS, GateSpec, LatentSpec, ModelSpec

_AGAIN = "convert the source again"
_integer = lambda value, least, most=LARGEST: type(value) is int and least <= value <= most
_finite = lambda value: type(value) in (int, float) and abs(value) <= 1e38


def check(about: Mapping[str, Any], path: Path, version: int) -> None:
    """Raise `InputError` for notes of another format, or that are not what a conversion writes.

    Args:
      about: the content of the file.
      path: the file.
      version: of the format that is read.
    """
    if not _integer(about.get("format"), version, version):
        raise InputError(f"{path}: format {about.get('format')!r}, this kvjax reads {version}; {_AGAIN}")
    ignored, dtype, lorc = about.get("ignore_config", []), about.get("dtype"), about.get("lorc", {})
    if not isinstance(ignored, list) or not all(isinstance(name, str) for name in ignored):
        raise InputError(f"{path}: ignore_config = {ignored!r}, expected a list of names; {_AGAIN}")
    if not _is_float(dtype):
        raise InputError(f"{path}: dtype = {dtype!r}, expected a name such as bfloat16; {_AGAIN}")
    if not isinstance(about.get("tie_embeddings", False), bool):
        raise InputError(f"{path}: tie_embeddings = {about['tie_embeddings']!r}, expected true or false; {_AGAIN}")
    if about.get("weights") not in (None, *WEIGHT_BITS):
        raise InputError(f"{path}: weights = {about['weights']!r}, expected one of {', '.join(WEIGHT_BITS)}; {_AGAIN}")
    checksums = about.get("checksums", {})
    if not isinstance(checksums, dict) or not all(isinstance(checksum, str) for checksum in checksums.values()):
        raise InputError(f"{path}: checksums = {checksums!r}, expected one of each part; {_AGAIN}")
    if not isinstance(lorc, dict):
        raise InputError(f"{path}: lorc = {lorc!r}, expected an object; {_AGAIN}")


def latent(about: Mapping[str, Any], spec: ModelSpec, path: Path) -> LatentSpec | None:
    """The low-rank keys and values that `kvjax.json` notes; None if it notes none."""
    if "latent" not in about:
        return None
    given, heads, pairs = about["latent"], 0, None
    if isinstance(given, dict) and given.keys() == {"heads", "ranks"}:
        heads, pairs = given["heads"], given["ranks"]
    if not _integer(heads, 1) or spec.num_kv_heads % heads:
        raise InputError(
            f"{path}: latent = {given!r}, expected heads, of {spec.num_kv_heads} in all, and ranks; {_AGAIN}"
        )
    most = heads * spec.head_dim
    is_pair = lambda pair: isinstance(pair, list) and len(pair) == 2 and all(_integer(r, 1, most) for r in pair)
    if not isinstance(pairs, list) or len(pairs) != spec.num_layers or not all(map(is_pair, pairs)):
        raise InputError(f"{path}: latent.ranks = {pairs!r}, expected {spec.num_layers} pairs of 1 to {most}; {_AGAIN}")
    return LatentSpec(heads, tuple((key, value) for key, value in pairs))


def gate(about: Mapping[str, Any], spec: ModelSpec, path: Path) -> GateSpec | None:
    """The gate that `kvjax.json` notes; None if it notes none."""
    if "gate" not in about:
        return None
    given, h = about["gate"], spec.head_dim
    expected = {
        "objective": (lambda x: x in ("dmc", "dms"), "dmc or dms"),
        "rate": (lambda x: _finite(x) and x > 0, "a number above 0"),
        "window": (lambda x: _integer(x, 0), "tokens"),
        "neuron": (lambda x: x is None or _integer(x, -h, h - 1), f"null or a coordinate of a head, {-h} to {h - 1}"),
        "offset": (_finite, "a number"),
        "scale": (_finite, "a number"),
    }
    if not isinstance(given, dict) or given.keys() - expected.keys():
        raise InputError(f"{path}: gate = {given!r}, expected an object with {', '.join(expected)}; {_AGAIN}")
    for name, (fits, what) in expected.items():
        if (name in given or name in ("objective", "rate", "window")) and not fits(given.get(name)):
            raise InputError(f"{path}: gate.{name} = {given.get(name)!r}, expected {what}; {_AGAIN}")
    real = ("rate", "offset", "scale")
    fields: dict[str, Any] = {name: float(value) if name in real else value for name, value in given.items()}
    return GateSpec(**fields)


def _is_float(name: Any) -> bool:
    try:
        return isinstance(name, str) and jnp.issubdtype(jnp.dtype(name), jnp.floating)
    except TypeError:
        return False
