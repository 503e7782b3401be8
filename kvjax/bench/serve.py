"""Requests that come and go: what methods make of the same bytes of cache, and transformers' continuous batching."""

import argparse
import bisect
import contextlib
import functools
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track

from kvjax import compilation
from kvjax.bench import hugging_face, models, report
from kvjax.bench.report import Column, Report, Section
from kvjax.checkpoint import shipped
from kvjax.engine import capacity
from kvjax.engine.capacity import Asked
from kvjax.engine.engine import Engine
from kvjax.errors import InputError
from kvjax.generation.model import Model
from kvjax.methods import LEARNED, make
from kvjax.policies.base import Recipe
from kvjax.tasks.text import shipped_text

PAGE, AT_ONCE = 64, 512  # transformers': tokens of a page, and those that a step reads at most


class Event(NamedTuple):
    """What is known of a request at a moment of `time.perf_counter`."""

    at: float
    tokens: int  # generated so far
    done: bool


Tell = Callable[[Event], None]


class Contestant(NamedTuple):
    """Something that serves requests.

    Attributes:
      name: for people.
      submit: takes token ids, the number of new ones, and what is to be told of them, from any thread.
      busy: seconds of reading and of decoding so far; None = it does not say.
      facts: what to report beside the times.
    """

    name: str
    submit: Callable[[Sequence[int], int, Tell], None]
    busy: Callable[[], tuple[float, float] | None]
    facts: dict[str, Any]


class Trace(NamedTuple):
    """One request as its client has seen it."""

    arrived: float  # when it was to be there
    new: int  # tokens that were wanted
    events: list[Event]  # each with more tokens than the one before

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.events[0].at - self.arrived

    @property
    def per_token(self) -> float:
        """Seconds of each token after the first ones."""
        begin, end = self.events[0], self.events[-1]
        return (end.at - begin.at) / max(end.tokens - begin.tokens, 1)


class Run(NamedTuple):
    """What came of a load once."""

    traces: list[Trace]
    seconds: float
    reading: float | None  # share of the busy time


@contextlib.contextmanager
def ours(model: Model, name: str, recipe: Recipe, cache: int, args: argparse.Namespace) -> Iterator[Contestant]:
    """An engine with as many seats as its cache has room for."""
    longest = args.prompt_tokens[1] + args.new_tokens[1]
    usual = Asked(sum(args.prompt_tokens) // 2, sum(args.new_tokens) // 2)
    crowded = lambda n: capacity.holds(model.decoder, recipe, n, longest, cache, usual) < n
    seats = max(1, bisect.bisect_left(range(1, args.seats + 1), True, key=crowded))
    with Engine(
        model, recipe, seats=seats, max_length=longest, cache=cache, stall=args.stall, queue=args.requests
    ) as engine:

        def submit(ids: Sequence[int], new: int, tell: Tell) -> None:
            request = engine.submit(ids, max_new_tokens=new, ignore_stop=True)
            more = lambda: tell(Event(time.perf_counter(), len(request.choices[0].tokens), request.done))
            request.listen(more)
            more()  # for what has come before

        facts = {"seats": seats, "cache_bytes": engine.cache_bytes}
        yield Contestant(name, submit, lambda: (engine.load.read_s, engine.load.decode_s), facts)


@contextlib.contextmanager
def theirs(model: Model, cache: int, args: argparse.Namespace) -> Iterator[Contestant]:
    """transformers' continuous batching, on the same checkpoint or on random weights of the same shape."""
    from transformers import ContinuousBatchingConfig, GenerationConfig  # pyright: ignore[reportMissingImports]

    spec, net = model.spec, hugging_face.causal(model)
    net.set_attn_implementation("sdpa")
    token = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * model.decoder.dtype.itemsize
    blocks = cache // (token * PAGE)
    config = ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=blocks, max_batch_tokens=AT_ONCE, max_requests_per_batch=args.seats,
        allow_block_sharing=False,
    )  # fmt: skip
    greedy = GenerationConfig(do_sample=False)
    with net.continuous_batching_context_manager(greedy, continuous_batching_config=config, timeout=10) as manager:
        tells: dict[str, Tell] = {}
        names = map(str, itertools.count())

        def submit(ids: Sequence[int], new: int, tell: Tell) -> None:
            name = next(names)
            tells[name] = tell
            if manager.is_running():
                manager.add_request(list(ids), name, max_new_tokens=new, record_timestamps=True, eos_token_id=-1)

        def listen() -> None:
            while not over.is_set():
                found = manager.get_result(timeout=0.1)
                if found is None and not manager.is_running():
                    time.sleep(0.1)  # its thread has ended: nobody gets more
                    for name in list(tells):
                        tells.pop(name)(Event(time.perf_counter(), 0, done=True))
                elif found is not None and found.is_finished():
                    tell, times = tells.pop(found.request_id), found.timestamps or []
                    for i, at in enumerate(times, 1):
                        tell(Event(at, i, done=False))
                    tell(Event(time.perf_counter(), len(found.generated_tokens), done=True))

        over, listener = threading.Event(), threading.Thread(target=listen)
        listener.start()
        try:
            yield Contestant(
                hugging_face.NAME, submit, lambda: None, {"seats": args.seats, "cache_bytes": blocks * PAGE * token}
            )
        finally:
            over.set()
            listener.join()


def drive(contestant: Contestant, asks: Sequence[tuple[list[int], int]], clients: int, at: Sequence[float]) -> Run:
    """Let requests be served, and watch.

    Args:
      contestant: serves.
      asks: token ids and the number of new tokens of each.
      clients: that ask, one request after the other.
      at: seconds at which the requests arrive, whoever is still there; empty = when a client is free.
    """
    told: queue.Queue[tuple[int, Event]] = queue.Queue()
    traces: list[Trace] = []
    began, before, running = time.perf_counter(), contestant.busy(), set[int]()
    while len(traces) < len(asks) or running:
        i, now = len(traces), time.perf_counter()
        wait = None if i == len(asks) else began + at[i] - now if at else 0.0 if len(running) < clients else None
        if wait is not None and wait <= 0:
            ids, new = asks[i]
            traces.append(Trace(began + at[i] if at else now, new, []))
            running.add(i)
            contestant.submit(ids, new, lambda event, i=i: told.put((i, event)))
            continue
        try:
            i, event = told.get(timeout=wait)
        except queue.Empty:
            continue
        if event.tokens > (traces[i].events[-1].tokens if traces[i].events else 0):
            traces[i].events.append(event)
        if event.done:
            running.discard(i)
    seconds, after = time.perf_counter() - began, contestant.busy()
    reading = None
    if before is not None and after is not None:
        read, decode = (b - a for a, b in zip(before, after, strict=True))
        reading = read / (read + decode)
    return Run(traces, seconds, reading)


def row(contestant: Contestant, runs: Sequence[Run], first: Sequence[Run]) -> dict[str, Any]:
    """Medians over the rounds, and latencies of all requests; `x` is of the same round of the first contestant."""
    traces = [trace for run in runs for trace in run.traces if trace.events]
    tokens = lambda run: sum(trace.events[-1].tokens for trace in run.traces if trace.events) / run.seconds
    speeds = [tokens(run) for run in runs]
    finished = lambda trace: bool(trace.events) and trace.events[-1].tokens >= trace.new
    spent = lambda run: sum(trace.events[-1].at - trace.events[0].at for trace in run.traces if trace.events)
    gaps = [b.at - a.at for trace in traces for a, b in itertools.pairwise(trace.events)]
    times = {"ttft": [t.first for t in traces], "tpot": [t.per_token for t in traces], "gap": gaps}
    reading = [run.reading for run in runs if run.reading is not None]
    return {
        "name": contestant.name,
        "per_s": float(np.median(speeds)),
        "x": float(np.median([speed / tokens(other) for speed, other in zip(speeds, first, strict=True)])),
        "requests_per_s": float(np.median([sum(finished(t) for t in run.traces) / run.seconds for run in runs])),
        "reading": float(np.median(reading)) if reading else None,
        "decoding": float(np.median([spent(run) / run.seconds for run in runs])),
        **{f"{n}_p{p}": float(np.percentile(each, p)) for n, each in times.items() if each for p in (50, 99)},
        "unfinished": sum(not finished(t) for run in runs for t in run.traces),
        "seconds": [run.seconds for run in runs],
        **contestant.facts,
    }


def requests(model: Model, args: argparse.Namespace) -> list[tuple[list[int], int]]:
    """Token ids and numbers of new tokens: stretches of the shipped text, or random ids without a tokenizer."""
    rng = np.random.default_rng(args.seed)
    most = args.prompt_tokens[1]
    if model.tokenizer is None:
        ids = rng.integers(0, model.spec.vocab_size, 16 * most).tolist()
    else:
        ids = model.tokenizer.encode(shipped_text()[: 64 * most])
    draw = lambda bounds: int(rng.integers(bounds[0], bounds[1] + 1))
    found = []
    for _ in range(args.requests):
        length, start = draw(args.prompt_tokens), int(rng.integers(max(1, len(ids) - most)))
        found.append((ids[start : start + length], draw(args.new_tokens)))
    return found


SECONDS = "{:.2f}".format
MILLISECONDS = lambda s: f"{1e3 * s:,.0f}"
COLUMNS = (
    Column("seats", "seats", str),
    Column("cache MB", "cache_bytes", lambda n: f"{n / 1e6:,.1f}"),
    Column("tokens/s", "per_s", "{:,.1f}".format),
    Column("x first", "x"),
    Column("requests/s", "requests_per_s", "{:.3f}".format),
    Column("reading", "reading", "{:.0%}".format),
    Column("decoding at once", "decoding", "{:.1f}".format),
    Column("TTFT s p50", "ttft_p50", SECONDS),
    Column("p99", "ttft_p99", SECONDS),
    Column("TPOT ms p50", "tpot_p50", MILLISECONDS),
    Column("p99", "tpot_p99", MILLISECONDS),
    Column("gap ms p99", "gap_p99", MILLISECONDS),
    Column("unfinished", "unfinished", str),
)


def run(args: argparse.Namespace, command_line: list[str]) -> Report:
    """What the command line asks for."""
    compilation.enable_compilation_cache()
    model = models.load(args.model, args.dtype)
    longest = args.prompt_tokens[1] + args.new_tokens[1]
    if longest > model.spec.max_position:
        raise InputError(f"{longest} tokens pass the context limit ({model.spec.max_position})")
    asks = requests(model, args)
    cache = capacity.shared(model.decoder, make("full"), args.seats, longest, args.pool)
    retrofitted = functools.cache(lambda: models.load(shipped.DMC, args.dtype))
    with contextlib.ExitStack() as stack:
        found = []
        for name, recipe in args.recipes.items():
            own = retrofitted() if recipe.name in LEARNED and args.model == "demo" else model
            found.append(stack.enter_context(ours(own, name, recipe, cache, args)))
        if args.against:
            found.append(stack.enter_context(theirs(model, cache, args)))
        for contestant in found:
            drive(contestant, asks[:1], 1, [])  # what is not compiled yet
        sections = [_section(found, asks, args, "closed loop", [])]
        for load in args.loads:
            rate = load * sections[0].rows[0]["requests_per_s"]
            gaps = np.random.default_rng(args.seed).exponential(1 / rate, len(asks))
            sections.append(_section(found, asks, args, f"open loop, {rate:.3f} requests/s", np.cumsum(gaps).tolist()))
    facts = {n: getattr(args, n) for n in ("prompt_tokens", "new_tokens", "requests", "clients", "pool", "stall")}
    about = report.about(command_line, model=model.name, dtype=model.decoder.dtype.name, cache_bytes=cache, **facts)
    return Report("serve", about, COLUMNS, COLUMNS[2], sections)


def _section(
    contestants: Sequence[Contestant],
    asks: Sequence[tuple[list[int], int]],
    args: argparse.Namespace,
    title: str,
    at: Sequence[float],
) -> Section:
    """All take turns."""
    runs: dict[str, list[Run]] = {contestant.name: [] for contestant in contestants}
    for _ in track(range(args.rounds), description=title, transient=True, console=Console(stderr=True)):
        for contestant in contestants:
            runs[contestant.name].append(drive(contestant, asks, args.clients, at))
    rows = [row(each, runs[each.name], runs[contestants[0].name]) for each in contestants]
    (low, high), (few, many) = args.prompt_tokens, args.new_tokens
    return Section(f"{title}: {len(asks)} requests, {low}-{high} tokens and {few}-{many} new ones", rows)
