"""Files that are written: complete or absent."""

import contextlib
import errno
import json
import os
import stat
import threading
from pathlib import Path
from typing import IO, Any

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
    """Write a file: it is complete, or as it was before, also when the process is killed."""
    target = path.resolve()
    regular = target.is_file() or not target.exists()  # /dev/stdout is not
    new = target.with_name(f".kvjax-{os.getpid()}-{threading.get_ident()}.partial") if regular else target
    try:
        with interrupts.removing(new) if regular else contextlib.nullcontext():
            try:
                with _begun(new) if regular else new.open("wb") as file:
                    file.write(content)
                    if regular:  # else its name may be on disk before it is
                        file.flush()
                        os.fsync(file.fileno())
                        new.replace(target)
            finally:
                if regular:
                    new.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
    if regular:
        _remove_abandoned(target.parent)


def _begun(new: Path) -> IO[bytes]:
    """A new file, locked for as long as it is written."""
    while True:
        file = new.open("wb")
        _lock(file, wait=True)
        if os.fstat(file.fileno()).st_nlink:  # else it was taken for an abandoned one
            return file
        file.close()


def _remove_abandoned(folder: Path) -> None:
    """Remove what processes that were killed have left of files: nobody locks it any more."""
    for left in folder.glob(".kvjax-*.partial"):
        with contextlib.suppress(OSError):
            if stat.S_ISREG(left.lstat().st_mode):
                with left.open("rb") as file:
                    if _lock(file, wait=False):
                        left.unlink()


def _lock(file: IO[bytes], *, wait: bool) -> bool:
    """Whether a file could be locked; not every system has locks."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (ImportError, OSError):
        return False
    return True


def write_json(path: Path, content: Any) -> None:
    """Write a file of JSON, indented, as `write` does."""
    write(path, (json.dumps(content, indent=2) + "\n").encode())
