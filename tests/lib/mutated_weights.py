"""Mutated safetensors and their index: what is read is what header and bytes say, by a parser of ten lines."""

import atexit
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from kvjax.checkpoint import hf
from kvjax.models.hf_config import read_config
from tests import golden
from tests.lib.mutate import REFUSED, Kind, dump, edited, json_of, mangled, reading, refused

NAME = "llama_gqa"
_ORIGINALS = Path(tempfile.mkdtemp(prefix="mutated"))
atexit.register(shutil.rmtree, _ORIGINALS)


@functools.cache
def original(shards: int = 1) -> Path:
    """A checkpoint as it was written."""
    return golden.write_checkpoint(NAME, _ORIGINALS / str(shards), shards=shards)


@functools.cache
def split() -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    raw = (original() / hf.SINGLE).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def joined(header: bytes, data: bytes) -> bytes:
    """A safetensors file."""
    return len(header).to_bytes(8, "little") + header + data


def parsed(raw: bytes) -> dict[str, np.ndarray]:
    """What is in a safetensors file of float32 tensors."""
    size = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    spans = {name: tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__"}
    flat = {name: np.frombuffer(data[first:last], np.float32) for name, (first, last) in spans.items()}
    return {name: numbers.reshape(header[name]["shape"]) for name, numbers in flat.items()}


@st.composite
def single_files(draw: st.DrawFn) -> bytes:
    """Files of which the header, the data or anything has changed."""
    header, data = split()
    how = draw(st.sampled_from(["edited", "edited", "mangled", "data", "whole"]))
    if how == "edited":
        return joined(dump(draw(edited(header))), data)
    if how == "mangled":
        return joined(draw(mangled(dump(header))), data)
    return joined(dump(header), draw(mangled(data))) if how == "data" else draw(mangled(joined(dump(header), data)))


@st.composite
def indices(draw: st.DrawFn) -> bytes:
    """Mutated indices of three shards."""
    return draw(json_of(json.loads((original(3) / hf.INDEX).read_text())))


def load_all(folder: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Every parameter by its path: the name of its tensor, and its numbers."""
    weights = hf.locate(folder, read_config(folder))
    return {target: (weights.stored[target].name, array) for target, array in hf.read(weights, weights.stored)}


def single_holds(raw: bytes, folder: Path) -> None:
    """Accepted weights are those in the file, by name and shape, and all of them finite."""
    shutil.copy(original() / "config.json", folder)
    (folder / hf.SINGLE).write_bytes(raw)
    found = refused(lambda: load_all(folder))
    if found is REFUSED:
        return
    tensors = reading(parsed, raw)
    for target, (name, array) in found.items():
        expected = tensors[name].T if target.endswith(".kernel") else tensors[name]
        assert array.dtype == np.float32 and np.isfinite(array).all()
        np.testing.assert_array_equal(array, expected, err_msg=target)


def index_holds(text: bytes, folder: Path) -> None:
    """An accepted index leads to the weights that were there."""
    for file in original(3).iterdir():
        os.link(file, folder / file.name)
    (folder / hf.INDEX).unlink()
    (folder / hf.INDEX).write_bytes(text)
    found = refused(lambda: load_all(folder))
    if found is not REFUSED:
        same(found, load_all(original(3)))


def same(found: dict[str, tuple[str, np.ndarray]], expected: dict[str, tuple[str, np.ndarray]]) -> None:
    assert found.keys() == expected.keys()
    for target, (name, array) in found.items():
        assert name == expected[target][0]
        np.testing.assert_array_equal(array, expected[target][1], err_msg=target)


KINDS = {
    "safetensors": Kind(single_files(), single_holds),
    "index": Kind(indices(), index_holds, [dump({"weight_map": {"lm_head.weight": "a" * 300 + ".safetensors"}})]),
}
