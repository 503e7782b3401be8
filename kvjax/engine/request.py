"""A request to an engine, as whoever has made it sees it."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jax import Array

from kvjax.errors import InputError
from kvjax.generation.results import Continuation, Logprobs
from kvjax.generation.sampling import Sampling
from kvjax.generation.stopping import Stops, Text
from kvjax.models.tokenizer import Tokenizer
from kvjax.policies.budgets.budget import Amounts


class EngineError(RuntimeError):
    """The engine has ended: a program of it has failed, or it was closed."""


class QueueFull(InputError):
    """As many requests wait as an engine lets; later there is room again."""


class ContextsFull(InputError):
    """There is no room for one more context until another is forgotten."""


class Rank(NamedTuple):
    """What the model made of a place in the text, before anything was done to choose a token."""

    logprob: float  # of the token that was chosen
    ids: list[int]  # the most likely tokens, from the first on
    top: list[float]  # theirs


class Place(NamedTuple):
    """Where an engine has a context."""

    index: int  # of its rows
    pages: tuple[int, ...]  # of each tier, that it may hold


class Choice:
    """One continuation of a request's prompt.

    Attributes:
      tokens: generated so far.
      text: of these that is certain: no unfinished character, and nothing that a stop string may begin with; "" without
        a tokenizer.
      ranks: of each token, where they were asked for.
      begins: where each token begins in the text.
      finish_reason: "stop", "length" or "cancelled"; None = it goes on.
    """

    def __init__(self, tokenizer: Tokenizer | None, stops: Stops):
        self.tokens: list[int] = []
        self.text = ""
        self.ranks: list[Rank] = []
        self.begins: list[int] = []
        self.finish_reason: str | None = None
        self._text = None if tokenizer is None else Text(tokenizer, stops)

    def push(self, token: int, rank: Rank | None = None) -> None:
        """One more token."""
        if rank is not None:
            self.begins.append(0 if self._text is None else len(self.text) + len(self._text.held))
            self.ranks.append(rank)
        self.tokens.append(token)
        if self._text is not None:
            self.text += self._text.push(token)
            if self._text.stopped:
                self.finish("stop")

    def finish(self, reason: str) -> None:
        """No more tokens."""
        if self._text is not None and self.finish_reason is None:
            self.text += self._text.held
        self.finish_reason = self.finish_reason or reason


class Request:
    """What `Engine.submit` returns. Iterating over it gives the text as it appears.

    Attributes:
      prompt: token ids.
      choices: a continuation for each of the `n` that were asked for.
      limit: most tokens of each.
      sampling: of the first; choice `i` has the seed `seed + i`.
      stops: what ends a choice.
      amounts: that the cache may keep.
      logprobs: how many of the most likely tokens are told of each place; None = nothing.
      context: that the prompt continues, which is read already; None = it begins a text.
      done: all choices have ended, or the engine has, and what the request has held is free.
      times: when it was submitted, when its prompt began to be read, and when the first tokens were there [s,
        `time.monotonic`]; as many of these as have happened.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        limit: int,
        sampling: Sampling,
        stops: Stops,
        choices: list[Choice],
        amounts: Amounts,
        logprobs: int | None = None,
        context: "Kept | None" = None,
    ):
        self.amounts, self.context = amounts, context
        self.prompt, self.limit, self.sampling, self.stops = list(prompt), limit, sampling, stops
        self.choices, self.logprobs = choices, logprobs
        self.cancelled = self.done = False
        self.times = [time.monotonic()]
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], None]] = []

    @property
    def whole(self) -> list[int]:
        """Token ids of all that the choices continue."""
        return [*(self.context.tokens if self.context else ()), *self.prompt]

    @property
    def over(self) -> bool:
        """Whether nothing more is to be generated."""
        return self._error is not None or all(choice.finish_reason is not None for choice in self.choices)

    def cancel(self) -> None:
        """Ask for no more; what has been generated stays. Choices that had not ended become "cancelled"."""
        self.cancelled = True

    def listen(self, call: Callable[[], None]) -> None:
        """Have something called, from the engine's thread, whenever there is more; it must not block."""
        self._listeners.append(call)

    def result(self, timeout: float | None = None) -> list[Continuation]:
        """Wait for all choices.

        Raises:
          EngineError: the engine has ended before them.
          InputError: the logits after the prompt, or after what was generated, are not finite.
          TimeoutError: they have not ended within so many seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"the request has not ended within {timeout} seconds")
        self.check()
        return [
            Continuation(len(self.whole), c.tokens, c.text, c.finish_reason or "", self._logprobs(c))
            for c in self.choices
        ]

    def _logprobs(self, choice: Choice) -> Logprobs | None:
        if self.logprobs is None:
            return None
        chosen, ids, top = (
            (np.asarray(x) for x in zip(*choice.ranks, strict=True)) if choice.ranks else [np.zeros((0, 0))] * 3
        )
        return Logprobs(chosen, ids[:, : self.logprobs], top[:, : self.logprobs])

    def check(self) -> None:
        """Raise what has ended the request before its time, if anything has."""
        if self._error is not None:
            raise self._error

    def __iter__(self) -> Iterator[str]:
        if len(self.choices) != 1:
            raise InputError(f"a request for {len(self.choices)} choices has no single text: look at its choices")
        (choice,), shown = self.choices, 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda shown=shown: self.done or len(choice.text) > shown)
                text, done = choice.text, self.done
            if len(text) > shown:
                yield text[shown:]
                shown = len(text)
            elif done:
                self.check()
                return

    def changed(self) -> None:
        """Wake up whoever waits."""
        with self._changed:
            self._changed.notify_all()
        for call in self._listeners:
            call()

    def fail(self, error: BaseException) -> None:
        """What ends all choices."""
        if not self.over:
            self._error = error

    def end(self) -> None:
        """All that the request has held is free."""
        self.done = True
        self.changed()


class Kept:
    """A context that an engine keeps: a text that is read once, and continued by many requests. Made by `Engine.read`.

    Attributes:
      request: that reads the text; when it is done the context can be continued.
      tokens: of the text.
      bytes: of the pages that it has.
      place: in the engine.
      logits: after its last token; None = it is not read yet.
      users: requests that read or continue it and have not ended.
      forgotten: no more requests may; its pages are free once there are no users.
    """

    def __init__(self, request: Request, place: Place, nbytes: int):
        self.request, self.place, self.bytes = request, place, nbytes
        self.tokens = request.prompt
        self.logits: Array | None = None
        self.users, self.forgotten = 1, False  # that reads it

    def wait(self, timeout: float | None = None) -> "Kept":
        """Itself, once the text is read; raises what `Request.result` does."""
        self.request.result(timeout)
        return self
