"""Files that are written: complete or absent."""

import contextlib
import os
from pathlib import Path

from kvjax import interrupts
from kvjax.errors import InputError


def check_writable(path: Path) -> None:
    """Raise `InputError` for a file that cannot be written, before work is done for it."""
    target = path if path.exists() else path.absolute().parent
    if path.is_dir() or not target.exists() or not os.access(target, os.W_OK):
        raise InputError(f"cannot write {path}")


def write(path: Path, content: bytes) -> None:
    """Write a file: it is complete, or as it was before."""
    target = path.resolve()
    regular = target.is_file() or not target.exists()  # /dev/stdout is not
    new = target.with_name(f".kvjax-{os.getpid()}.partial") if regular else target
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
