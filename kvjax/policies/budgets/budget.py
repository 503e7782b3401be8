"""Budgets: how many slots a row may keep."""

import functools
import operator
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple, SupportsIndex

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from kvjax.cache.pages import LARGEST
from kvjax.errors import InputError
from kvjax.spec import Prompt, PyTree

Keep = SupportsIndex | str | Fraction  # 512 [tokens], "20%" of the prompt, or that as a fraction


class Budget(NamedTuple):
    """How many slots a row may keep.

    Attributes:
      slots: `(layer, num_layers, prompt length) -> slots` of a row; on ints and arrays. Where rows differ, their mean:
        the sum over layers and heads is what the pool is made for.
      split: `(statistic [B K T], slots [B], length [B]) -> [B K]` distributes a layer's slots over its heads; None =
        evenly.
      allocate: `(infos, seen, length [B], held [L B K]) -> [L B K]` distributes the slots of layers that share a pool,
        from what `prefill` returned for the `seen` first of them (zeros for the others); rows hold at most `held` by
        now. None = `slots` is final.
      measure: `(prompt, statistic [B K T]) -> info [B K ...]` for `allocate`; None = the statistic.
      every: call `allocate` after every so many layers, to bound the peak; None = once, after the last layer.
      room: `prompt length -> slots` that each row may fill while decoding beyond what it was given, before tokens are
        evicted; None = appended tokens are not counted, rows that evict may fill what they were given.
      grow: `tokens seen -> slots` of a row while decoding, where that is more than it was given; None = it stays.
      most: `(num_layers, K, prompt length) -> slots` that any row may be given; None = `slots`. On ints and arrays.
      by_head: the heads of a layer may be given different numbers of slots.
      whole: `allocate` needs all layers of a model in one pool, as those of equal cached widths are.
      full: `num_layers -> layers` whose rows keep every token, generated ones too; `allocate` gives them `LARGEST`.
      check: `(num_layers, prompt length)` raises `InputError` for a prompt that the budget cannot serve; on the host.
      ladder: rungs per power of two and smallest step of the cache's shapes (see `pages.ladder`).

    A statistic that is handed to `split`, `allocate` and `measure` is -1 where a token is not to be chosen: protected
    tokens and padding.
    """

    slots: Callable[..., Int[Array, "*b"]]
    split: Callable[[Array, Array, Array], Int[Array, "B K"]] | None = None
    allocate: Callable[[list[PyTree], Array, Int[Array, " B"], Int[Array, "L B K"]], Int[Array, "L B K"]] | None = None
    measure: Callable[[Prompt, Array], PyTree] | None = None
    every: int | None = None
    room: Callable[..., Int[Array, "*b"]] | None = None
    grow: Callable[..., Int[Array, "*b"]] | None = None
    most: Callable[..., Int[Array, "*b"]] | None = None
    by_head: bool = False
    whole: bool = False
    full: Callable[[int], Sequence[int]] = lambda num_layers: ()
    check: Callable[[int, int], None] = lambda num_layers, length: None
    ladder: tuple[int, int] = (32, 8)


def parse_keep(keep: Keep, name: str = "budget") -> int | Fraction:
    """Tokens, or the kept fraction of the prompt.

    Args:
      keep: what was given.
      name: of the argument, for errors.

    >>> parse_keep("512"), parse_keep("20%"), parse_keep("12.5%")
    (512, Fraction(1, 5), Fraction(1, 8))
    """
    wrong = InputError(f"{name} {keep!r} is not a number of tokens (512) or a kept fraction (20%)")
    if isinstance(keep, bool):
        raise wrong
    if isinstance(keep, str):
        if re.fullmatch(r"[+-]?\d{1,20}", keep):
            amount = int(keep)
        elif re.fullmatch(r"[+-]?\d{1,20}(\.\d{1,4})?%", keep):
            amount = Fraction(keep[:-1]) / 100
        else:
            raise wrong
    elif isinstance(keep, Fraction):
        amount = keep
    elif hasattr(keep, "__index__"):
        amount = operator.index(keep)
    else:
        raise wrong
    if amount <= 0:
        raise InputError(f"{name} {_show(amount)} keeps nothing: give at least 1 token or more than 0%")
    if isinstance(amount, Fraction):
        if amount > 1:
            raise InputError(f"{name} {_show(amount)} is more than the whole prompt: give at most 100%")
        return amount.limit_denominator(10_000) or Fraction(1, 10_000)
    if amount > LARGEST:
        raise InputError(f"{name} {_show(amount)} is more than any cache holds: give at most {LARGEST}")
    return amount


def _show(keep: int | Fraction) -> str:
    return f"{keep} tokens" if isinstance(keep, int) else f"{float(keep * 100):g}%"


def tokens_of(keep: int | Fraction, length):
    """A budget in tokens: itself, or the fraction of a prompt, rounded down, at least 1.

    >>> int(tokens_of(Fraction(1, 5), 1024))
    204
    """
    if isinstance(keep, int):
        return jnp.full(jnp.shape(length), keep, jnp.int32)
    return jnp.maximum(share(jnp.asarray(length, jnp.int32), keep), 1)


def share(n, of: Fraction):
    """`n * of`, rounded down, without passing 32 bits on the way; on ints and arrays.

    >>> share(300_000, Fraction(9_999, 10_000))
    299970
    """
    return n // of.denominator * of.numerator + n % of.denominator * of.numerator // of.denominator


def while_decoding(budget: Budget, keep: Keep, decoding: Keep) -> Budget:
    """A budget that also bounds what a row holds during decoding.

    Args:
      budget: of the prompt.
      keep: what it was made from.
      decoding: slots per row while decoding, as a mean over rows, at least `keep`; "" = no bound.
    """
    if decoding == "":
        return budget
    first, later = parse_keep(keep), parse_keep(decoding)
    less = InputError(f"decode_budget {_show(later)} is less than the budget {_show(first)}: give at least as much")
    if isinstance(first, int) == isinstance(later, int) and later < first:
        raise less
    room = lambda length: tokens_of(later, length) - tokens_of(first, length)

    def check(num_layers: int, length: int) -> None:
        budget.check(num_layers, length)
        if int(room(length)) < 0:
            raise less

    return budget._replace(room=room, check=check)


def everything() -> Budget:
    """As many slots as there are tokens."""
    return Budget(slots=lambda layer, num_layers, length: jnp.asarray(length, jnp.int32), ladder=(8, 64))


def uniform(keep: Keep, *, growing: bool = False) -> Budget:
    """The same number of slots in every layer and head; `growing`: a share is one of all tokens so far."""
    amount = parse_keep(keep)
    slots = lambda layer, num_layers, length: tokens_of(amount, length)
    return Budget(slots, grow=functools.partial(tokens_of, amount) if growing else None)


def pyramid(keep: Keep, *, window: int, beta: int = 20) -> Budget:
    """Slots fall linearly with depth: lower layers spread their attention, higher layers concentrate it.

    With `b = keep - window` slots besides the observation window, the last layer gets `b // beta` and the first
    `2 b - b // beta`; the mean over layers stays `b`, except that integer steps overspend by up to `(L - 1) / 2` slots
    per layer. Prompts shorter than `2 b` keep `b` everywhere.

    Source: PyramidKV (arXiv 2406.02069), as in KVCache-Factory `pyramidkv/pyramidkv_utils.py`.
    Differs: when the window alone fills the budget the schedule is uniform (the released code fails).
    Cost: nothing.
    """
    amount = parse_keep(keep)

    def slots(layer, num_layers: int, length) -> Int[Array, "*b"]:
        length = jnp.asarray(length, jnp.int32)
        cap = tokens_of(amount, length)
        b = cap - window
        low = b // beta
        high = 2 * b - low
        rest = length - window
        low, high = jnp.where(high >= rest, 2 * b - rest, low), jnp.minimum(high, rest)
        step = (high - low) // max(num_layers - 1, 1)
        scheduled = high - layer * step + window
        return jnp.where((b <= 0) | (length < 2 * b) | (num_layers == 1), cap, scheduled)

    return Budget(slots)
