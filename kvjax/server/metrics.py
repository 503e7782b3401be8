"""What a server counts, as Prometheus reads it."""

from collections.abc import Iterator

import prometheus_client as prometheus
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvjax.engine.engine import Engine
from kvjax.engine.request import Request
from kvjax.generation.accounting import full_bytes

SECONDS = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


class Metrics(Collector):
    """Counters of requests, and what an engine is busy with whenever it is asked.

    Args:
      engine: whose.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self.registry = prometheus.CollectorRegistry()
        self.registry.register(self)
        seconds = lambda name, help_: prometheus.Histogram(name, help_, buckets=SECONDS, registry=self.registry)
        counter = lambda name, help_, labels=(): prometheus.Counter(name, help_, labels, registry=self.registry)
        self.requests = counter("kvjax_requests", "Requests that have ended, by how", ["reason"])
        self.refused = counter("kvjax_refused", "Requests that were answered by an error, by its status", ["status"])
        self.prompt_tokens = counter("kvjax_prompt_tokens", "Tokens of prompts that were read")
        self.cached_tokens = counter("kvjax_cached_tokens", "Tokens of contexts that prompts followed")
        self.new_tokens = counter("kvjax_generated_tokens", "Tokens that were generated")
        self._queue = seconds("kvjax_queue_seconds", "Until a prompt began to be read")
        self._read = seconds("kvjax_read_seconds", "From then to the first token")
        self._first = seconds("kvjax_time_to_first_token_seconds", "From submission")
        self._token = seconds("kvjax_time_per_token_seconds", "Of a request's choices after their first token, mean")
        self._whole = seconds("kvjax_request_seconds", "From submission to the end")

    def ended(self, request: Request, now: float, reason: str) -> None:
        """Count a request that has ended, at a moment of `time.monotonic`."""
        self.requests.labels(reason).inc()
        submitted, *later = request.times
        new = sum(len(choice.tokens) for choice in request.choices)
        self.new_tokens.inc(new)
        self._whole.observe(now - submitted)
        if later:
            self._queue.observe(later[0] - submitted)
        if len(later) > 1:
            self.prompt_tokens.inc(len(request.prompt))
            self.cached_tokens.inc(len(request.whole) - len(request.prompt))
            self._read.observe(later[1] - later[0])
            self._first.observe(later[1] - submitted)
            if (most := max(len(choice.tokens) for choice in request.choices)) > 1:
                self._token.observe((now - later[1]) / (most - 1))

    def collect(self) -> Iterator[Metric]:
        """What the engine does now."""
        load, model = self._engine.load, self._engine.model
        gauge = GaugeMetricFamily
        yield gauge("kvjax_requests_waiting", "Requests in the queue", load.waiting)
        yield gauge("kvjax_requests_reading", "Requests whose prompt is being read", load.reading)
        yield gauge("kvjax_sequences_decoding", "Sequences that decode", load.decoding)
        yield gauge("kvjax_seats", "Sequences that can decode side by side", load.seats)
        for name, help_, counts in (
            ("kvjax_pages", "Pages of each tier of the cache", load.pages),
            ("kvjax_pages_promised", "Of these, to requests that are read or decode", load.promised),
            ("kvjax_context_pages", "Pages of each tier of contexts, then of what follows them", load.context_pages),
            ("kvjax_context_pages_promised", "Of these, to contexts and requests", load.context_promised),
        ):
            pages = gauge(name, help_, labels=["tier"])
            for i, count in enumerate(counts):
                pages.add_metric([str(i)], count)
            yield pages
        yield gauge("kvjax_contexts", "Contexts that are kept, or are being read", load.contexts)
        yield gauge("kvjax_contexts_most", "Contexts that there are places for", load.most_contexts)
        yield gauge("kvjax_context_tokens", "Tokens of the contexts", load.context_tokens)
        yield gauge(
            "kvjax_context_cache_bytes", "Allocated for contexts and what follows them", load.context_cache_bytes
        )
        yield gauge("kvjax_cache_bytes", "Allocated for the cache of all seats", load.cache_bytes)
        full = full_bytes(model, [self._engine.max_length] * self._engine.seats)
        yield gauge(
            "kvjax_full_cache_bytes", "That a full cache of as many sequences of the largest length needs", full
        )
        yield gauge("kvjax_sequence_tokens", "Tokens of the sequences that decode", sum(load.tokens))
        full = full_bytes(model, load.tokens)
        yield gauge("kvjax_sequence_full_bytes", "That a full cache of these tokens needs", full)

    def text(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return prometheus.generate_latest(self.registry)
