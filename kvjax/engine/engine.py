"""An engine: requests that join and leave while others decode."""

import dataclasses
import functools
import threading
import time
from collections.abc import Generator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvjax.cache.layout import Cache
from kvjax.engine import capacity, programs
from kvjax.engine.request import Choice, EngineError, QueueFull, Rank, Request
from kvjax.engine.schedule import READERS, Schedule
from kvjax.errors import InputError
from kvjax.generation import allocate, decode, prefill, stopping
from kvjax.generation import generate as generating
from kvjax.generation import sampling as choosing
from kvjax.generation.accounting import footprint
from kvjax.generation.checks import check_options, check_texts
from kvjax.generation.model import Model, encode_prompt, not_finite
from kvjax.generation.sampling import Sampling
from kvjax.generation.stopping import Stops
from kvjax.methods import resolve
from kvjax.policies.base import Recipe
from kvjax.policies.budgets.budget import Keep

PAUSE = 0.05  # seconds that an idle engine sleeps at most, in case nobody wakes it


class Load(NamedTuple):
    """What an engine is busy with."""

    waiting: int  # requests
    reading: int
    decoding: int  # sequences
    tokens: tuple[int, ...]  # of each of these, so far
    seats: int
    pages: tuple[int, ...]  # of each tier
    promised: tuple[int, ...]  # of these, to requests that are read or decode
    cache_bytes: int
    read_s: float  # seconds that were spent on prompts
    decode_s: float  # and on all other tokens


@dataclasses.dataclass
class _Reading:
    """A prompt that is being read."""

    request: Request
    seats: list[int]
    layers: Generator[Array, None, tuple[Array, Cache]]
    left: int  # layers

    @property
    def work(self) -> int:
        return self.left * len(self.request.prompt)


def _check_positive(**numbers: int) -> None:
    """Raise `InputError` for what is no number of things."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise InputError(f"{name} {number} is not a whole number above 0")


def _next(layers: Generator[Array, None, tuple[Array, Cache]]) -> Array | tuple[Array, Cache]:
    """The next layer's output; behind the last one, what the prompt has come to."""
    try:
        return next(layers)
    except StopIteration as done:
        return done.value


def _rank(said: decode.Ranked) -> Rank:
    return Rank(float(said.chosen), said.ids.tolist(), said.top.tolist())


class Engine:
    """Continuous batching over a fixed number of seats and one pool of pages.

    Everything is compiled when it is made, and nothing after that. A request is admitted when a seat is free and all
    pages that it may need are, so that none is ever interrupted for want of memory; a method that keeps less admits
    more. Prompts are read layer by layer between the steps of those that decode. What a request gets does not depend on
    who else is there: rows of a batch never mix.

    Args:
      model: on one device.
      method, budget: as in `Model.generate`.
      seats: sequences that decode side by side.
      max_length: most tokens of a sequence, new ones included.
      max_new_tokens: of a request that does not say how many it wants.
      cache: bytes of the pools that all seats share; None = as many as the longest sequences in all seats need.
      stall: seconds that decoding may wait for prompts to be read, or as long as one layer takes.
      steps: tokens that each sequence decodes in a call.
      queue: most requests that may wait.

    Raises:
      InputError: what is given cannot be used, in one line.

    >>> import kvjax
    >>> with kvjax.Engine(kvjax.load(), "h2o", 16, seats=2, max_length=128) as engine:
    ...     requests = [engine.submit([1, 2, 3], max_new_tokens=n) for n in (2, 3, 4)]
    ...     [len(request.result()[0].tokens) for request in requests]
    [2, 3, 4]
    """

    def __init__(
        self,
        model: Model,
        method: str | Recipe | None = None,
        budget: Keep | None = None,
        *,
        seats: int = 8,
        max_length: int = 4096,
        max_new_tokens: int = 1024,
        cache: int | None = None,
        stall: float = 0.1,
        steps: int = 8,
        queue: int = 256,
    ):
        if model.mesh is not None:
            raise InputError("an engine runs on one device: load the model without a mesh")
        _check_positive(seats=seats, steps=steps, queue=queue)
        if not stall >= 0:
            raise InputError(f"stall {stall} is not a number of seconds")
        self.model, self.recipe = model, resolve(model.spec, method, budget)
        check_options(model.spec, self.recipe, new=max_new_tokens)
        check_options(model.spec, self.recipe, max_length=max_length)
        self.max_length, self.max_new_tokens = max_length, min(max_new_tokens, max_length - 1)
        self.seats, self.queue = seats, queue
        self._stall, self._steps = stall, steps
        self._spec = model.spec
        self._width = decode.ends(model.stop, 1, 1).stop.shape[1]
        self._allocate(seats, cache, queue)
        self._reading: list[_Reading] = []
        self._decoding: dict[int, tuple[Request, Choice]] = {}
        self._requests: dict[int, Request] = {}
        self._work = threading.Condition()
        self._closing = False
        self._error: BaseException | None = None
        self._alive = time.monotonic()
        self._seconds = [0.0, 0.0]  # reading, decoding
        self._warm_up()
        self._seconds = [0.0, 0.0]
        self._thread = threading.Thread(target=self._run, name="kvjax-engine", daemon=True)
        self._thread.start()

    def _allocate(self, seats: int, budget: int | None, queue: int) -> None:
        lengths = capacity.lengths([1] * seats, 1, self.max_length)
        init = functools.partial(allocate.allocate, self.model.decoder, self.recipe)
        shapes = jax.eval_shape(lambda: init(lengths))
        self._page = tuple(tier.page for tier in capacity.tiers(shapes))
        self._longest = capacity.sizes(jax.eval_shape(lambda: init(capacity.lengths([1], 1, self.max_length))))
        self._promises = functools.lru_cache(4096)(functools.partial(capacity.promise, init, self._page))
        sizes = capacity.within(shapes, budget, self._longest)
        cache = capacity.made(init, lengths, sizes)
        # Beside it: prompts have caches of their own while they are read.
        self.reading_bytes = READERS * capacity.nbytes(
            jax.eval_shape(lambda: init(capacity.lengths([1], 1, self.max_length)))
        )
        self.cache_bytes = footprint(self.model, cache, ()).bytes.total
        self._seats = programs.empty(cache, seats, self._spec.vocab_size, self._width)
        self._schedule = Schedule(seats, sizes, queue)

    def submit(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        ignore_stop: bool = False,
        logprobs: int | None = None,
        n: int = 1,
    ) -> Request:
        """Ask for a continuation of a prompt; returns at once.

        Args:
          prompt: a text or token ids.
          max_new_tokens: most tokens of each choice; None = the engine's, or what its `max_length` leaves.
          sampling: how tokens are chosen; None = greedy.
          stop: a text ends before the first of these strings, as in `Model.generate`.
          ignore_stop: go on after a token that ends a text.
          logprobs: tell of each token its log-probability and those of so many most likely ones, 20 at most.
          n: choices; the prompt is read once for all.

        Raises:
          InputError: what is given cannot be used.
          QueueFull: so many requests are waiting; it is an `InputError`.
          EngineError: the engine has ended.
        """
        ids, sampling = encode_prompt(self.model, prompt), sampling or Sampling()
        room = self.max_length - len(ids)
        limit = min(self.max_new_tokens, max(room, 1)) if max_new_tokens is None else max_new_tokens
        check_options(self._spec, self.recipe, new=limit, sampling=sampling, logprobs=logprobs)
        if limit > room:
            raise InputError(
                f"prompt ({len(ids)} tokens) and max-new-tokens ({limit}) pass this engine's length ({self.max_length})"
            )
        if logprobs is not None and logprobs > programs.TOP:
            raise InputError(f"logprobs {logprobs}: an engine tells at most {programs.TOP}")
        check_texts(self._spec, self.recipe, [ids], [[]], limit)
        _check_positive(n=n)
        pages = tuple(n * each for each in self._promise(len(ids), limit))
        if not self._schedule.fits(pages, n, self.seats):
            raise InputError(
                f"{n} choices of {len(ids)} tokens and {limit} new ones need {n} seats and {max(pages)} pages: this"
                f" engine has {self.seats} and {max(self._schedule.pages)}"
            )
        stops = stopping.stops(self.model, stop)
        if ignore_stop:
            stops = stops._replace(ids=tuple(i for i in stops.ids if i not in self.model.stop))
        request = Request(
            ids, limit, sampling, stops, [Choice(self.model.tokenizer, stops) for _ in range(n)], logprobs
        )
        with self._work:
            if self._error is not None or self._closing:
                raise self._ended()
            if not self._schedule.add(id(request), pages, n):
                raise QueueFull(f"{self._schedule.queue} requests are waiting: try again later")
            self._requests[id(request)] = request
            self._work.notify()
        return request

    @property
    def load(self) -> Load:
        """What the engine is busy with."""
        with self._work:
            schedule, decoding = self._schedule, list(self._decoding.values())
            return Load(
                waiting=len(schedule.waiting),
                reading=len(self._reading),
                decoding=len(decoding),
                tokens=tuple(len(request.prompt) + len(choice.tokens) for request, choice in decoding),
                seats=self.seats,
                pages=schedule.pages,
                promised=tuple(schedule.promised),
                cache_bytes=self.cache_bytes,
                read_s=self._seconds[0],
                decode_s=self._seconds[1],
            )

    @property
    def silent(self) -> float:
        """Seconds since its thread last said that it lives: no more than a turn takes, unless the device hangs."""
        return time.monotonic() - self._alive

    @property
    def error(self) -> BaseException | None:
        """What has ended the engine before it was closed."""
        return self._error

    def close(self, drain: float = 0.0) -> None:
        """Take no more requests; end the engine when those that there are have ended, at the latest after a while.

        Args:
          drain: seconds until those that are left are cancelled.
        """
        with self._work:
            self._closing = True
            self._work.notify()
        until = time.monotonic() + drain
        while self._requests and self._error is None and time.monotonic() < until:
            time.sleep(PAUSE)
        for request in list(self._requests.values()):
            request.cancel()
        self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ended(self) -> EngineError:
        why = "it was closed" if self._error is None else f"{type(self._error).__name__}: {self._error}"
        return EngineError(f"the engine has ended: {why}")

    def _promise(self, prompt: int, new: int) -> capacity.Pages:
        """Pages that a sequence may need in each tier; raises `InputError` for one that the method cannot keep."""
        found = zip(self._promises(prompt, new), self._longest, strict=True)
        return tuple(min(pages, most) for pages, most in found)

    def _warm_up(self) -> None:
        """Compile everything: two short requests, since what programs return may differ from what they are given."""
        for _ in range(2):
            request = Request([0], 3, Sampling(), Stops(()), [Choice(None, Stops(()))], 1)
            self._schedule.add(id(request), self._promise(1, 3), 1)
            self._requests[id(request)] = request
            while not request.done:
                self._turn()
            request.check()

    def _run(self) -> None:
        try:
            while True:
                self._alive = time.monotonic()
                with self._work:
                    if not self._requests:
                        if self._closing:
                            return
                        self._work.wait(PAUSE)
                        continue
                self._turn()
        except BaseException as error:  # the cache is lost with the program that failed
            self._error = error
        finally:
            with self._work:
                self._closing = True
                left, self._requests = list(self._requests.values()), {}
            for request in left:
                request.fail(self._ended())
                request.end()

    def _turn(self) -> None:
        """Cancellations, then some layers of prompts, then some steps of all that decode."""
        for request in list(self._requests.values()):  # others add some meanwhile
            if request.cancelled:
                self._finish(request, "cancelled")
        self._admit()
        self._read()
        self._decode()

    def _admit(self) -> None:
        while len(self._reading) < READERS:
            with self._work:
                found = self._schedule.admit()
            if found is None:
                return
            key, seats = found
            request = self._requests[key]  # pyright: ignore[reportArgumentType]
            request.times.append(time.monotonic())
            self._reading.append(_Reading(request, seats, self._begin(request), self._spec.num_layers))

    def _begin(self, request: Request) -> Generator[Array, None, tuple[Array, Cache]]:
        lengths = capacity.lengths([len(request.prompt)], request.limit, self.max_length)
        cache = allocate.allocate(self.model.decoder, self.recipe, lengths)
        tokens = jnp.asarray(generating.pad([request.prompt], lengths.padded))
        length = jnp.asarray(lengths.prompt, jnp.int32)
        return prefill.prefill_by_layer(self.model.decoder, self.recipe, tokens, length, cache, fit=False)

    def _read(self) -> None:
        """Layers of the prompts that have the least left, for as long as others may wait."""
        start = time.monotonic()
        while self._reading:
            began = time.monotonic()
            reading = min(self._reading, key=lambda each: each.work)
            read = jax.block_until_ready(_next(reading.layers))
            self._seconds[0] += time.monotonic() - began
            if isinstance(read, tuple):
                self._reading.remove(reading)
                self._seat(reading, *read)
            else:
                reading.left -= 1
            now = time.monotonic()
            if self._decoding and now - start + (now - began) > self._stall:
                return
            self._admit()
            if any(each.request.cancelled for each in self._reading):
                return

    def _seat(self, reading: _Reading, logits: Array, cache: Cache) -> None:
        """Choose the first tokens of a prompt that was read, and let its choices decode."""
        request, length = reading.request, jnp.asarray([len(reading.request.prompt)], jnp.int32)
        marks = np.zeros((1, self._spec.vocab_size), bool)
        marks[0, request.prompt] = True
        stop = (*request.stops.ids, *[-1] * self._width)[: self._width]  # the host looks for all of them
        ends, seen = decode.ends(stop, request.limit, 1), jnp.asarray(marks)
        for i, (seat, choice) in enumerate(zip(reading.seats, request.choices, strict=True)):
            sampling = request.sampling._replace(seed=request.sampling.seed + i)
            chooser = choosing.chooser(sampling, 1)
            one = programs.Seats(decode.first_token(logits, cache, length, chooser, ends, seen), chooser, ends)
            token, rank = int(one.state.token[0]), None
            if request.logprobs is not None:
                said = decode.ranked(logits, one.state.token, min(programs.TOP, self._spec.vocab_size))
                rank = _rank(jax.tree.map(lambda x: np.asarray(x)[0], said))
            self._decoding[seat] = request, choice
            self._seats = programs.take(self._seats, jnp.asarray(seat, jnp.int32), one)
            self._push(seat, token, rank)
        request.times.append(time.monotonic())
        self._settle(request)

    def _decode(self) -> None:
        if not self._decoding:
            return
        began = time.monotonic()
        ranks = any(request.logprobs is not None for request, _ in self._decoding.values())
        state, out, said = programs.steps(
            self.model.decoder,
            *self._seats,
            np.asarray(ranks),
            recipe=self.recipe.structure,
            chunk=self._steps,
        )
        self._seats = self._seats._replace(state=state)
        requests = {id(request): request for request, _ in self._decoding.values()}
        out = np.asarray(out)
        self._seconds[1] += time.monotonic() - began
        said = jax.tree.map(np.asarray, said) if ranks else None
        for seat, tokens in enumerate(out):
            for i, token in enumerate(tokens):
                if token != decode.ENDED and seat in self._decoding:
                    rank = said and _rank(jax.tree.map(lambda x, seat=seat, i=i: x[seat, i], said))
                    self._push(seat, int(token), rank)
        for request in requests.values():
            self._settle(request)

    def _push(self, seat: int, token: int, rank: Rank | None) -> None:
        """A token that was chosen in a seat."""
        request, choice = self._decoding[seat]
        if token == decode.NOT_FINITE:
            request.fail(not_finite(self.model, request.choices.index(choice)))
            return
        try:
            choice.push(token, None if request.logprobs is None else rank)
        except InputError as error:  # of the tokenizer
            request.fail(error)
            return
        if token in request.stops.ids:
            choice.finish("stop")
        elif len(choice.tokens) >= request.limit:
            choice.finish("length")
        if choice.finish_reason is not None:
            self._leave(seat)

    def _leave(self, seat: int) -> None:
        """Nothing is decoded in a seat any more, and its pages are free; it is its request's until that ends."""
        del self._decoding[seat]
        left = programs.leave(self._seats.state, jnp.asarray(seat, jnp.int32))
        self._seats = self._seats._replace(state=left)

    def _settle(self, request: Request) -> None:
        """Tell who waits; take back what a request has had once it is over."""
        if request.over:
            self._finish(request, "")
        else:
            request.changed()

    def _finish(self, request: Request, reason: str) -> None:
        """Free all that a request holds."""
        for seat in [seat for seat, (other, _) in self._decoding.items() if other is request]:
            self._leave(seat)
        for reading in [each for each in self._reading if each.request is request]:
            self._reading.remove(reading)
            reading.layers.close()
        try:
            for choice in request.choices:
                choice.finish(reason)
        except InputError as error:  # of the tokenizer
            request.fail(error)
        with self._work:
            if any(each.key == id(request) for each in self._schedule.waiting):
                self._schedule.leave(id(request))
            else:
                self._schedule.end(id(request))
            self._requests.pop(id(request), None)
        request.end()
