"""Prompts that are read, part by part, between the steps of those that decode."""

import dataclasses
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache.layout import Cache
from kvjax.engine.capacity import Kind
from kvjax.engine.lane import Shelf
from kvjax.engine.request import Request
from kvjax.generation import decode, prefill
from kvjax.generation import generate as generating
from kvjax.generation.model import Model

AT_ONCE = 16  # tokens after a context that are read in one call
Part = Array | tuple[Array, Cache]  # something of a prompt was read, or all and this is what it has come to
Parts = Generator[Array, None, tuple[Array, Cache]]


@dataclasses.dataclass
class Reading:
    """A prompt that is being read.

    Attributes:
      request: whose.
      seats: that its choices will have.
      parts: layers of a prompt; of what follows a context, some tokens.
      left: how many of these.
      size: of each, in tokens times layers.
      under_way: the part that is being read in another thread.
    """

    request: Request
    seats: list[int]
    parts: Parts
    left: int
    size: int
    under_way: Future[Part] | None = None

    @property
    def work(self) -> int:
        """What is left, for comparison."""
        return self.left * self.size

    def next(self, reader: ThreadPoolExecutor, seconds: float | None) -> Part | None:
        """The next part; None where it takes longer than so many seconds, and goes on.

        Layers touch nothing but a cache of their own, so that another thread may start them. Contexts are the engine's.
        """
        if self.request.context is not None:
            return _next(self.parts)
        self.under_way = self.under_way or reader.submit(_next, self.parts)
        try:
            part = self.under_way.result(seconds)
        except TimeoutError:
            return None
        self.under_way = None
        return part


def _next(parts: Parts) -> Part:
    try:
        return jax.block_until_ready(next(parts))
    except StopIteration as done:
        return jax.block_until_ready(done.value)


def begin(model: Model, kind: Kind, request: Request, seats: list[int], padded: int) -> Reading:
    """Begin with a prompt, layer by layer.

    Args:
      model: that reads.
      kind: of the cache that it will be a part of.
      request, seats: as in `Reading`.
      padded: tokens, with those behind its end.
    """
    cache = kind.one(len(request.prompt), request.limit, request.amounts)
    tokens = jnp.asarray(generating.pad([request.prompt], padded))
    length = jnp.asarray([len(request.prompt)], jnp.int32)
    layers = prefill.prefill_by_layer(model.decoder, kind.recipe, tokens, length, cache, fit=False)
    return Reading(request, seats, layers, model.spec.num_layers, len(request.prompt))


def follow(model: Model, kind: Kind, request: Request, seats: list[int], shelf: Shelf) -> Reading:
    """Begin with what follows a context, some tokens at a time; arguments as in `begin`."""
    parts = -(-len(request.prompt) // AT_ONCE)
    return Reading(request, seats, _behind(model, kind, request, shelf), parts, AT_ONCE * model.spec.num_layers)


def _behind(model: Model, kind: Kind, request: Request, shelf: Shelf) -> Parts:
    context, rest = request.context, request.prompt
    assert context is not None and context.logits is not None
    cache, logits = kind.one(0, 0, request.amounts), context.logits
    for start in range(0, len(rest), AT_ONCE):
        some = rest[start : start + AT_ONCE]
        length, count = (jnp.asarray([n], jnp.int32) for n in (len(context.tokens) + start, len(some)))
        logits, cache, _ = decode.feed(
            model.decoder, cache, logits, jnp.asarray(generating.pad([some], AT_ONCE)), length, count, (),
            shelf.rows([context.place.index]), recipe=kind.recipe.structure,
        )  # fmt: skip
        yield logits
    return logits, cache
