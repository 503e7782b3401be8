"""Hashes of files and arrays: they see changes and damage, not forgery (XXH3, 128 bits)."""

import hashlib
import json
from pathlib import Path

import numpy as np
import xxhash


def of_bytes(content: bytes) -> str:
    """Of some bytes."""
    return xxhash.xxh3_128_hexdigest(content)


def of_file(path: Path) -> str:
    """Of a file's content; reads it in pieces."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()  # pyright: ignore[reportArgumentType]


def of_folder(path: Path) -> str:
    """Of all files in a folder and its folders, with their names."""
    files = sorted(file for file in path.rglob("*") if not file.is_dir())
    return of_bytes(json.dumps([[file.relative_to(path).as_posix(), of_file(file)] for file in files]).encode())


def of_array(array: np.ndarray) -> str:
    """Of an array's numbers, as they lie in memory; its shape and dtype do not count."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
