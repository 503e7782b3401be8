"""A directory that is complete or absent: built beside its place, by one process at a time, and renamed into it.

.NAME.partial/lock    locked for as long as someone builds
.NAME.partial/stage   becomes NAME
"""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import jax

from kvjax import interrupts
from kvjax.errors import InputError
from kvjax.parallel import mesh


@contextmanager
def staged(dst: Path) -> Iterator[Path]:
    """A directory beside `dst` that becomes `dst` when the block ends well.

    Raises `InputError` if `dst` is there, if another process is building it, and for every `OSError` of the block. What
    a process that was killed has left is cleared. Of the processes of one run the first does all this.
    """
    hidden, first = dst.parent / f".{dst.name}.partial", jax.process_index() == 0
    try:
        mesh.meet(f"{dst} is not there")
        with _alone(hidden, dst) if first else nullcontext():
            mesh.meet(f"{dst} is begun")
            yield hidden / "stage"
            mesh.meet(f"{dst} is written")
            if first:
                check_absent(dst)
                (hidden / "stage").rename(dst)
        mesh.meet(f"{dst} is done")
    except OSError as error:
        raise InputError(f"{dst}: cannot be written ({error})") from error


@contextmanager
def _alone(hidden: Path, dst: Path) -> Iterator[None]:
    """Hold the lock, with an empty stage beside it; nothing of either is left in the end."""
    check_absent(dst)
    hidden.parent.mkdir(parents=True, exist_ok=True)
    made = True
    try:
        hidden.mkdir()
    except FileExistsError:
        made = False
    lock = os.open(hidden / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    os.set_inheritable(lock, True)  # by what removes the stage after Ctrl-C
    try:
        _take(lock, hidden, dst, made)
        try:
            check_absent(dst)  # another process may have been quicker
            shutil.rmtree(hidden / "stage", ignore_errors=True)
            (hidden / "stage").mkdir()
            with interrupts.removing(hidden / "stage"), interrupts.removing(hidden):  # one after the other
                yield
        finally:
            _remove(hidden / "stage")
            (hidden / "lock").unlink(
                missing_ok=True
            )  # last of all: who finds no lock, or one of its own, meets no files of ours
            with suppress(OSError):  # another process has its lock there by now
                hidden.rmdir()
    finally:
        os.close(lock)


def _remove(folder: Path) -> None:
    """Remove a folder, if it is there, into which threads of an Orbax call that has failed may go on writing."""
    for _ in range(100):
        if not folder.exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)  # what they have begun takes them milliseconds


def _take(lock: int, hidden: Path, dst: Path, made: bool) -> None:
    """Lock a file, or raise `InputError`; where there are no locks, whoever made the directory has it."""
    busy = f"{dst}: another process is writing it; wait for it, or choose another directory"
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(busy) from None
    except (ImportError, OSError):
        if not made:
            raise InputError(
                f"{dst}: {hidden} is there: another process is writing it, or was killed: then remove it"
            ) from None
    if not (hidden / "lock").exists() or not os.path.samestat(os.fstat(lock), os.stat(hidden / "lock")):
        raise InputError(busy)  # it has just ended, and its lock is gone


def check_absent(dst: Path) -> None:
    """Raise `InputError` if there is something."""
    if os.path.lexists(dst):
        raise InputError(f"{dst}: exists already; remove it or choose another directory")
