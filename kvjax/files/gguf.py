"""GGUF files: what a file says of itself, believed only as far as its size allows.

A file is a magic, a version, fields, descriptions of tensors, then their data; a model may be split over several.
The `gguf` package knows the tensor types. Its own reader takes twenty times as long for the 262,144 tokens of Gemma 3,
and goes through as many elements as a file claims to have.

Source: ggml, `docs/gguf.md`.
"""

import functools
import mmap
import os
import re
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple

import numpy as np

from kvjax.errors import InputError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d"}
_PACKED = {kind: Struct(code) for kind, code in _SCALARS.items()}
_U32, _FLOAT, _STRING, _ARRAY, _U64 = 4, 6, 8, 9, 10
_MOST = 2**24  # elements of an array, fields, tensors: far more than any model has
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


class Tensor(NamedTuple):
    """Where a tensor is and what it is."""

    file: Path
    name: str
    kind: str  # of its numbers, "Q4_K" for example
    shape: tuple[int, ...]  # rows first
    offset: int  # of its data in the file [bytes]
    nbytes: int


class Gguf(NamedTuple):
    """What is in a GGUF file, and in the other parts of a model that is split; no weights."""

    path: Path
    fields: dict[str, Any]  # numbers, texts, lists of either
    tensors: dict[str, Tensor]


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a file which is called .gguf, or begins like one."""
    if not os.path.isfile(path):  # unlike a Path's, it never raises, however long the name
        return False
    try:
        with open(path, "rb") as file:
            return path.suffix == ".gguf" or file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read(path: Path) -> Gguf:
    """The content of a file and of all parts of its model; `InputError` where it cannot be what it says."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    return _read_all(path, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=1)  # one model's configuration, tokenizer and tensors are asked for one after the other
def _read_all(path: Path, size: int, changed: int) -> Gguf:
    first = _read_one(path)
    count = first.fields.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return first
    named = _PART.search(path.name)
    if named is None or int(named[2]) != count:
        raise InputError(f"{path}: is a part of {count}, but not called ...-00001-of-{count:05}.gguf")
    files = [path.with_name(f"{path.name[: named.start()]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise InputError(f"{missing[0]}: is missing, one of {count} parts of a model ({len(missing)} of them are)")
    tensors: dict[str, Tensor] = {}
    for i, file in enumerate(files):
        part = first if file == path else _read_one(file)
        if (part.fields.get("split.no"), part.fields.get("split.count")) != (i, count):
            raise InputError(f"{file}: is not part {i + 1} of {count} of a model, as its name says")
        if twice := tensors.keys() & part.tensors.keys():
            raise InputError(f"{file}: tensor {min(twice)} is in another part, too")
        first = part if i == 0 else first
        tensors |= part.tensors
    if len(tensors) != first.fields.get("split.tensors.count", len(tensors)):
        raise InputError(f"{path}: its parts have {len(tensors)} tensors, not {first.fields['split.tensors.count']}")
    return Gguf(files[0], first.fields, tensors)


def first_part(path: Path) -> Path:
    """The file that has the fields of a model of which `path` is a part."""
    named = _PART.search(path.name)
    return path if named is None else path.with_name(f"{path.name[: named.start()]}-00001-of-{named[2]}.gguf")


def numbers(tensor: Tensor, start: int = 0, count: int | None = None) -> np.ndarray:
    """The bytes of a tensor, or some of them."""
    count = tensor.nbytes if count is None else count
    try:
        raw = np.fromfile(tensor.file, np.uint8, count, offset=tensor.offset + start)
    except OSError as error:
        raise InputError(f"{tensor.file}: tensor {tensor.name} cannot be read ({error})") from None
    if raw.size < count:
        raise InputError(f"{tensor.file}: tensor {tensor.name} cannot be read (the file has become shorter)")
    return raw


class _Cursor:
    """A place in a file that moves on as values are read."""

    def __init__(self, path: Path, raw: Any):
        self.path, self.raw, self.at, self.size = path, raw, 0, len(raw)

    def take(self, count: int) -> int:
        """Pass over so many bytes; where they begin."""
        at, self.at = self.at, self.at + count
        if self.at > self.size:
            raise damaged(self.path, f"{count:,} bytes are to follow byte {at:,} of {self.size:,}")
        return at

    def scalar(self, kind: int) -> Any:
        packed = _PACKED[kind]
        (value,) = packed.unpack_from(self.raw, self.take(packed.size))
        # 1e-05, not 9.999999747378752e-06: the shortest number that is this one in float32
        return float(str(np.float32(value))) if kind == _FLOAT else value

    def text(self) -> str:
        count = self.scalar(_U64)
        at = self.take(count)
        try:
            return self.raw[at : at + count].decode()
        except UnicodeDecodeError:
            raise damaged(self.path, f"the text at byte {at:,} is not UTF-8") from None

    def count(self, what: str, least: int) -> int:
        """A number of things that take at least so many bytes each."""
        count = self.scalar(_U64)
        if count > min(_MOST, (self.size - self.at) // least):
            raise damaged(self.path, f"it claims {count:,} {what}")
        return count

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _PACKED:
            return self.scalar(kind)
        kind = self.scalar(_U32) if kind == _ARRAY else -1
        if kind == _STRING:
            return [self.text() for _ in range(self.count("texts", 8))]
        if kind not in _PACKED:
            raise damaged(self.path, f"a field before byte {self.at:,} is of an unknown type")
        width = _PACKED[kind].size
        count = self.count("numbers", width)
        return np.frombuffer(self.raw, np.dtype(_SCALARS[kind]), count, self.take(count * width)).tolist()


def damaged(path: Path, why: str) -> InputError:
    """The error for a file that is not what it says."""
    return InputError(f"{path}: is truncated or not a GGUF file ({why})")


def _read_one(path: Path) -> Gguf:
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
            return _parse(path, _Cursor(path, raw))
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise damaged(path, "it is empty" if isinstance(error, ValueError) else str(error)) from None


def _parse(path: Path, cursor: _Cursor) -> Gguf:
    at = cursor.take(len(MAGIC))
    if cursor.raw[at : cursor.at] != MAGIC:
        raise damaged(path, f"it does not begin with {MAGIC.decode()}")
    version = cursor.scalar(_U32)
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        what = "is big-endian" if swapped in VERSIONS else f"is GGUF version {version}"
        raise InputError(
            f"{path}: {what}; kvjax reads little-endian files of version {' and '.join(map(str, VERSIONS))}"
        )
    tensors, fields = cursor.count("tensors", 24), cursor.count("fields", 13)
    found: dict[str, Any] = {}
    for _ in range(fields):
        key = cursor.text()
        if key in found:
            raise damaged(path, f"field {key} is there twice")
        found[key] = cursor.value(cursor.scalar(_U32))
    described = [_described(cursor) for _ in range(tensors)]
    alignment = found.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise damaged(path, f"general.alignment is {alignment!r}, expected a power of two")
    return Gguf(path, found, _placed(path, described, -(-cursor.at // alignment) * alignment, cursor.size, alignment))


def _described(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset of a tensor."""
    name, dims = cursor.text(), cursor.scalar(_U32)
    if not 1 <= dims <= 4:
        raise damaged(cursor.path, f"tensor {name} has {dims} dimensions")
    shape = tuple(cursor.scalar(_U64) for _ in range(dims))[::-1]
    return name, shape, cursor.scalar(_U32), cursor.scalar(_U64)


def _placed(path: Path, described: list[Any], start: int, size: int, alignment: int) -> dict[str, Tensor]:
    """The tensors by name; raises `InputError` unless each has its own bytes of the file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    known, found = {kind.value: kind for kind in GGMLQuantizationType}, {}
    for name, shape, kind, offset in described:
        if kind not in known:
            raise InputError(f"{path}: tensor {name} is of type {kind}, which the gguf package does not know")
        block, width = GGML_QUANT_SIZES[known[kind]]
        if name in found:
            raise damaged(path, f"tensor {name} is there twice")
        if min(shape) < 1 or shape[-1] % block:
            raise damaged(path, f"tensor {name} has shape {list(shape)}, of {known[kind].name} in blocks of {block}")
        nbytes = functools.reduce(int.__mul__, shape) // block * width
        if offset % alignment or start + offset + nbytes > size:
            raise damaged(path, f"tensor {name} has {nbytes:,} bytes at {start + offset:,} of {size:,}")
        found[name] = Tensor(path, name, known[kind].name, shape, start + offset, nbytes)
    end = start
    for tensor in sorted(found.values(), key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            raise damaged(path, f"tensor {tensor.name} overlaps another")
        end = tensor.offset + tensor.nbytes
    return found
