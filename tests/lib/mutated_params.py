"""Damaged folders of a converted checkpoint: what is read is what was written, bit by bit."""

import functools
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from hypothesis import strategies as st

from kvjax.checkpoint import orbax
from kvjax.checkpoint.convert import convert
from tests.lib import mutated_weights
from tests.lib.mutate import REFUSED, Kind, refused

HOW = "cut empty flip flip flip grow remove remove_folder folder loop fifo twin swap stray_file stray_folder".split()


class Damage(NamedTuple):
    """What happens to one file of a folder."""

    how: str
    file: int  # in the order of names
    at: float  # where in it, from 0 to 1
    bit: int = 0


@functools.cache
def original() -> Path:
    """A conversion as it was written."""
    source = mutated_weights.original()
    convert(str(source), source.with_name("converted"))
    return source.with_name("converted")


def damages(files: int) -> st.SearchStrategy[Damage]:
    how = (
        "cut empty flip flip flip grow remove remove_folder folder loop fifo twin swap stray_file stray_folder".split()
    )
    return st.builds(
        Damage, st.sampled_from(how), st.integers(0, files - 1), st.floats(0, 1, exclude_max=True), st.integers(0, 7)
    )


def damage(folder: Path, what: Damage) -> None:
    """Damage a file, or what is around it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file = files[what.file % len(files)]
    raw = bytearray(file.read_bytes())
    at = int(what.at * len(raw))
    if what.how in ("cut", "empty", "flip", "grow"):
        if what.how == "flip" and raw:
            raw[at] ^= 1 << what.bit
        kept = {"cut": raw[:at], "empty": b"", "flip": raw, "grow": raw + b"\x00" * 9}[what.how]
        file.write_bytes(kept)
    elif what.how in ("remove", "folder", "loop", "fifo"):
        file.unlink()
        if what.how == "folder":
            file.mkdir()
        if what.how == "loop":
            file.symlink_to(file)
        if what.how == "fifo":
            os.mkfifo(file)
    elif what.how == "remove_folder":
        shutil.rmtree(file.parent)
    elif what.how == "twin":
        top = folder / file.relative_to(folder).parts[0]
        shutil.copytree(top, folder / f"{top.name}2")
    elif what.how == "swap":
        other = files[(what.file + 1) % len(files)]
        content = other.read_bytes()
        other.write_bytes(raw)
        file.write_bytes(content)
    elif what.how == "stray_file":
        (folder / "stray").write_bytes(raw)
    else:
        (folder / "stray").mkdir()


def orbax_holds(what: Damage, folder: Path) -> None:
    """Accepted parameters are those that were written."""
    copy = folder / "copy"
    shutil.copytree(original(), copy)
    damage(copy / orbax.PARAMS, what)
    found = refused(lambda: jax.tree.leaves(orbax.load(copy, np.float32)))
    if found is not REFUSED:
        for array, expected in zip(found, jax.tree.leaves(orbax.load(original(), np.float32)), strict=True):
            np.testing.assert_array_equal(array, expected)


KINDS = {"params": Kind(damages(40), orbax_holds)}
