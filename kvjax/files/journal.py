"""What a run writes so that it may end at any moment: lines that are appended, and a lock on its folder."""

import json
import os
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import IO, Any

from kvjax.errors import InputError
from kvjax.files.text import parse_json

AGAIN = "what is finished stays: make room, then start the same command again to go on"


def open_lines(path: Path) -> FileIO:
    """A file to append lines to; what could not be written is not tried again when it is closed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a+b", buffering=0)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def append(file: FileIO, lines: Iterable[dict[str, Any]]) -> None:
    """Write lines of JSON at once, and make sure that they are on disk."""
    _append(file, "".join(json.dumps(line) + "\n" for line in lines).encode())


def recover(file: FileIO) -> list[tuple[int, Any]]:
    """The numbered lines of a file from `open_lines`, which is made ready for more: a torn last one is cut off."""
    file.seek(0)
    raw = file.readall()
    found = list(lines(raw, Path(str(file.name))))
    end = found[-1][2] if found else 0
    if len(raw) > end:
        file.truncate(end)
    if end and not raw[:end].endswith((b"\n", b"\r")):
        _append(file, b"\n")
    return [(number, line) for number, line, _ in found]


def lines(raw: bytes, path: Path) -> Iterator[tuple[int, Any, int]]:
    """Yield the number of each line, from 1, what it says and where it ends [bytes]; blank lines are passed over.

    A last line without its end is what a killed run has left of it: if it is not JSON, it is left out. Any other is an
    error.

    Args:
      raw: what is in the file.
      path: the file, for errors.
    """
    pieces, end = raw.splitlines(keepends=True), 0
    for number, piece in enumerate(pieces, 1):
        end += len(piece)
        if not piece.strip():
            continue
        try:
            line = parse_json(piece, f"{path}:{number}")
        except InputError:
            if number == len(pieces) and not piece.endswith((b"\n", b"\r")):
                return
            raise
        yield number, line, end


def lock(file: IO, path: Path) -> None:
    """Refuse what another process is writing; the lock ends when the file is closed, or with the process.

    Args:
      file: is locked.
      path: what it stands for, for the error.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise InputError(f"another run is writing {path} ({error.strerror}): choose another --out") from None


def _append(file: FileIO, content: bytes) -> None:
    left = memoryview(content)
    try:
        while left:  # a disk that becomes full takes a part
            left = left[file.write(left) :]
        os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"cannot write {file.name}: {error.strerror}; {AGAIN}") from None
