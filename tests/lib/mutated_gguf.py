"""Mutated GGUF files: what is read is what the file says, by the `gguf` package's own reader, and all of it finite."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize
from hypothesis import strategies as st

from kvjax.checkpoint import hf
from kvjax.models.hf_config import read_config
from kvjax.models.tokenizer import Tokenizer
from tests.lib import gguf_files
from tests.lib.mutate import REFUSED, Kind, mangled, refused

LETTERS = list("▁abcdefghijklmnopqrstuvwxyz")
FIELDS = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *LETTERS, "he", "▁t", "▁the"],
    "tokenizer.ggml.token_type": [2, 3, 3] + [1] * 30,
    "tokenizer.ggml.scores": [0.0] * 3 + [-9.0] * 27 + [-1.0, -2.0, -3.0],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.chat_template": "{{ messages[0]['content'] }}",
}
_FOLDER = Path(tempfile.mkdtemp(prefix="mutated"))
atexit.register(shutil.rmtree, _FOLDER)
ODD = [
    b"\xff" * 8,
    b"\x00" * 8,
    b"\x01" + b"\x00" * 7,
    b"\x00" * 7 + b"\x10",
    b"\xff" * 4,
    b"\x00\x00\xc0\x7f",
    b"\x00" * 4,
]


@functools.cache
def original() -> bytes:
    """A file as it was written."""
    return gguf_files.write_golden("qwen2_tied", _FOLDER / "original.gguf", kind="Q8_0", fields=FIELDS).read_bytes()


@functools.cache
def head() -> int:
    """Bytes before the first tensor's."""
    return int(GGUFReader(_FOLDER / "original.gguf").data_offset) if original() else 0


@functools.cache
def edited_fields() -> list[bytes]:
    """Files whose fields are others, gone or absurd."""
    config, *_ = gguf_files.golden_case("qwen2_tied")
    given = gguf_files.fields_of("qwen2", config) | FIELDS
    values: list[Any] = [
        None,
        0,
        1,
        7,
        2**32 - 1,
        -1.5,
        float("nan"),
        float("inf"),
        "",
        "x",
        True,
        [1, 2],
        ["a", "b"],
        [0.5],
    ]
    made = []
    for key in given:
        for value in values:
            file = gguf_files.write_golden("qwen2_tied", _FOLDER / "edited.gguf", fields=FIELDS | {key: value})
            made.append(file.read_bytes())
    return made


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """Files of which the head, a field, the data or anything has changed."""
    raw, end = original(), head()
    how = draw(st.sampled_from(["head", "head", "odd", "odd", "field", "field", "whole", "cut"]))
    if how == "head":
        return draw(mangled(raw[:end])) + raw[end:]
    if how == "field":
        return draw(st.sampled_from(edited_fields()))
    if how == "whole":
        return draw(mangled(raw))
    at = draw(st.integers(0, end))
    if how == "cut":
        return raw[:at]
    odd = draw(st.sampled_from(ODD))
    return raw[:at] + odd + raw[at + len(odd) :]


def holds(raw: bytes, folder: Path) -> None:
    """Accepted weights are those in the file, by name and shape, all of them finite; its tokenizer splits and joins."""
    file = folder / "model.gguf"
    file.write_bytes(raw)
    found = refused(lambda: load_all(file))
    tokenizer = refused(lambda: Tokenizer.load(file))
    if tokenizer is not REFUSED and tokenizer is not None:
        ids = refused(lambda: tokenizer.encode("the hat"))
        assert ids is REFUSED or all(0 <= i < len(tokenizer) for i in ids)
    if found is REFUSED:
        return
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    for target, (name, array) in found.items():
        tensor = tensors[name]
        shape = [int(size) for size in reversed(tensor.shape)]
        expected = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        assert np.isfinite(array).all()
        np.testing.assert_array_equal(array, expected.T if target.endswith(".kernel") else expected, err_msg=target)


def load_all(file: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Every parameter by its path: the name of its tensor, and its numbers."""
    weights = hf.locate(file, read_config(file))
    return {target: (weights.stored[target].name, array) for target, array in hf.read(weights, weights.stored)}


KINDS = {"gguf": Kind(files(), holds)}
