"""Ctrl-C in a command line: the process is gone at once with status 130, and nothing half-written stays behind.

Python handles a signal between two steps of the main thread: it is deaf while XLA compiles, shows a traceback while
modules are imported, and JAX's threads do not survive an interpreter that ends beside them. So a thread of its own
waits for the signal and ends the process. It listens from the first line of the package on, in `python -m kvjax...`
and `kvjax ...` only: programs that import kvjax keep `KeyboardInterrupt`.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS = 130  # what shells say of a program that SIGINT ended
_REMOVE = f'rm -rf -- "$@" 2>/dev/null; exit {STATUS}'
_NEW = 1.0  # seconds; a file of a program takes less to be written
_unfinished: list[str] = []
_caches: list[str] = []


@contextmanager
def removing(path: Path) -> Iterator[None]:
    """Remove a file or folder, if it is there, when the command is interrupted meanwhile.

    What else goes wrong is the caller's to clean up.
    """
    name = str(path.absolute())
    _unfinished.append(name)
    try:
        yield
    finally:
        _unfinished.remove(name)


def doubt(folder: Path) -> None:
    """Remove a folder's newest files when the command is interrupted; JAX writes compiled programs in place."""
    _caches.append(str(folder))


def _is_command() -> bool:
    """Whether a module of this package is being started by `python -m`, which says -m until it has found it."""
    return sys.argv[:1] == ["-m"] and f"{sys.orig_argv[-len(sys.argv)].removeprefix('-m')}.".startswith("kvjax.")


def listen() -> None:
    """Hear Ctrl-C from now on, unless it is ignored or somebody else hears it."""
    if os.name != "posix" or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # in the background of a shell script, SIGINT is ignored
    told, tell = socket.socketpair()
    tell.setblocking(False)
    threading.Thread(target=_wait, args=(told,), daemon=True).start()
    signal.set_wakeup_fd(tell.detach(), warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _park)
    os.register_at_fork(after_in_child=_forget)


def _wait(told: socket.socket) -> None:
    while told.recv(1)[0] != signal.SIGINT:
        pass
    _leave()


def _leave() -> None:
    """End the process, from any thread, whatever the others do."""
    if os.isatty(2):
        os.write(2, b"\x1b[?25h\n")  # progress bars hide the cursor
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # for what follows, if it is pressed again
    try:
        if doubtful := [*_unfinished, *_newest()]:  # once this process is another program, none of its threads writes
            os.execv("/bin/sh", ["sh", "-c", _REMOVE, "sh", *doubtful])
    finally:
        os._exit(STATUS)


def _newest() -> list[str]:
    files = [file for folder in _caches if os.path.isdir(folder) for file in os.scandir(folder)]
    return [file.path for file in files if abs(time.time() - file.stat().st_mtime) < _NEW]


def _park(*_: object) -> None:
    """Stop the main thread where it is, so that it makes nothing of files that vanish under it."""
    while True:
        time.sleep(60)


def _forget() -> None:
    """Leave forked processes what Python does by itself."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)


if _is_command():
    listen()
