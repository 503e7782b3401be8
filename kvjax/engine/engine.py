"""An engine: requests that join and leave while others decode."""

import functools
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvjax.cache.layout import Cache
from kvjax.engine import capacity, programs, reading
from kvjax.engine.lane import Lane, Shelf
from kvjax.engine.reading import Reading
from kvjax.engine.request import Choice, EngineError, Kept, QueueFull, Rank, Request
from kvjax.engine.schedule import READERS
from kvjax.errors import InputError
from kvjax.generation import decode, stopping
from kvjax.generation import sampling as choosing
from kvjax.generation.checks import check_options, check_texts
from kvjax.generation.context import check_askable
from kvjax.generation.model import Model, encode_continuation, encode_prompt, not_finite
from kvjax.generation.sampling import Sampling
from kvjax.generation.stopping import Stops
from kvjax.methods import resolve
from kvjax.policies.base import Recipe
from kvjax.policies.budgets.budget import Keep
from kvjax.policies.layers import asking
from kvjax.spec import Lengths

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
    contexts: int = 0  # that are kept, or are being read
    most_contexts: int = 0
    context_tokens: int = 0  # of all that are kept
    context_pages: tuple[int, ...] = ()  # of each tier: of contexts, then of what follows them
    context_promised: tuple[int, ...] = ()
    context_cache_bytes: int = 0


def _check_positive(**numbers: int) -> None:
    """Raise `InputError` for what is no number of things."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise InputError(f"{name} {number} is not a whole number above 0")


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
      stall: seconds that decoding may wait for prompts to be read; where a device runs programs in order, a layer.
      steps: tokens that each sequence decodes in a call.
      queue: most requests that may wait.
      contexts: that may be kept at a time, see `read`; each request for one has a seat beside those of others.
      context_cache: bytes of the pools of contexts and of what follows them; None = as many as the longest in all need.
      after_context: most tokens that may follow a context in a request, new ones included.

    Raises:
      InputError: what is given cannot be used, in one line.

    >>> import kvjax
    >>> with kvjax.Engine(kvjax.load(), "h2o", 16, seats=2, max_length=128) as engine:
    ...     requests = [engine.submit([1, 2, 3], max_new_tokens=n) for n in (2, 3, 4)]
    ...     [len(request.result()[0].tokens) for request in requests]
    [2, 3, 4]
    >>> with kvjax.Engine(kvjax.load(), "h2o", 16, seats=2, max_length=128, contexts=1) as engine:
    ...     context = engine.read(list(range(1, 101))).wait()
    ...     [engine.submit(ids, context=context, max_new_tokens=2).result()[0].prompt_tokens for ids in ([5], [6, 7])]
    [101, 102]
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
        contexts: int = 0,
        context_cache: int | None = None,
        after_context: int = 1024,
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
        self._sizes = capacity.prompt_sizes(max_length)
        self._width = decode.ends(model.stop, 1, 1).stop.shape[1]
        texts = capacity.kind_of(model.decoder, self.recipe, seats, max_length)
        self.contexts, self.after_context = contexts, after_context
        self._main = self._lane(texts, capacity.within(texts.shapes, cache, texts.longest))
        self.cache_bytes = capacity.nbytes(self._main.seats.state.cache)
        self.reading_bytes = (
            READERS * texts.one_bytes
        )  # beside it: prompts have caches of their own while they are read
        self._lanes, self._shelf, self.context_cache_bytes = [self._main], None, 0
        if contexts:
            self._keep_contexts(contexts, context_cache, after_context)
        self._reading: list[Reading] = []
        self._requests: dict[int, Request] = {}
        self._kept: dict[int, Kept] = {}
        self._reader = ThreadPoolExecutor(1, "kvjax-reader")  # of prompts, into caches of their own
        self._work = threading.Condition()
        self._closing = False
        self._error: BaseException | None = None
        self._alive = time.monotonic()
        self._seconds = [0.0, 0.0]  # reading, decoding
        self._warm_up()
        self._seconds = [0.0, 0.0]
        self._thread = threading.Thread(target=self._run, name="kvjax-engine", daemon=True)
        self._thread.start()

    def _lane(self, kind: capacity.Kind, sizes: capacity.Pages) -> Lane:
        return Lane(kind, self.seats, sizes, self.queue, self._spec.vocab_size, self._width)

    def _keep_contexts(self, count: int, cache: int | None, after: int) -> None:
        """Make room for contexts, and for what follows them."""
        _check_positive(contexts=count, after_context=after)
        check_askable(self._spec, self.recipe)
        decoder, follows = self.model.decoder, lambda prompts, new: Lengths((0,) * len(prompts), after, 64)
        texts = capacity.kind_of(decoder, self.recipe, count, self.max_length)
        answers = capacity.Kind(decoder, asking(self.recipe), self.seats, follows)
        both = (*texts.shapes, *answers.shapes)
        sizes = capacity.within(both, cache, (*texts.longest, *answers.longest))
        split = len(texts.longest)
        self._shelf = Shelf(texts, count, sizes[:split])
        self._lanes.append(self._lane(answers, sizes[split:]))
        self.context_cache_bytes = capacity.nbytes((*self._shelf.cache, *self._lanes[1].seats.state.cache))

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
        budget: Keep | None = None,
        context: Kept | None = None,
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
          budget: of this prompt, no more than the engine's; a request with less is promised fewer pages.
          context: of this engine, that the prompt follows, as in `Context.ask`: "" goes on with it.

        Raises:
          InputError: what is given cannot be used.
          QueueFull: so many requests are waiting; it is an `InputError`.
          EngineError: the engine has ended.
        """
        lane, sampling = self._main if context is None else self._asked(context), sampling or Sampling()
        ids = encode_prompt(self.model, prompt) if context is None else encode_continuation(self.model, prompt)
        room = (self.max_length if context is None else self.after_context) - len(ids)
        limit = min(self.max_new_tokens, max(room, 1)) if max_new_tokens is None else max_new_tokens
        check_options(self._spec, lane.kind.recipe, new=limit, sampling=sampling, logprobs=logprobs)
        if limit > room:
            most = f"length ({self.max_length})" if context is None else f"room after a context ({self.after_context})"
            raise InputError(f"prompt ({len(ids)} tokens) and max-new-tokens ({limit}) pass this engine's {most}")
        if logprobs is not None and logprobs > programs.TOP:
            raise InputError(f"logprobs {logprobs}: an engine tells at most {programs.TOP}")
        if context is not None and budget is not None:
            raise InputError("a context has its own budget: leave the request's out")
        (text, after), own = ((ids, []), ids) if context is None else ((context.tokens, ids), ())
        amounts = lane.kind.amounts(budget, len(own), limit)
        check_texts(self._spec, lane.kind.recipe._replace(amounts=amounts), [text], [after], limit)
        _check_positive(n=n)
        pages = tuple(n * each for each in lane.kind.promise(len(own), len(after) + limit, amounts))
        if not lane.schedule.fits(pages, n, self.seats):
            raise InputError(
                f"{n} choices of {len(ids)} tokens and {limit} new ones need {n} seats and {max(pages)} pages: this"
                f" engine has {self.seats} and {max(lane.schedule.pages)}"
            )
        stops = stopping.stops(self.model, stop)
        if ignore_stop:
            stops = stops._replace(ids=tuple(i for i in stops.ids if i not in self.model.stop))
        choices = [Choice(self.model.tokenizer, stops) for _ in range(n)]
        request = Request(ids, limit, sampling, stops, choices, amounts, logprobs, context)
        with self._work:
            if context is not None:
                self._asked(context)  # it may be gone by now
                context.users += 1
            try:
                self._queue(lane, request, pages, n)
            except (InputError, EngineError):
                self._let_go(context)
                raise
        return request

    def read(self, prompt: str | Sequence[int], budget: Keep | None = None) -> Kept:
        """Read a text once, for requests that continue it (`context=`); returns at once, see `Kept.wait`.

        Args:
          prompt: a text or token ids.
          budget: as in `submit`.

        What they get is what `Context.ask` says: all of them read it, none changes it, and their own tokens are kept
        whole beside it, in its first number format.

        Raises:
          InputError: what is given cannot be used.
          ContextsFull: there is no room for one more; it is an `InputError`.
          QueueFull, EngineError: as in `submit`.
        """
        if self._shelf is None:
            raise InputError("this engine keeps no contexts: make it with contexts=1 or more")
        ids = encode_prompt(self.model, prompt)
        if len(ids) >= self.max_length:
            raise InputError(f"a context of {len(ids)} tokens passes this engine's length ({self.max_length})")
        amounts = self._main.kind.amounts(budget, len(ids), 1)
        check_texts(self._spec, self.recipe._replace(amounts=amounts), [ids], [[]], 1)
        pages = self._shelf.kind.promise(len(ids), 1, amounts)
        request = Request(ids, 1, Sampling(), Stops(()), [Choice(None, Stops(()))], amounts)
        with self._work:
            place = self._shelf.reserve(id(request), pages)
            kept = Kept(request, place, self._shelf.kind.nbytes(place.pages))
            try:
                self._queue(self._main, request, (0,) * len(self._main.schedule.pages), 0)
            except (InputError, EngineError):
                self._shelf.free(id(request), kept)
                raise
            self._kept[id(request)] = kept
        return kept

    def forget(self, context: Kept) -> None:
        """Take no more requests for a context; its room is free once those that there are have ended."""
        with self._work:
            if not context.forgotten:
                context.forgotten = True
                context.users += 1
                self._let_go(context)
        if not context.request.done:
            context.request.cancel()

    def _asked(self, context: Kept) -> Lane:
        """Whose seats requests for a context have."""
        if self._kept.get(id(context.request)) is not context or context.forgotten:
            raise InputError("this engine has no such context, or has forgotten it")
        if context.logits is None:
            raise InputError("the context is still being read: wait for it")
        return self._lanes[1]

    def _let_go(self, context: Kept | None) -> None:
        """One user less; whoever calls has `_work`."""
        if context is not None:
            context.users -= 1
            if context.forgotten and not context.users and self._kept.pop(id(context.request), None):
                assert self._shelf is not None
                self._shelf.free(id(context.request), context)

    def _queue(self, lane: Lane, request: Request, pages: capacity.Pages, seats: int) -> None:
        """Let a request wait; whoever calls has `_work`."""
        if self._error is not None or self._closing:
            raise self._ended()
        if not lane.schedule.add(id(request), pages, seats):
            raise QueueFull(f"{lane.schedule.queue} requests are waiting: try again later")
        self._requests[id(request)] = request
        self._work.notify()

    @property
    def load(self) -> Load:
        """What the engine is busy with."""
        with self._work:
            main, decoding = self._main.schedule, [each for lane in self._lanes for each in lane.decoding.values()]
            beside = [] if self._shelf is None else [self._shelf.schedule, self._lanes[1].schedule]
            return Load(
                waiting=sum(len(lane.schedule.waiting) for lane in self._lanes),
                reading=len(self._reading),
                decoding=len(decoding),
                tokens=tuple(len(request.whole) + len(choice.tokens) for request, choice in decoding),
                seats=self.seats * len(self._lanes),
                pages=main.pages,
                promised=tuple(main.promised),
                cache_bytes=self.cache_bytes,
                read_s=self._seconds[0],
                decode_s=self._seconds[1],
                contexts=len(self._kept),
                most_contexts=self.contexts,
                context_tokens=sum(len(kept.tokens) for kept in self._kept.values()),
                context_pages=tuple(n for schedule in beside for n in schedule.pages),
                context_promised=tuple(n for schedule in beside for n in schedule.promised),
                context_cache_bytes=self.context_cache_bytes,
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

    def _warm_up(self) -> None:
        """Compile everything: two short requests, since what programs return may differ from what they are given."""
        run, sizes = functools.partial(self.submit, max_new_tokens=3, ignore_stop=True, logprobs=1), self._sizes
        for size in sizes[1:]:  # of prompts; the first one follows
            self._sizes = (size,)
            self._complete(run([0]))
        self._sizes = sizes
        for _ in range(2):
            self._complete(run([0]))
            if self._shelf is not None:
                kept = self.read([0])
                self._complete(kept.request)
                self._complete(run([0], context=kept))
                self.forget(kept)
                self._shelf.sweep()

    def _complete(self, request: Request) -> None:
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
                self._turn()
        except BaseException as error:  # the cache is lost with the program that failed
            self._error = error
        finally:
            self._reader.shutdown(wait=False)
            with self._work:
                self._closing = True
                left, self._requests = list(self._requests.values()), {}
            for request in left:
                request.fail(self._ended())
                request.end()

    def _turn(self) -> None:
        """Cancellations, then some layers of prompts, then some steps of all that decode."""
        if self._shelf is not None:
            self._shelf.sweep()
        for request in list(self._requests.values()):  # others add some meanwhile
            if request.cancelled:
                self._finish(request, "cancelled")
        self._admit()
        self._read()
        for lane in self._lanes:
            self._decode(lane)

    def _admit(self) -> None:
        while len(self._reading) < READERS:
            with self._work:
                lanes = sorted(self._lanes, key=self._waits_since)
                found = next((got for lane in lanes if (got := lane.schedule.admit())), None)
            if found is None:
                return
            key, seats = found
            request = self._requests[key]  # pyright: ignore[reportArgumentType]
            request.times.append(time.monotonic())
            kind = self._lane_of(request).kind
            if self._shelf is None or request.context is None:
                self._reading.append(reading.begin(self.model, kind, request, seats, self._padded(request)))
            else:
                self._reading.append(reading.follow(self.model, kind, request, seats, self._shelf))

    def _padded(self, request: Request) -> int:
        return next(size for size in self._sizes if size >= len(request.prompt))

    def _waits_since(self, lane: Lane) -> float:
        waiting = lane.schedule.waiting
        return self._requests[waiting[0].key].times[0] if waiting else 0.0  # pyright: ignore[reportArgumentType]

    def _read(self) -> None:
        """Parts of the prompts that have the least left, for as long as others may wait.

        A part that takes longer goes on while they decode, on devices that run two threads' programs side by side.
        """
        start = time.monotonic()
        while self._reading:
            began = time.monotonic()
            first = next((each for each in self._reading if each.under_way), None)
            first = first or min(self._reading, key=lambda each: each.work)
            part = first.next(self._reader, max(start + self._stall - began, 0.0) if self._busy else None)
            if part is None:
                break
            if isinstance(part, tuple):
                self._reading.remove(first)
                self._has_read(first, *part)
            else:
                first.left -= 1
            now = time.monotonic()
            if self._busy and now - start + (now - began) > self._stall:
                break
            self._admit()
            if any(each.request.cancelled for each in self._reading):
                break
        self._seconds[0] += time.monotonic() - start

    @property
    def _busy(self) -> bool:
        return any(lane.decoding for lane in self._lanes)

    def _has_read(self, read: Reading, logits: Array, cache: Cache) -> None:
        """A context is put where requests find it; any other prompt's choices decode."""
        request = read.request
        kept = self._kept.get(id(request))
        if kept is None:
            self._seat(read, logits, cache)
        elif not np.isfinite(np.asarray(logits)).all():
            request.fail(not_finite(self.model, 0))
        else:
            assert self._shelf is not None
            self._shelf.put(kept, logits, cache)
            request.choices[0].finish("stop")
        request.times.append(time.monotonic())
        self._settle(request)

    def _seat(self, read: Reading, logits: Array, cache: Cache) -> None:
        """Choose the first tokens of a prompt that was read, and let its choices decode."""
        request, lane = read.request, self._lane_of(read.request)
        length = jnp.asarray([len(request.whole)], jnp.int32)
        marks = np.zeros((1, self._spec.vocab_size), bool)
        marks[0, request.whole] = True
        stop = (*request.stops.ids, *[-1] * self._width)[: self._width]  # the host looks for all of them
        ends, seen = decode.ends(stop, request.limit, 1), jnp.asarray(marks)
        for i, (seat, choice) in enumerate(zip(read.seats, request.choices, strict=True)):
            sampling = request.sampling._replace(seed=request.sampling.seed + i)
            chooser = choosing.chooser(sampling, 1)
            one = programs.Seats(decode.first_token(logits, cache, length, chooser, ends, seen), chooser, ends)
            token, rank = int(one.state.token[0]), None
            if request.logprobs is not None:
                said = decode.ranked(logits, one.state.token, min(programs.TOP, self._spec.vocab_size))
                rank = _rank(jax.tree.map(lambda x: np.asarray(x)[0], said))
            lane.decoding[seat] = request, choice
            lane.seats = programs.take(lane.seats, jnp.asarray(seat, jnp.int32), one)
            self._push(lane, seat, token, rank)

    def _lane_of(self, request: Request) -> Lane:
        return self._main if request.context is None else self._lanes[1]

    def _shared(self, lane: Lane) -> Cache:
        """The contexts that a lane's sequences continue."""
        if self._shelf is None or lane is self._main:
            return ()
        which = [-1] * self.seats
        for seat, (request, _) in lane.decoding.items():
            assert request.context is not None
            which[seat] = request.context.place.index
        return self._shelf.rows(which)

    def _decode(self, lane: Lane) -> None:
        if not lane.decoding:
            return
        began = time.monotonic()
        ranks = any(request.logprobs is not None for request, _ in lane.decoding.values())
        state, out, said = programs.steps(
            self.model.decoder,
            *lane.seats,
            self._shared(lane),
            np.asarray(ranks),
            recipe=lane.kind.recipe.structure,
            chunk=self._steps,
        )
        lane.seats = lane.seats._replace(state=state)
        requests = {id(request): request for request, _ in lane.decoding.values()}
        out = np.asarray(out)
        self._seconds[1] += time.monotonic() - began
        said = jax.tree.map(np.asarray, said) if ranks else None
        for seat, tokens in enumerate(out):
            for i, token in enumerate(tokens):
                if token != decode.ENDED and seat in lane.decoding:
                    rank = said and _rank(jax.tree.map(lambda x, seat=seat, i=i: x[seat, i], said))
                    self._push(lane, seat, int(token), rank)
        for request in requests.values():
            self._settle(request)

    def _push(self, lane: Lane, seat: int, token: int, rank: Rank | None) -> None:
        """A token that was chosen in a seat."""
        request, choice = lane.decoding[seat]
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
            lane.leave(seat)

    def _settle(self, request: Request) -> None:
        """Tell who waits; take back what a request has had once it is over."""
        if request.over:
            self._finish(request, "")
        else:
            request.changed()

    def _finish(self, request: Request, reason: str) -> None:
        """Free all that a request holds."""
        lane = self._lane_of(request)
        for seat in [seat for seat, (other, _) in lane.decoding.items() if other is request]:
            lane.leave(seat)
        self._reading = [each for each in self._reading if each.request is not request]
        try:
            for choice in request.choices:
                choice.finish(reason)
        except InputError as error:  # of the tokenizer
            request.fail(error)
        with self._work:
            if any(each.key == id(request) for each in lane.schedule.waiting):
                lane.schedule.leave(id(request))
            else:
                lane.schedule.end(id(request))
            self._requests.pop(id(request), None)
            kept = self._kept.get(id(request))  # it was read, or was to be
            if kept is not None and kept.logits is None:
                kept.forgotten = True
            self._let_go(kept or request.context)
        request.end()
