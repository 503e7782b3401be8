"""Settings of the kernels that were measured: block sizes by device, kernel, implementation and shape.

`tuning.json` beside this file has a list of entries, or the file that the environment variable `PALLAS_KERNELS_TUNING`
names. `python -m kvjax.bench tune` makes them. An entry is for a shape if all of its fields but sizes are equal; of
several the one whose sizes are nearest is taken. Where there is none, a kernel has its own default.

    {"device": "NVIDIA H200", "kernel": "decode_attention", "implementation": "gpu",
     "shape": {"key": "Dense()", ..., "rows": 128, "slots": 32768}, "settings": {"block": 128}, ...}
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

TABLE = Path(__file__).with_name("tuning.json")
VARIABLE = "PALLAS_KERNELS_TUNING"
SIZES = ("rows", "slots", "tokens")  # fields of a shape of which the nearest will do
Shape = Mapping[str, Any]

_trial: list[tuple[Mapping[str, Any], list[dict[str, Any]]]] = []


def path() -> Path:
    """The table that is read."""
    return Path(os.environ.get(VARIABLE) or TABLE)


def read(table: Path) -> list[dict[str, Any]]:
    """The entries of a table; none where there is no file."""
    return json.loads(table.read_text(encoding="utf-8"))["entries"] if table.exists() else []


@functools.cache
def _entries(table: Path) -> list[dict[str, Any]]:
    return read(table)


def write(table: Path, entries: list[dict[str, Any]]) -> None:
    """Put entries into a table, in place of those of the same device, kernel, implementation and shape."""
    own = lambda entry: json.dumps([entry[name] for name in ("device", "kernel", "implementation", "shape")])
    merged = {own(entry): entry for entry in (*read(table), *entries)}
    lines = ",\n".join("    " + json.dumps(merged[key]) for key in sorted(merged))
    new = table.with_suffix(".new")
    new.write_text('{\n  "entries": [\n' + lines + "\n  ]\n}\n", encoding="utf-8")
    new.replace(table)
    _entries.cache_clear()


def settings(kernel: str, implementation: str, shape: Shape, given: Mapping[str, Any]) -> dict[str, Any]:
    """A kernel's arguments with those that were measured for this device and shape, where they were not given.

    Args:
      kernel, implementation: which.
      shape: numbers and names; see `SIZES`.
      given: arguments; None = not given.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if _trial:
        tried, asked = _trial[-1]
        asked.append({"kernel": kernel, "implementation": implementation, "shape": dict(shape)})
        return {**tried, **given}
    own = [
        entry for entry in _entries(path()) if (entry["kernel"], entry["implementation"]) == (kernel, implementation)
    ]
    fits = [entry for entry in own if _kind(entry["shape"]) == _kind(shape)]
    if fits:  # only then: it starts the backend
        device = jax.devices()[0].device_kind
        fits = [entry for entry in fits if entry["device"] == device]
    found = min(fits, key=lambda entry: _distance(entry["shape"], shape))["settings"] if fits else {}
    return {**found, **given}


@contextlib.contextmanager
def trying(settings: Mapping[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Give kernels these settings, whatever the table says; yields what they asked for: kernel and shape."""
    asked: list[dict[str, Any]] = []
    _trial.append((settings, asked))
    try:
        yield asked
    finally:
        _trial.pop()


def name_of(decode: Any) -> str:
    """A number format in a shape: a function of one's own is any other."""
    return str(decode) if dataclasses.is_dataclass(decode) else "other"


def _kind(shape: Shape) -> dict[str, Any]:
    return {name: value for name, value in shape.items() if name not in SIZES}


def _distance(a: Shape, b: Shape) -> float:
    """Powers of two between sizes."""
    return sum(abs(math.log2(a[name] / b[name])) for name in SIZES if name in a and name in b)
