"""A server under more than it can do: what comes back, and that nothing stays behind."""

import concurrent.futures
import contextlib
import ctypes
import itertools
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import kvjax
from kvjax.engine.capacity import tiers
from kvjax.server.app import Service
from tests.test_serve import ENDLESS, start, wait

pytestmark = pytest.mark.slow
SEATS, QUEUE, LENGTH, STALL = 4, 8, 4096, 0.1
SECONDS = 60.0  # of load
GROWTH = 32 << 20  # bytes that a process may grow by


@pytest.fixture(scope="module")
def engine() -> Iterator[kvjax.Engine]:
    with kvjax.Engine(
        kvjax.load(), "h2o", 64, seats=SEATS, max_length=LENGTH, queue=QUEUE, stall=STALL, max_new_tokens=256
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine) -> Iterator[str]:
    server, thread, url = start(Service(engine, "demo", "h2o 64"))
    yield url
    server.handle_exit(15, None)
    thread.join()


def is_empty(engine: kvjax.Engine) -> bool:
    """All seats and pages are free."""
    load = engine.load
    if any((load.waiting, load.reading, load.decoding, *load.promised)):
        return False
    return [int(tier.num_free[0]) for tier in tiers(engine._main.seats.state.cache)] == list(load.pages)


def resident() -> int:
    """Bytes of this process in memory, without what its allocator keeps of what was freed."""
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def body(rng: random.Random, **more: object) -> dict[str, object]:
    """A request of any kind."""
    how: dict[str, object] = rng.choice(
        [{}, {"temperature": 0}, {"logprobs": 3}, {"presence_penalty": 1, "frequency_penalty": 0.5}, {"top_k": 5},
         {"logit_bias": {"300": 5}}, {"stop": ["a", " the"]}, {"n": 2}, {"seed": 7, "top_p": 0.8}, {"min_p": 0.1}]
    )  # fmt: skip
    return {"prompt": "some words " * rng.randint(1, 150), "max_tokens": rng.randint(1, 60)} | ENDLESS | how | more


def test_twice_the_load_for_a_minute(engine, url):
    """Twice as many clients as seats and places in the queue: each gets all or 429, and memory stays."""
    statuses, over = list[int](), time.monotonic() + SECONDS

    def ask(seed: int) -> None:
        rng = random.Random(seed)
        with httpx.Client(timeout=None) as client:
            while time.monotonic() < over:
                given = body(rng)
                answer = client.post(f"{url}/v1/completions", json=given)
                statuses.append(answer.status_code)
                if answer.status_code == 200:
                    ends = [choice["finish_reason"] for choice in answer.json()["choices"]]
                    assert set(ends) <= {"stop", "length"} and len(ends) == given.get("n", 1)
                else:
                    time.sleep(float(answer.headers["retry-after"]))

    with concurrent.futures.ThreadPoolExecutor(2 * (SEATS + QUEUE)) as pool:
        found = [pool.submit(ask, seed) for seed in range(2 * (SEATS + QUEUE))]
        time.sleep(SECONDS / 4)
        early = resident()
        for each in found:
            each.result()
    assert set(statuses) == {200, 429} and is_empty(engine)
    assert resident() - early < GROWTH
    print(f"{statuses.count(200)} answers, {statuses.count(429)} refused, {(resident() - early) / 1e6:.1f} MB more")


def test_two_hundred_clients_that_leave(engine, url):
    """While they wait, while their prompt is read, while they get text, at the end; streams and plain requests."""

    def leave(seed: int) -> None:
        rng = random.Random(seed)
        given = body(rng, stream=rng.random() < 0.5, max_tokens=rng.choice((1, 200)))
        timeout = httpx.Timeout(60, read=rng.uniform(0.001, 0.5))
        with (
            contextlib.suppress(httpx.TimeoutException, httpx.RemoteProtocolError),
            httpx.stream("POST", f"{url}/v1/completions", json=given, timeout=timeout) as answer,
        ):
            for _ in itertools.islice(answer.iter_bytes(), rng.randint(0, 5)):
                pass

    sizes = []
    for once in range(4):
        with concurrent.futures.ThreadPoolExecutor(10) as pool:
            list(pool.map(leave, range(200 * once, 200 * (once + 1))))
        wait(lambda: is_empty(engine))
        sizes.append(resident())
        print(f"{sizes[-1] >> 20} MB", flush=True)
    assert sizes[3] - sizes[1] < GROWTH


def test_clients_that_never_read_slow_nobody_down(engine, url):
    def seconds() -> float:
        began = time.monotonic()
        given = {"prompt": "some", "max_tokens": 200, "temperature": 0} | ENDLESS
        assert httpx.post(f"{url}/v1/completions", json=given, timeout=None).status_code == 200
        return time.monotonic() - began

    seconds()
    alone, early = min(seconds() for _ in range(3)), resident()
    with contextlib.ExitStack() as open_:
        for _ in range(SEATS + QUEUE):
            given = {"prompt": "some", "max_tokens": 256, "stream": True} | ENDLESS
            open_.enter_context(httpx.stream("POST", f"{url}/v1/completions", json=given, timeout=None))
        wait(lambda: is_empty(engine))
        beside = min(seconds() for _ in range(3))
        assert beside < 5 * alone and resident() - early < GROWTH
    print(f"{alone:.2f} s alone, {beside:.2f} s beside {SEATS + QUEUE} that never read")


def test_gaps_while_a_long_prompt_is_read(engine):
    """At most `STALL` and two calls between tokens of those that decode; a call beside a layer takes twice as long."""
    ask = lambda size, new, **how: engine.submit([5] * size, max_new_tokens=new, ignore_stop=True, **how)
    ask(LENGTH - 8, 4).result()
    began, before = time.monotonic(), engine.load.read_s
    ask(LENGTH - 8, 1).result()
    layer = (engine.load.read_s - before) / engine.model.spec.num_layers
    times: list[list[float]] = [[] for _ in range(SEATS - 1)]
    gaps, step = list[float](), list[float]()
    requests = [ask(50, 3000) for _ in times]
    for request, seen in zip(requests, times, strict=True):
        request.listen(lambda seen=seen: seen.append(time.monotonic()))
    wait(lambda: all(len(seen) > 30 for seen in times))
    quiet = [len(seen) for seen in times]
    ask(LENGTH - 8, 1).result()
    for request in requests:
        request.cancel()
    for seen, count in zip(times, quiet, strict=True):
        steps = [b - a for a, b in itertools.pairwise(seen)]
        step += steps[1 : count - 1]
        gaps += steps[count - 1 : -1]
    for request in requests:
        request.result()
    gaps, step = sorted(gaps), sorted(step)
    worst, usual = gaps[int(0.99 * len(gaps))], step[int(0.99 * len(step))]
    print(f"p99 gap {worst:.3f} s, call {usual:.3f} s, layer {layer:.3f} s; {time.monotonic() - began:.1f} s in all")
    assert worst < STALL + 4 * usual


def test_nothing_is_compiled_by_any_request(engine, url):
    from tests.test_engine import compilations

    rng = random.Random(0)
    with compilations() as names, concurrent.futures.ThreadPoolExecutor(6) as pool:
        ask = lambda given: httpx.post(f"{url}/v1/completions", json=given, timeout=None).status_code
        assert set(pool.map(ask, [body(rng) for _ in range(60)])) == {200}
    assert not names and threading.active_count() < 100
