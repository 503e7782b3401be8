"""Pages: how many an engine's pools have, and how many of them a request may need."""

import functools
import itertools
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
from kvjax.policies.budgets.budget import Amounts, Keep, parse_keep, show, tokens_of
from kvjax.spec import Lengths

FIXED = (*PER_ROW, "num_free")  # fields of a tier whose sizes do not depend on its pool's
Pages = tuple[int, ...]  # of each tier, group after group


class Asked(NamedTuple):
    """Tokens of a request."""

    prompt: int
    new: int


def lengths(prompts: Sequence[int], new: int, max_length: int, platform: str | None = None) -> Lengths:
    """What caches of an engine are made for: shapes are those of its longest sequences, however long these are."""
    padded = padded_length(max_length)
    return Lengths(tuple(prompts), new, padded, platform=platform, total=max_length, most_new=max_length - 1)


def prompt_sizes(max_length: int) -> tuple[int, ...]:
    """Tokens that an engine's prompts are padded to: four times as many at each rung, up to those of the longest.

    >>> prompt_sizes(512), prompt_sizes(8192)
    ((64, 256, 1024), (64, 256, 1024, 4096, 8192))
    """
    longest = padded_length(max_length)
    return (*itertools.takewhile(lambda size: size < longest, (64 * 4**i for i in itertools.count())), longest)


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
        raise InputError(f"cache of {limit:,} bytes: one sequence of the largest length needs {math.ceil(needed):,}")
    return found


class Kind:
    """Caches of one recipe in an engine: of one sequence, and of all that share its pools.

    Args:
      decoder: of the model; shapes are enough.
      recipe: whose.
      batch: sequences that share pools.
      lengths: what a cache is made for, given prompts and new tokens; always of the same shapes.

    Attributes:
      shapes: of the cache of all, with pools for the longest sequence of each.
      longest: pages of each tier that one such sequence needs.
      one_bytes: of a cache of one sequence.
    """

    def __init__(self, decoder: Decoder, recipe: Recipe, batch: int, lengths: Callable[[Sequence[int], int], Lengths]):
        self.recipe, self._decoder, self._lengths = recipe, decoder, lengths
        self._all, own = lengths([1] * batch, 1), recipe.amounts
        self.shapes = jax.eval_shape(lambda: self._init(self._all, own))
        one = jax.eval_shape(lambda: self._init(lengths([1], 1), own))
        self.longest, self.one_bytes = sizes(one), nbytes(one)
        self._page = [tier.page for tier in tiers(self.shapes)]
        self._promised = functools.lru_cache(4096)(self._promise)

    def _init(self, lengths: Lengths, amounts: Amounts) -> Cache:
        return allocate.allocate(self._decoder, self.recipe._replace(amounts=amounts), lengths)

    def one(self, prompt: int, new: int, amounts: Amounts) -> Cache:
        """An empty cache of one sequence, of the shapes that all have."""
        return self._init(self._lengths([prompt], new), amounts)

    def all(self, sizes: Pages) -> Cache:
        """An empty cache of all with pools of so many pages; larger ones are not allocated on the way."""

        def make() -> Cache:
            left = iter(sizes)
            return tuple(
                tuple(tiers_.resize(t, next(left)) for t in tiers)
                for tiers in self._init(self._all, self.recipe.amounts)
            )

        return jax.jit(make)()

    def nbytes(self, pages: Pages) -> int:
        """Of so many pages of each pool."""
        each = zip(tiers(self.shapes), pages, strict=True)
        return sum(_pool(tier) // tier.free.shape[0] * n for tier, n in each)

    def amounts(self, budget: Keep | None, prompt: int, new: int) -> Amounts:
        """What a sequence with a budget of its own may keep, in caches of these shapes; None = what all may.

        Raises:
          InputError: the method has no such budget, or shapes are made for less.
        """
        own = self.recipe.amounts
        if budget is None:
            return own
        if own.keep is None or self.recipe.budget is None or len(self.recipe.stores) > 1:
            raise InputError(f"{self.recipe.name} has no budget that a request could make smaller")
        keep = parse_keep(budget)
        if any(tokens_of(keep, n) > tokens_of(own.keep, n) for n in (prompt, prompt + new)):
            raise InputError(f"budget {budget} is more than this engine's, which is {show(own.keep)}")
        return own._replace(keep=keep, most=own.keep)

    def promise(self, prompt: int, new: int, amounts: Amounts | None = None) -> Pages:
        """Pages that a sequence may need in each tier.

        Raises:
          InputError: the method cannot keep it.
        """
        return self._promised(prompt, new, self.recipe.amounts if amounts is None else amounts)

    def _promise(self, prompt: int, new: int, amounts: Amounts) -> Pages:
        lengths = Lengths((prompt,), new, padded_length(prompt), platform=self._all.platform)
        own = tiers(jax.eval_shape(lambda: self._init(lengths, amounts)))
        # Its rows may each have a page more that is partly filled.
        of = lambda tier, page: pages.pages_for(tier.free.shape[0] * tier.page, page) + math.prod(tier.length.shape)
        return tuple(min(of(*each), most) for *each, most in zip(own, self._page, self.longest, strict=True))


def kind_of(decoder: Decoder, recipe: Recipe, seats: int, max_length: int, platform: str | None = None) -> Kind:
    """The cache of an engine's seats; `platform` is what runs it, None = JAX's default."""
    return Kind(decoder, recipe, seats, functools.partial(lengths, max_length=max_length, platform=platform))


def holds(
    decoder: Decoder,
    recipe: Recipe,
    seats: int,
    max_length: int,
    limit: int | None,
    asked: Asked,
    platform: str | None = None,
) -> int:
    """Requests of one size that an engine of so many seats runs side by side.

    Args:
      decoder: of the model; shapes are enough.
      recipe, seats, max_length, limit: of the engine, as `kvjax.Engine` has them.
      asked: tokens of each prompt, and new ones.
      platform: that runs it; None = JAX's default.
    """
    kind = kind_of(decoder, recipe, seats, max_length, platform)
    pairs = zip(within(kind.shapes, limit, kind.longest), kind.promise(*asked), strict=True)
    return min(seats, *(size // n for size, n in pairs))


def at_once(one: Kind, limit: int, asked: Asked, beside: int = 0) -> int:
    """Requests of one size that so many bytes have room for, each with a seat; 0 = not one of the largest fits.

    Args:
      one: of a single seat.
      limit: bytes of pools and tables.
      asked: as in `holds`, which counts what is allocated: this is the formula.
      beside: bytes of each seat that are none of these.
    """
    fixed, pools = _parts(one.shapes)
    if fixed + beside + pools > limit:
        return 0
    share = max(n / most for n, most in zip(one.promise(*asked), one.longest, strict=True))
    return int(limit / (fixed + beside + pools * share))


def shared(decoder: Decoder, recipe: Recipe, seats: int, max_length: int, sequences: int) -> int:
    """Bytes of an engine's pools with room for so many of the longest sequences, and of the tables of all seats."""
    fixed, pools = _parts(kind_of(decoder, recipe, seats, max_length).shapes)
    return fixed + -(-pools * sequences // seats)


def _parts(cache: Cache) -> tuple[int, int]:
    """Bytes of tables and the like, and of the pools."""
    pools = sum(map(_pool, tiers(cache)))
    return nbytes(cache) - pools, pools


def _pool(tier: Tier) -> int:
    return _bytes(tier._replace(**dict.fromkeys(FIXED, ())))


def nbytes(cache: Cache) -> int:
    """Of all that a cache is."""
    return sum(map(_bytes, tiers(cache)))


def _bytes(tree: Tier) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
