"""Files that are written: complete or absent."""

import contextlib
import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

from kvjax import interrupts
from kvjax.errors import InputError


def check_writable(path: Path) -> None:
    """Raise `InputError` for a file that cannot be written, before work is done for it."""
    if number := _hindrance(path):
        raise InputError(f"cannot write {path}: {os.strerror(number)}")


def _hindrance(path: Path) -> int:
    """The system's number of what a file cannot be written for, 0 = nothing."""
    if path.is_dir():
        return errno.EISDIR
    target = path if path.exists() else path.absolute().parent
    if not target.exists():
        return errno.ENOENT
    if target != path and not target.is_dir():
        return errno.ENOTDIR
    return 0 if os.access(target, os.W_OK) else errno.EACCES


def write(path: Path, content: bytes) -> None:
    """Write a file: it is complete, or as it was before."""
    target = path.resolve()
    regular = target.is_file() or not target.exists()  # /dev/stdout is not
    new = target.with_name(f".kvjax-{os.getpid()}-{threading.get_ident()}.partial") if regular else target
    try:
        with interrupts.removing(new) if regular else contextlib.nullcontext():
            try:
                with new.open("wb") as file:
                    file.write(content)
                    if regular:  # else its name may be on disk before it is
                        file.flush()
                        os.fsync(file.fileno())
                if regular:
                    new.replace(target)
            finally:
                if regular:
                    new.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def write_json(path: Path, content: Any) -> None:
    """Write a file of JSON, indented, as `write` does."""
    write(path, (json.dumps(content, indent=2) + "\n").encode())
