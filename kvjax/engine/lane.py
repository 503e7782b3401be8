"""Seats whose sequences one program decodes, and the contexts that some of them continue."""

from collections.abc import Iterable

import jax.numpy as jnp
from jax import Array

from kvjax.cache.layout import Cache
from kvjax.engine import programs
from kvjax.engine.capacity import Kind, Pages
from kvjax.engine.request import Choice, ContextsFull, Kept, Place, Request
from kvjax.engine.schedule import Schedule
from kvjax.errors import InputError


class Lane:
    """Seats over pools of their own, and who has them.

    Args:
      kind: of the cache of all.
      seats: how many.
      sizes: pages of each pool.
      queue: most requests that may wait.
      vocabulary: V.
      stops: ids that may end a sequence.
    """

    def __init__(self, kind: Kind, seats: int, sizes: Pages, queue: int, vocabulary: int, stops: int):
        self.kind, self.size = kind, seats
        self.seats = programs.empty(kind.all(sizes), seats, vocabulary, stops)
        self.schedule = Schedule(seats, sizes, queue)
        self.decoding: dict[int, tuple[Request, Choice]] = {}

    def leave(self, seat: int) -> None:
        """Nothing is decoded in a seat any more, and its pages are free; it is its request's until that ends."""
        del self.decoding[seat]
        left = programs.leave(self.seats.state, jnp.asarray(seat, jnp.int32))
        self.seats = self.seats._replace(state=left)


class Shelf:
    """The contexts of an engine, over pools of their own; requests read them, and nothing changes them.

    Args:
      kind: of the cache of all.
      places: contexts that there is room for.
      sizes: pages of each pool.
    """

    def __init__(self, kind: Kind, places: int, sizes: Pages):
        self.kind, self.schedule = kind, Schedule(places, sizes, 1)
        self.cache = kind.all(sizes)
        self._dropped: list[int] = []

    def reserve(self, key: int, pages: Pages) -> Place:
        """Room for a context that needs so many pages, until `free`.

        Raises:
          InputError: there never is.
          ContextsFull: there is none now.
        """
        if not self.schedule.fits(pages, 1, 1):
            raise InputError(f"the context needs {max(pages)} pages: this engine has {max(self.schedule.pages)}")
        self.schedule.add(key, pages, 1)
        found = self.schedule.admit()
        if found is None:
            self.schedule.leave(key)
            raise ContextsFull("no more contexts fit: forget one")
        return Place(found[1][0], pages)

    def put(self, kept: Kept, logits: Array, cache: Cache) -> None:
        """What a text was read to."""
        self.sweep()
        self.cache = programs.keep(self.cache, jnp.asarray(kept.place.index, jnp.int32), cache)
        kept.logits = logits

    def free(self, key: int, kept: Kept) -> None:
        """Its room is another's; what is there goes when it is needed, or with the next `sweep`."""
        self.schedule.end(key)
        if kept.logits is not None:
            self._dropped.append(kept.place.index)

    def sweep(self) -> None:
        """Empty the places of contexts that are gone."""
        while self._dropped:
            self.cache = programs.drop(self.cache, jnp.asarray(self._dropped.pop(0), jnp.int32))

    def rows(self, which: Iterable[int]) -> Cache:
        """As `shared` of sequences that continue the contexts at these places, -1 = none."""
        return programs.rows(self.cache, jnp.asarray(list(which), jnp.int32))
