"""Pages: how many an engine's pools have, and how many of them a request may need."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from kvjax.cache import pages
from kvjax.cache import tier as tiers_
from kvjax.cache.layout import Cache
from kvjax.cache.tier import PER_ROW, Tier
from kvjax.errors import InputError
from kvjax.generation import allocate
from kvjax.generation.prefill import padded_length
from kvjax.models.decoder import Decoder
from kvjax.policies.base import Recipe
from kvjax.spec import Lengths

FIXED = (*PER_ROW, "num_free")  # fields of a tier whose sizes do not depend on its pool's
Pages = tuple[int, ...]  # of each tier, group after group


class Asked(NamedTuple):
    """Tokens of a request."""

    prompt: int
    new: int


def lengths(prompts: Sequence[int], new: int, max_length: int) -> Lengths:
    """What caches of an engine are made for: shapes are those of its longest sequences, however long these are."""
    return Lengths(tuple(prompts), new, padded_length(max_length), total=max_length, most_new=max_length - 1)


def tiers(cache: Cache) -> list[Tier]:
    """All of a cache."""
    return [tier for group in cache for tier in group]


def sizes(cache: Cache) -> Pages:
    """Pages of each tier's pool."""
    return tuple(tier.free.shape[0] for tier in tiers(cache))


def within(cache: Cache, limit: int | None, least: Pages) -> Pages:
    """Pages of pools that fit into a number of bytes, tables included, each in proportion.

    Args:
      cache: shapes, with room for the longest sequence in every seat.
      limit: bytes; None = those of `cache`.
      least: what one such sequence needs.

    Raises:
      InputError: not even that fits.
    """
    whole = sizes(cache)
    if limit is None:
        return whole
    fixed, pools = _parts(cache)
    found = tuple(min(n, int(n * max(limit - fixed, 0) / pools)) for n in whole)
    if any(n < one for n, one in zip(found, least, strict=True)):
        needed = fixed + pools * max(one / n for n, one in zip(whole, least, strict=True))
        raise InputError(f"cache of {limit} bytes: one sequence of the largest length needs {math.ceil(needed)}")
    return found


def promise(init: Callable[[Lengths], Cache], page: Sequence[int], prompt: int, new: int) -> Pages:
    """Pages that a sequence may need in each tier.

    Args:
      init: makes a cache.
      page: slots of a page of each tier of the engine's.
      prompt, new: its tokens.
    """
    lengths = Lengths((prompt,), new, padded_length(prompt))
    own = jax.eval_shape(lambda: init(lengths))
    # Its rows may each have a page more that is partly filled.
    of = lambda tier, page: pages.pages_for(tier.free.shape[0] * tier.page, page) + math.prod(tier.length.shape)
    return tuple(of(*each) for each in zip(tiers(own), page, strict=True))


def holds(decoder: Decoder, recipe: Recipe, seats: int, max_length: int, limit: int | None, asked: Asked) -> int:
    """Requests of one size that an engine of so many seats runs side by side.

    Args:
      decoder: of the model; shapes are enough.
      recipe, seats, max_length, limit: of the engine, as `kvjax.Engine` has them.
      asked: tokens of each prompt, and new ones.
    """
    init = functools.partial(allocate.allocate, decoder, recipe)
    shapes = jax.eval_shape(lambda: init(lengths([1] * seats, 1, max_length)))
    longest = sizes(jax.eval_shape(lambda: init(lengths([1], 1, max_length))))
    page = [tier.page for tier in tiers(shapes)]
    one = [min(pages, most) for pages, most in zip(promise(init, page, *asked), longest, strict=True)]
    return min(seats, *(size // n for size, n in zip(within(shapes, limit, longest), one, strict=True)))


def shared(decoder: Decoder, recipe: Recipe, seats: int, max_length: int, sequences: int) -> int:
    """Bytes of an engine's pools with room for so many of the longest sequences, and of the tables of all seats."""
    init = functools.partial(allocate.allocate, decoder, recipe)
    fixed, pools = _parts(jax.eval_shape(lambda: init(lengths([1] * seats, 1, max_length))))
    return fixed + -(-pools * sequences // seats)


def made(init: Callable[[Lengths], Cache], lengths: Lengths, sizes: Pages) -> Cache:
    """An empty cache with pools of so many pages; larger ones are not allocated on the way."""

    def make() -> Cache:
        left = iter(sizes)
        return tuple(tuple(tiers_.resize(tier, next(left)) for tier in tiers) for tiers in init(lengths))

    return jax.jit(make)()


def _parts(cache: Cache) -> tuple[int, int]:
    """Bytes of tables and the like, and of the pools."""
    pools = sum(_bytes(tier._replace(**dict.fromkeys(FIXED, ()))) for tier in tiers(cache))
    return nbytes(cache) - pools, pools


def nbytes(cache: Cache) -> int:
    """Of all that a cache is."""
    return sum(map(_bytes, tiers(cache)))


def _bytes(tree: Tier) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
