"""Time that work takes, compilation apart."""

import time

import jax


class Stopwatch:
    """Wall-clock laps without the time that JAX spends on tracing and compiling."""

    def __enter__(self) -> "Stopwatch":
        self.compile_s = 0.0
        self._spans: list[tuple[float, float]] = []
        jax.monitoring.register_event_time_span_listener(self._listen)
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        jax.monitoring.unregister_event_time_span_listener(self._listen)

    def _listen(self, event: str, start_time: float, end_time: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            self._spans.append((start_time, end_time))

    def lap(self) -> float:
        """Seconds since the last lap."""
        now, compiling, reached = time.perf_counter(), 0.0, 0.0
        for start, end in sorted(self._spans):  # spans of nested functions overlap
            compiling += max(end - max(start, reached), 0.0)
            reached = max(reached, end)
        lap = max(now - self._start - compiling, 0.0)
        self.compile_s += compiling
        self._start, self._spans = now, []
        return lap
