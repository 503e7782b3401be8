"""What an engine compiles besides prompts: sequences that take a seat and leave it, and steps of all of them."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from kvjax.cache import seats
from kvjax.cache.layout import Cache
from kvjax.cache.tier import PER_ROW
from kvjax.generation import decode, sampling
from kvjax.generation.decode import DecodeState, Ends, Ranked
from kvjax.generation.sampling import Chooser
from kvjax.models.decoder import Decoder
from kvjax.policies.base import Recipe
from kvjax.spec import PyTree

TOP = 20  # most likely tokens that are told


class Seats(NamedTuple):
    """Sequences that decode side by side, and how."""

    state: DecodeState
    chooser: Chooser
    ends: Ends


def empty(cache: Cache, count: int, vocabulary: int, stops: int) -> Seats:
    """So many seats with nobody in them; arrays are as programs make them, so that nothing is compiled twice."""

    @functools.partial(jax.jit, donate_argnums=0)
    def make(cache: Cache) -> Seats:
        zeros = lambda: jnp.zeros(count, jnp.int32)
        seen, done = jnp.zeros((count, vocabulary), jnp.int32), jnp.ones(count, bool)
        state = DecodeState(cache, zeros(), zeros(), done, zeros(), seen)
        stop = jnp.full((count, stops), -1, jnp.int32)
        return Seats(state, sampling.chooser(sampling.Sampling(), count), Ends(stop, zeros()))

    return make(cache)


@functools.partial(jax.jit, donate_argnums=0)
def take(all_: Seats, seat: Int[Array, ""], one: Seats) -> Seats:
    """Everything of one sequence, whose cache stays as it is, in an empty seat."""
    put = lambda x, y: x.at[seat].set(y[0])
    without = lambda seats_: seats_._replace(state=seats_.state._replace(cache=()))
    rest = jax.tree.map(put, without(all_), without(one))
    return rest._replace(state=rest.state._replace(cache=_kept(all_.state.cache, seat, one.state.cache)))


def _kept(all_: Cache, place: Int[Array, ""], one: Cache) -> Cache:
    return tuple(
        tuple(seats.take(tier, place, own) for tier, own in zip(*pair, strict=True))
        for pair in zip(all_, one, strict=True)
    )


def _left(all_: Cache, place: Int[Array, ""]) -> Cache:
    return tuple(tuple(seats.leave(tier, place) for tier in tiers) for tiers in all_)


# The cache of one sequence, which stays as it is, in an empty place among others; and that place empty again.
keep, drop = (jax.jit(of, donate_argnums=0) for of in (_kept, _left))


def rows(cache: Cache, which: Int[Array, " B"]) -> Cache:
    """The rows of some places, over the same pools, for `shared` of `steps`; -1 = of a sequence that has nothing."""
    picked = iter(_rows([{name: getattr(t, name) for name in PER_ROW} for tiers in cache for t in tiers], which))
    return tuple(tuple(tier._replace(**next(picked)) for tier in tiers) for tiers in cache)


@jax.jit
def _rows(fields: list[dict[str, PyTree]], which: Int[Array, " B"]) -> list[dict[str, PyTree]]:
    fields = jax.tree.map(lambda x: jnp.take(x, jnp.maximum(which, 0), axis=1), fields)
    return [one | {"length": jnp.where(which[:, None] < 0, 0, one["length"])} for one in fields]


@functools.partial(jax.jit, donate_argnums=1, static_argnames=("recipe", "chunk"))
def steps(
    model: Decoder,
    state: DecodeState,
    chooser: Chooser,
    ends: Ends,
    shared: Cache,
    ranks: Bool[Array, ""],
    *,
    recipe: Recipe,
    chunk: int,
) -> tuple[DecodeState, Int[Array, "R chunk"], Ranked]:
    """`decode.decode_loop`; and, where `ranks` is true, what `decode.ranked` says of each token."""
    top = min(TOP, model.spec.vocab_size)
    said = lambda *given: decode.ranked(*given, top)

    def rank(*given: Array) -> Ranked:
        nothing = lambda *given: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(said, *given))
        return jax.lax.cond(ranks, said, nothing, *given)

    return decode.loop(model, state, chooser, ends, shared, (), recipe, chunk, rank)


@functools.partial(jax.jit, donate_argnums=0)
def leave(state: DecodeState, seat: Int[Array, ""]) -> DecodeState:
    """A seat's pages are free, and nothing is decoded there."""
    return state._replace(cache=_left(state.cache, seat), done=state.done.at[seat].set(True))
