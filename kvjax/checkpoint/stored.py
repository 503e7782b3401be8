"""The parts of a converted checkpoint: found, checked, and read as Orbax does it."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.checkpoint import digest, hf
from kvjax.checkpoint.quiet import quiet
from kvjax.errors import InputError


class Part(NamedTuple):
    """A part that is there, not yet read."""

    folder: Path
    arrays: dict[str, Any]  # parameter path -> Orbax's description of it
    checksum: str | None  # None: the checkpoint is of a kvjax that wrote none


def find(path: Path, params: Path, checksums: Mapping[str, str] | None) -> list[Part]:
    """The parts of a checkpoint, in the order of their names; raises `InputError` unless they are what was written.

    Args:
      path: the checkpoint, for errors.
      params: the folder that the parts are in.
      checksums: of every part; None = the checkpoint has none.
    """
    params = params.absolute()
    with _reading(path):
        names, known = sorted(os.listdir(params)), dict(checksums or {})
        if checksums is not None and names != sorted(known):
            raise ValueError(f"{min(known.keys() ^ set(names))} is missing, or was not there")
        for file in params.rglob("*"):
            if not file.is_dir() and not file.is_file():
                raise ValueError(f"{file.relative_to(params)} is not a regular file")
        parts = [Part(params / name, _described(params / name), known.get(name)) for name in names]
    twice = [name for name, count in Counter(name for part in parts for name in part.arrays).items() if count > 1]
    if twice:
        raise damaged(path, f"{min(twice)} is there twice")
    return parts


def check_shapes(path: Path, parts: list[Part], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Raise `InputError` unless a checkpoint has the parameters that are wanted and no others."""
    there = {name: list(leaf.shape) for part in parts for name, leaf in part.arrays.items()}
    needed = {name: list(leaf.shape) for name, leaf in wanted.items()}
    for name in sorted(there.keys() | needed.keys()):
        if there.get(name) != needed.get(name):
            given, asked = there.get(name, "absent"), needed.get(name, "none")
            raise damaged(path, f"the shape of {name} is {given}, config.json gives {asked}")


def load(path: Path, part: Part, target: Mapping[str, Any], check: bool = True) -> dict[str, Any]:
    """The arrays of a part; raises `InputError` where they are damaged or not finite.

    Args:
      path: the checkpoint, for errors.
      part: which.
      target: parameter path -> how to read it; `...` leaves it out.
      check: whether the checksum is compared.
    """
    from orbax.checkpoint import v1 as ocp

    with _reading(path):
        if check and part.checksum not in (None, digest.of_folder(part.folder)):
            raise ValueError(f"{part.folder.name} is damaged: its checksum is another")
        found = ocp.load(str(part.folder), dict(target))
        arrays = {name: found[name] for name, leaf in target.items() if leaf is not ...}
    for name, array in arrays.items():
        if not (hf.is_finite(array) if isinstance(array, np.ndarray) else _is_finite(array)):
            raise InputError(f"{path}: {name} has NaN or infinite weights in {array.dtype}")
    return arrays


@jax.jit
def _is_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


def _described(folder: Path) -> dict[str, Any]:
    from orbax.checkpoint import v1 as ocp

    found = ocp.metadata(str(folder)).metadata
    if not isinstance(found, dict) or not all(hasattr(leaf, "shape") for leaf in found.values()):
        raise ValueError(f"{folder.name} holds no arrays")
    return found


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """One line for whatever Orbax makes of damaged files: its errors are of many types, and no stable list."""
    try:
        with quiet():
            yield
    except Exception as error:
        raise damaged(path, reason(error)) from error


def damaged(path: Path, why: str) -> InputError:
    """The error for a checkpoint whose parameters are not what they should be."""
    return InputError(f"{path}: params cannot be read, convert the source again ({why})")


def reason(error: Exception) -> str:
    """What an error says at first, without tensorstore's dump of its settings."""
    said = re.split(r"See full TensorStore|\[tensorstore_spec|\n", str(error).strip())[0]
    return said.strip(" {.") or type(error).__name__
