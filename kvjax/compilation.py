"""Compiled programs are kept on disk; whoever waits for one that is not there yet is told so."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from kvjax import interrupts

PATIENCE = 2.0  # seconds of tracing and compiling until a line says so
_STAGES = "/jax/core/compile/"  # what JAX calls them: trace, lower, compile


def enable_compilation_cache(directory: str | os.PathLike[str] | None = None) -> None:
    """Keep compiled programs on disk, so that the next process that needs them starts at once; the commands do.

    Args:
      directory: where; None = `$JAX_COMPILATION_CACHE_DIR`, else `kvjax/compiled` in `$XDG_CACHE_HOME` or `~/.cache`.

    `JAX_ENABLE_COMPILATION_CACHE=false` in the environment turns it off again, for commands as well. JAX never removes
    what it has kept, unless `JAX_COMPILATION_CACHE_MAX_SIZE` says how many bytes there may be.

    Cost: a program is traced in every process, which is most of what a second run waits for (docs/performance.md).
    """
    earlier = jax.config.values["jax_compilation_cache_dir"]
    if directory is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        directory = earlier or Path(base) / "kvjax" / "compiled"
    folder = os.fspath(directory)
    if folder != earlier:
        compilation_cache.reset_cache()  # else what JAX has opened stays in use
        jax.config.update("jax_compilation_cache_dir", folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # small programs are many
    interrupts.doubt(Path(folder))


@contextmanager
def few_programs(most: int = 300) -> Iterator[Callable[[], None]]:
    """Yields what makes JAX forget its programs once it has compiled more than `most`: they would fill the memory."""
    compiled: list[str] = []

    def count(event: str, duration_secs: float, **_: str | int) -> None:
        del duration_secs
        if event == f"{_STAGES}backend_compile_duration":
            compiled.append(event)

    def forget() -> None:
        if len(compiled) > most:
            jax.clear_caches()
            compiled.clear()

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield forget
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


@contextmanager
def announced() -> Iterator[None]:
    """Print one line on a terminal's stderr, once programs have been traced and compiled for `PATIENCE`."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    waiting = _Waiting()
    jax.monitoring.register_scalar_listener(waiting.begin)
    jax.monitoring.register_event_time_span_listener(waiting.end)
    try:
        yield
    finally:
        jax.monitoring.unregister_scalar_listener(waiting.begin)
        jax.monitoring.unregister_event_time_span_listener(waiting.end)
        waiting.stop()


class _Waiting:
    """How long a process has been compiling; stages nest, and threads compile at once."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._under_way, self._began, self._waited = 0, 0.0, 0.0
        self._told, self._timer = False, threading.Timer(0, self._tell)

    def begin(self, event: str, value: float | int, **_: str | int) -> None:
        """JAX begins a stage."""
        del value
        if not event.startswith(_STAGES):
            return
        with self._lock:
            self._under_way += 1
            if self._under_way > 1 or self._told:
                return
            self._began = time.monotonic()
            self._timer = threading.Timer(max(PATIENCE - self._waited, 0), self._tell)
            self._timer.daemon = True
            self._timer.start()

    def end(self, event: str, start_time: float, end_time: float, **_: str | int) -> None:
        """JAX ends a stage."""
        del start_time, end_time
        if not event.startswith(_STAGES):
            return
        with self._lock:
            self._under_way -= 1
            if not self._under_way:
                self._waited += time.monotonic() - self._began
                self._timer.cancel()

    def stop(self) -> None:
        """Say nothing any more."""
        with self._lock:
            self._told = True
            self._timer.cancel()

    def _tell(self) -> None:
        with self._lock:
            if self._told:
                return
            self._told = True
        print("compiling ...", file=sys.stderr, flush=True)
