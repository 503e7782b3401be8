"""Budgets that are decided after a prompt has been read: over the heads of a layer, over all layers."""

import functools
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from kvjax.attention.prompt_scores import query_column_sums
from kvjax.cache.pages import LARGEST
from kvjax.errors import InputError
from kvjax.parallel import collectives
from kvjax.policies.budgets.apportion import count_best, hand_out
from kvjax.policies.budgets.budget import Budget, share, tokens_of
from kvjax.spec import Prompt

ADA_FLOOR = 0.2  # the released code's safeguard
LayerRule = Literal["paper", "released"]


@functools.cache
def per_head(budget: Budget, floor: float) -> Budget:
    """A layer's slots go to the heads with the largest scores.

    Protected tokens are kept in every head. The others are chosen by one threshold over all heads of the layer; a head
    gets its share of that choice, mixed with an even share.

    Args:
      budget: slots of each layer, as a mean over heads.
      floor: what part of the slots is shared evenly, 0 to 1: the safeguard.

    Source: Ada-KV (arXiv 2407.11550); FFY0/AdaKV `adaptive_snapkv`.
    Differs: the slots of a layer add up exactly (the released code rounds each head's).
    Cost: 31 counting passes over the layer's scores.
    """
    even = _fraction("floor", floor)

    def split(stat: Float[Array, "B K T"], slots: Int[Array, " B"], length: Int[Array, " B"]) -> Int[Array, "B K"]:
        stat = collectives.gather(stat, axis=1)
        heads, (base, available) = stat.shape[1], _open_slots(stat[:, 0], slots, length)
        counts = count_best(jnp.moveaxis(stat, 1, 0), base * heads)
        wanted = base * even.numerator + counts * (even.denominator - even.numerator)
        rows = hand_out(wanted, even.denominator, base * heads, jnp.zeros_like(counts), available)
        rows = jnp.moveaxis(rows, 0, 1) + jnp.minimum(slots, length - available)[:, None]
        rows = collectives.own(rows, axis=1)
        return _or_all(rows, slots[:, None], length[:, None])

    def max_slots(keep: int | Fraction, num_layers: int, num_heads: int, length) -> Any:
        slots = np.max([budget.slots(keep, i, num_layers, length) for i in range(num_layers)], axis=0)
        return np.maximum(np.minimum(_times(slots, Fraction(num_heads)), length), slots)

    return budget._replace(split=split, max_slots=max_slots, by_head=True)


class ScoreRule(NamedTuple):
    """What `from_scores` was given."""

    r_max: Fraction
    floor: Fraction
    regrow: bool
    ada: bool


@functools.cache
def from_scores(
    *, r_max: float = 10.0, update_interval: int = 4, regrow: bool = True, floor: float = 0.0, ada: bool = False
) -> Budget:
    """Slots go to the layers with the largest scores.

    Protected tokens are kept in every layer. Of the others, one threshold over all layers, heads and positions keeps as
    many as the budget allows, and a layer gets its share of them. That is done after every `update_interval` layers
    with the layers seen so far, so that at most as many hold more than their share.

    Args:
      r_max: a layer may get so many times the mean [besides protected tokens].
      update_interval: layers between updates; 0 = one decision, after the last layer.
      regrow: slots that a layer cannot take (it has given up the tokens, or has no more) go to other layers; False =
        they are lost, as in the released code.
      floor: the least share of the mean that a layer gets.
      ada: a share for each head instead of each layer.

    Source: DynamicKV (arXiv 2412.14838), DreamMr/DynamicKV `methods/dynamic_v11.py`.
    Differs: one set of tokens per key/value head; a layer that was trimmed asks for no more than it holds (the released
      code keeps window tokens twice); what rounding leaves is handed out.
    Cost: 31 counting passes over the scores of the layers seen, at every update; their scores in float32 until then.
    """
    rule = ScoreRule(_fraction("r_max", r_max, 1000), _fraction("floor", floor), regrow, ada)
    if r_max < 1:
        raise InputError(f"r_max={r_max} is less than 1: the layers could not hold the budget")
    if not 0 <= update_interval <= LARGEST:
        raise InputError(f"update_interval={update_interval} is not a number of layers")
    return Budget(
        slots=_even_slots,
        allocate=functools.partial(_allocate_by_scores, rule),
        update_interval=update_interval or None,
        max_slots=functools.partial(_max_slots_by_scores, rule),
        by_head=ada,
    )


def _allocate_by_scores(
    rule: ScoreRule,
    stats: list[Float[Array, "B K T"]],
    seen: Array,
    length: Int[Array, " B"],
    held: Int[Array, "L B K"],
    slots: Int[Array, " B"],
) -> Int[Array, "L B K"]:
    stat = jnp.stack(stats)
    layers, _, heads, _ = stat.shape
    base, available = _open_slots(stat[0, :, 0], slots, length)
    protected = jnp.minimum(slots, length - available)
    known = jnp.repeat(jnp.arange(layers) < seen, heads)[:, None]
    rows = jnp.moveaxis(stat, 2, 1).reshape(layers * heads, *stat.shape[1:2], -1)  # L*K B T
    counts = count_best(jnp.where(known[..., None], rows, -1.0), base * heads * seen)
    at_most = jnp.minimum(_times(base, rule.r_max), available)
    at_most = jnp.minimum(at_most, jnp.moveaxis(held, 2, 1).reshape(layers * heads, -1) - protected)
    unit = seen
    if not rule.ada:  # a layer's heads share evenly
        add = lambda x: x.reshape(layers, heads, -1).sum(axis=1)
        counts, known, at_most = add(counts), known[::heads], at_most[::heads]
        unit = seen * heads
    wanted = _times(base, rule.floor) * unit + share(counts * layers, 1 - rule.floor)
    at_most = jnp.where(known, at_most, 0)
    if rule.regrow:
        got = hand_out(wanted, unit, base * layers * (heads if rule.ada else 1), jnp.zeros_like(wanted), at_most)
    else:
        got = jnp.minimum(wanted // unit, at_most)
    got = jnp.where(known, _or_all(got + protected, slots, length), LARGEST)
    if rule.ada:
        return jnp.moveaxis(got.reshape(layers, heads, -1), 1, 2)
    return jnp.broadcast_to(got[..., None], (*got.shape, heads))


def _max_slots_by_scores(rule: ScoreRule, keep: int | Fraction, num_layers: int, num_heads: int, length) -> Any:
    slots = tokens_of(keep, length)
    return np.minimum(np.maximum(slots, _times(slots, rule.r_max)), length)


class VarianceRule(NamedTuple):
    """What `from_variance` was given."""

    min_slots: int
    rule: LayerRule
    full_layers: tuple[int, ...]


@functools.cache
def from_variance(*, min_slots: int, rule: LayerRule, full_layers: tuple[int, ...] = ()) -> Budget:
    """Layers whose attention is spread out get more slots than those in which it is concentrated.

    Slots are shared in proportion to the softmax of a statistic with its sign reversed. With `sums` the attention that
    a key received from all queries, it is between 0 and 1:

        paper      the variance over keys of the sums of all heads' mean, scaled from the least layer to the largest
        released   the variance over keys of each query head's sums, scaled from its layer's least head to the largest,
                   and averaged over heads: it tells how heads differ, and not how concentrated a layer is

    Args:
      min_slots: slots that every row gets, or a hundredth of the prompt, or the mean budget if that is less.
      rule: which statistic.
      full_layers: layers that keep every token, generated ones too; -1 is the last one. The other layers pay for their
        prompt; what they append comes on top of the budget.

    Source: D2O (arXiv 2406.13035), F_d; released code `modeling_llama3_new.py`.
    Differs: `paper` scales over layers: as it stands the variance grows with the prompt, and one layer would be given
      everything. Slots add up to the budget (the released code lets layers that keep everything pass it, clips shares
      without handing out the rest, and truncates twice).
    Cost: one more query-key pass over the prompt; all layers wait for the last one.
    """
    if rule not in RULES:
        raise InputError(f"layer_rule={rule!r} is not 'paper' or 'released'")
    given = VarianceRule(min_slots, rule, full_layers)
    return Budget(
        slots=_even_slots,
        allocate=functools.partial(_allocate_by_variance, given),
        measure=functools.partial(_measure_variance, given),
        max_slots=functools.partial(_max_slots_by_variance, given),
        needs_one_pool=bool(full_layers),
        full=functools.partial(_full_layers, given),
        check=functools.partial(_check_full_layers, given),
    )


def _full_layers(rule: VarianceRule, num_layers: int) -> list[int]:
    if wrong := [i for i in rule.full_layers if not -num_layers <= i < num_layers]:
        raise InputError(f"full_layers: there is no layer {wrong[0]} in a model of {num_layers} layers")
    return sorted({i % num_layers for i in rule.full_layers})


def _min_slots(rule: VarianceRule, slots, length):
    """What every row gets, where each layer has so many slots as a mean; on the host's and the device's arrays."""
    array = jnp if isinstance(length, jax.Array) else np
    return array.minimum(array.maximum((length + 99) // 100, max(rule.min_slots, 2)), array.minimum(slots, length))


def _max_slots_by_variance(rule: VarianceRule, keep: int | Fraction, num_layers: int, num_heads: int, length) -> Any:
    slots = tokens_of(keep, length)
    if rule.full_layers:
        return np.maximum(length, slots)
    # Shares come from statistics between 0 and 1: none is more than e times another.
    return np.maximum(np.minimum(length, 3 * np.minimum(slots, length) + _min_slots(rule, slots, length)), slots)


def _check_full_layers(rule: VarianceRule, keep: int | Fraction, num_layers: int, length: int) -> None:
    full, slots = len(_full_layers(rule, num_layers)), int(tokens_of(keep, length))
    total, low = num_layers * min(slots, length), int(_min_slots(rule, slots, length))
    need = full * length + (num_layers - full) * low
    if total < need:
        raise InputError(
            f"a budget of {total // num_layers} slots in each of {num_layers} layers is too small for a prompt of"
            f" {length} tokens: {full} full layers and {low} slots in each other layer need a"
            f" budget of {-(-need // num_layers)}"
        )


def _allocate_by_variance(
    rule: VarianceRule,
    infos: list[Float[Array, "B K"]],
    seen: Array,
    length: Int[Array, " B"],
    held: Int[Array, "L B K"],
    slots: Int[Array, " B"],
) -> Int[Array, "L B K"]:
    layers, info = len(infos), jnp.stack(infos)[..., 0]  # of a layer, not of a head
    full = jnp.zeros((layers, 1), bool).at[jnp.asarray(_full_layers(rule, layers), jnp.int32)].set(True)
    rest = jnp.minimum(slots, length) * layers - length * full.sum()
    if rule.rule == "paper":
        low, high = (f(info, axis=0, where=~full, initial=x) for f, x in ((jnp.min, jnp.inf), (jnp.max, 0.0)))
        info = (info - low) / (high - low + 1e-6)
    shares = jax.nn.softmax(jnp.where(full, -jnp.inf, -info), axis=0)
    # Fractions of a slot decide who gets what is left.
    unit = jnp.clip(2**30 // jnp.maximum(rest, length + 1), 1, 4096)
    wanted = jnp.floor(shares * (rest * unit).astype(jnp.float32)).astype(jnp.int32)
    low, high = (jnp.where(full, 0, bound) for bound in (_min_slots(rule, slots, length), length))
    rows = _or_all(hand_out(wanted, unit, rest, low, high), slots, length)
    return jnp.broadcast_to(jnp.where(full, LARGEST, rows)[..., None], held.shape)


def _measure_variance(rule: VarianceRule, prompt: Prompt, stat: Array) -> Float[Array, "B K"]:
    found = RULES[rule.rule](query_column_sums(prompt), prompt.alive())
    return jnp.broadcast_to(found[:, None], stat.shape[:2])


def spread_over_keys(sums: Float[Array, "B N T"], alive: Bool[Array, "B T"]) -> Float[Array, " B"]:
    """The variance over keys of the attention of all heads together: the paper's statistic, see `from_variance`."""
    return _variance(collectives.mean(sums, axis=1)[:, None], alive)[:, 0]


def spread_over_heads(sums: Float[Array, "B N T"], alive: Bool[Array, "B T"]) -> Float[Array, " B"]:
    """Where the variances of a layer's heads lie between the least and the largest: that of the released code."""
    variance = collectives.gather(_variance(sums, alive), axis=1)
    low, high = variance.min(axis=-1, keepdims=True), variance.max(axis=-1, keepdims=True)
    return jnp.mean((variance - low) / (high - low + 1e-6), axis=-1)


RULES = {"paper": spread_over_keys, "released": spread_over_heads}


def _variance(sums: Float[Array, "B N T"], alive: Bool[Array, "B T"]) -> Float[Array, "B N"]:
    """Over a prompt's tokens; unbiased."""
    real, count = alive[:, None], jnp.sum(alive, axis=-1, dtype=jnp.float32)[:, None]
    mean = jnp.mean(sums, axis=-1, where=real, keepdims=True)
    square = jnp.sum(jnp.where(real, (sums - mean) ** 2, 0.0), axis=-1)
    return square / jnp.maximum(count - 1, 1)


def _even_slots(keep: int | Fraction, layer: int, num_layers: int, length) -> Any:
    """The same number of slots in every layer, as a mean over what `allocate` will decide."""
    return tokens_of(keep, length)


def _fraction(name: str, value: float, largest: int = 1) -> Fraction:
    if not 0 <= value <= largest:
        raise InputError(f"{name}={value} is not between 0 and {largest}")
    return Fraction(value).limit_denominator(1000)


def _open_slots(stat: Float[Array, "B T"], slots: Int[Array, " B"], length: Int[Array, " B"]) -> tuple[Array, Array]:
    """Slots that are left beside protected tokens, and tokens that they may be given to, as many in every row."""
    available = jnp.sum(stat >= 0, axis=-1, dtype=jnp.int32)
    return jnp.clip(slots - (length - available), 0, available), available


def _or_all(rows: Int[Array, "*b"], slots: Int[Array, "*#b"], length: Int[Array, "*#b"]) -> Int[Array, "*b"]:
    """The rows, or `slots` each where the whole prompt fits: what is free then fills up while decoding."""
    return jnp.where(slots < length, rows, slots)


def _times(n, of: Fraction):
    """`n * of` rounded down, at most `LARGEST`; on the host's and the device's arrays."""
    array = jnp if isinstance(n, jax.Array) else np
    limit = min(LARGEST * of.denominator // max(of.numerator, 1), LARGEST)
    return array.where(n >= limit, LARGEST, share(array.minimum(n, limit), of))
