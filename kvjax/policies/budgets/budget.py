"""Budgets: how many slots a row may keep."""

import functools
import operator
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from kvjax.cache.pages import LARGEST
from kvjax.errors import InputError
from kvjax.spec import Prompt, PyTree

Keep = SupportsIndex | str | Fraction  # 512 [tokens], "20%" of the prompt, or that as a fraction


class Amounts(NamedTuple):
    """How much a method may keep: data, no part of what its programs are compiled for."""

    keep: int | Fraction | None = None  # of a prompt, per row; None = the method has no budget, or the model decides
    decoding: int | Fraction | None = None  # while decoding; None = no bound, or that of the prompt
    most: int | Fraction | None = None  # of a prompt, for shapes; None = `keep`

    @property
    def bounded(self) -> bool:
        """Whether there is an amount of its own while decoding."""
        return self.decoding is not None


class Budget(NamedTuple):
    """How the slots that a row may keep follow from an amount; hashable, without the amount.

    Attributes:
      slots: `(keep, layer, num_layers, prompt length) -> slots` of a row; on ints and arrays. Where rows differ, their
        mean: the sum over layers and heads is what the pool is made for.
      rows: `(keep, spec, layers, prompt length [B]) -> [l B K]`, the slots of each row of the `Layers`, where they
        differ and are known before the prompt; they add up to what `slots` says. None = `slots` each.
      split: `(statistic [B K T], slots [B], length [B]) -> [B K]` distributes a layer's slots over its heads; None =
        evenly.
      allocate: `(infos, seen, length [B], held [L B K], slots [B]) -> [L B K]` distributes the slots of layers that
        share a pool, `slots` each as a mean, from what `prefill` returned for the `seen` first of them (zeros for the
        others); rows hold at most `held` by now. None = `slots` is final.
      measure: `(prompt, statistic [B K T]) -> info [B K ...]` for `allocate`; None = the statistic.
      update_interval: call `allocate` after every so many layers, to bound the peak; None = once, after the last layer.
      grows: while decoding a row may fill the amount's share of all tokens so far, where that is more.
      max_slots: `(keep, num_layers, K, prompt length) -> slots` that any row may be given; None = `slots`.
      by_head: the heads of a layer may be given different numbers of slots.
      needs_one_pool: `allocate` needs all layers of a model in one pool, as those of equal cached widths are.
      full: `num_layers -> layers` whose rows keep every token, generated ones too; `allocate` gives them `LARGEST`.
      check: `(keep, num_layers, prompt length)` raises `InputError` for a prompt that the budget cannot serve.
      ladder: rungs per power of two and smallest step of the cache's shapes (see `pages.ladder`).

    Functions of `keep` run on the host, where a cache is allocated; all others run inside `jit`. A statistic that is
    handed to `split`, `allocate` and `measure` is -1 where a token is not to be chosen: protected tokens and padding.
    """

    slots: Callable[..., Int[np.ndarray, "*b"]]
    rows: Callable[..., Int[np.ndarray, "l B K"]] | None = None
    split: Callable[[Array, Array, Array], Int[Array, "B K"]] | None = None
    allocate: Callable[..., Int[Array, "L B K"]] | None = None
    measure: Callable[[Prompt, Array], PyTree] | None = None
    update_interval: int | None = None
    grows: bool = False
    max_slots: Callable[..., Int[np.ndarray, "*b"]] | None = None
    by_head: bool = False
    needs_one_pool: bool = False
    full: Callable[[int], Sequence[int]] = lambda num_layers: ()
    check: Callable[[int | Fraction, int, int], None] = lambda keep, num_layers, length: None
    ladder: tuple[int, int] = (32, 8)


def parse_keep(keep: Keep, name: str = "budget") -> int | Fraction:
    """Tokens, or the kept fraction of the prompt.

    Args:
      keep: what was given.
      name: of the argument, for errors.

    >>> parse_keep("512"), parse_keep("20 %"), parse_keep("12.5%")
    (512, Fraction(1, 5), Fraction(1, 8))
    """
    if isinstance(keep, Fraction):
        amount = keep
    elif isinstance(keep, str) and re.fullmatch(r"[+-]?\d{1,20}(\.\d{1,4})? ?%", keep):
        amount = Fraction(keep[:-1]) / 100
    elif isinstance(keep, str) and re.fullmatch(r"[+-]?\d{1,20}", keep):
        amount = int(keep)
    elif not isinstance(keep, bool | str) and hasattr(keep, "__index__"):
        amount = operator.index(keep)
    else:
        raise InputError(f"{name} {keep!r} is not a number of tokens (512) or a kept fraction (20%)")
    if amount <= 0:
        raise InputError(f"{name} {show(amount)} keeps nothing: give at least 1 token or more than 0%")
    if isinstance(amount, Fraction):
        if amount > 1:
            raise InputError(f"{name} {show(amount)} is more than the whole prompt: give at most 100%")
        return amount.limit_denominator(10_000) or Fraction(1, 10_000)
    if amount > LARGEST:
        raise InputError(f"{name} {show(amount)} is more than any cache holds: give at most {LARGEST}")
    return amount


def show(keep: int | Fraction) -> str:
    """A budget for people."""
    return f"{keep} tokens" if isinstance(keep, int) else f"{float(keep * 100):g}%"


def tokens_of(keep: int | Fraction, length: Any) -> Any:
    """A budget in tokens: itself, or the fraction of a prompt, rounded down, at least 1.

    >>> int(tokens_of(Fraction(1, 5), 1024))
    204
    """
    array = jnp if isinstance(length, jax.Array) else np
    if isinstance(keep, int):
        return array.full(array.shape(length), keep, np.int32)
    return array.maximum(share(array.asarray(length, np.int32), keep), 1)


def share(n, of: Fraction):
    """`n * of`, rounded down, without passing 32 bits on the way; on ints and arrays.

    >>> share(300_000, Fraction(9_999, 10_000))
    299970
    """
    return times(n, of.numerator, of.denominator)


def times(n, numerator, denominator):
    """`n * numerator / denominator` as `share` has it, of integers that may be arrays."""
    return n // denominator * numerator + n % denominator * numerator // denominator


def amounts(keep: Keep, decoding: Keep = "") -> Amounts:
    """What a factory's `budget` and `decode_budget` say.

    Args:
      keep: of the prompt.
      decoding: slots per row while decoding, as a mean over rows, at least `keep`; "" = no bound.
    """
    first = parse_keep(keep)
    if decoding == "":
        return Amounts(first)
    later = parse_keep(decoding, "decode_budget")
    if isinstance(first, int) == isinstance(later, int) and later < first:
        raise _less(first, later)
    return Amounts(first, later)


def decode_slots(given: Amounts, length):
    """Slots that each row may fill while decoding beyond what its prompt was given; on ints and arrays."""
    if given.keep is None or given.decoding is None:
        return tokens_of(0, length)
    return tokens_of(given.decoding, length) - tokens_of(given.keep, length)


def check(budget: Budget, given: Amounts, num_layers: int, length: int) -> None:
    """Raise `InputError` for a prompt that these amounts cannot serve."""
    if given.keep is None:
        return
    budget.check(given.keep, num_layers, length)
    if given.decoding is not None and int(decode_slots(given, length)) < 0:
        raise _less(given.keep, given.decoding)


def _less(first: int | Fraction, later: int | Fraction) -> InputError:
    return InputError(f"decode_budget {show(later)} is less than the budget {show(first)}: give at least as much")


@functools.cache
def everything() -> Budget:
    """As many slots as there are tokens."""
    return Budget(slots=lambda keep, layer, num_layers, length: np.asarray(length, np.int32), ladder=(8, 64))


@functools.cache
def uniform(*, growing: bool = False) -> Budget:
    """The same number of slots in every layer and head; `growing`: a share is one of all tokens so far."""
    return Budget(lambda keep, layer, num_layers, length: tokens_of(keep, length), grows=growing)


@functools.cache
def pyramid(*, window: int, beta: int = 20) -> Budget:
    """Slots fall linearly with depth: lower layers spread their attention, higher layers concentrate it.

    With `b = keep - window` slots besides the observation window, the last layer gets `b // beta` and the first
    `2 b - b // beta`; the mean over layers stays `b`, except that integer steps overspend by up to `(L - 1) / 2` slots
    per layer. Prompts shorter than `2 b` keep `b` everywhere.

    Source: PyramidKV (arXiv 2406.02069), as in KVCache-Factory `pyramidkv/pyramidkv_utils.py`.
    Differs: when the window alone fills the budget the schedule is uniform (the released code fails).
    Cost: nothing.
    """

    def slots(keep: int | Fraction, layer: int, num_layers: int, length) -> Any:
        length = np.asarray(length, np.int32)
        cap = tokens_of(keep, length)
        b = cap - window
        low = b // beta
        high = 2 * b - low
        rest = length - window
        low, high = np.where(high >= rest, 2 * b - rest, low), np.minimum(high, rest)
        step = (high - low) // max(num_layers - 1, 1)
        scheduled = high - layer * step + window
        return np.where((b <= 0) | (length < 2 * b) | (num_layers == 1), cap, scheduled)

    return Budget(slots)
