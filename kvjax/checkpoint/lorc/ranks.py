"""The ranks of a model's low-rank keys and values: what users ask for, and what each layer gets."""

import math
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int

from kvjax.errors import InputError
from kvjax.files.text import parse_json, read_text

FLOOR = 1e-6  # of the largest singular value; smaller ones are noise
FLAT = 1e-6  # layers whose condition numbers' logarithms differ less are equal
Basis = Literal["plain", "whiten"]
BASIS: Basis = "whiten"
Ranks = tuple[tuple[int, int], ...]  # of keys and of values, layer by layer


class RankRequest(NamedTuple):
    """How many channels are to be cached.

    Attributes:
      keep: at most this fraction of all keys' and values' numbers.
      rule: how they are spread over the layers, one of `RULES`.
      bounds: instead of both, the first and the last layer's rank, d_max and d_min: of a group's n channels so many, or
        that share.
    """

    keep: Fraction = Fraction(1)
    rule: str = "lorc"
    bounds: tuple[int | Fraction, int | Fraction] | None = None


class LowRankOptions(NamedTuple):
    """How keys and values are made low-rank.

    Source: LoRC (arXiv 2410.03111); SVD-LLM (arXiv 2403.07378) for `whiten`.
    Differs: the paper has `plain`; `docs/lorc.md` measures what the default saves.

    Attributes:
      request: how much of them is kept, or a file of ranks (`read_ranks`).
      heads: key/value heads that share a latent; None = all, as in the paper.
      basis: best for the weights, as in the paper, or for keys and values on a text.
      text: that text; None = `calibration.sample_text`.
      hadamard: turn the latents for low-bit stores.
    """

    request: RankRequest | Path
    heads: int | None = None
    basis: Basis = BASIS
    text: Path | None = None
    hadamard: bool = False


def unit_of(outputs: int, n: int) -> int:
    """Ranks below the full one are multiples of this: of 16, of 4 where all heads together have less than 512 channels.

    >>> unit_of(1024, 128), unit_of(256, 128)
    (16, 4)
    """
    return min(16 if outputs >= 512 else 4, n)


def check(request: RankRequest, outputs: int, n: int) -> None:
    """Raises `InputError` for a request that groups of n of K*H outputs cannot serve; needs no weights."""
    unit = unit_of(outputs, n)
    if request.bounds is None:
        if request.keep * n < unit:
            given, least = _show(request.keep), f"{math.ceil(Fraction(unit * 10_000, n)) / 100:g}%"
            raise InputError(f"--lorc keep={given} is less than the least rank, {unit} of {n}: give at least {least}")
        return
    high, low = request.bounds
    if _channels(high, n) > n:
        raise InputError(f"--lorc d_max={_show(high)} is more than the {n} channels of a group")
    if _channels(low, n) > _channels(high, n):
        raise InputError(f"--lorc d_min={_show(low)} is more than d_max={_show(high)}")


def allot(request: RankRequest, spectra: Float[np.ndarray, "L 2 C n"]) -> Ranks:
    """Ranks of a group's keys and values in each layer, from the singular values of all.

    They are multiples of `unit_of` below n, or n where all is to be kept: ends that were given are rounded to the
    nearest, for a share the sum is the largest that `keep` admits.
    """
    _, _, groups, n = spectra.shape
    check(request, groups * n, n)
    if request.bounds is not None:
        unit, most = _units(spectra)
        wanted = ramp(spectra, *(float(_channels(bound, n)) for bound in request.bounds))
        rounded = np.clip(np.floor(wanted / unit + 0.5), 1, most) * unit
        ranks = np.where(wanted < n, rounded, n)[:, None].repeat(2, axis=1)
    elif request.keep == 1:
        ranks = np.full(spectra.shape[:2], n)
    else:
        ranks = RULES[request.rule](spectra, request.keep)
    return tuple((int(key), int(value)) for key, value in ranks)


def ramp(spectra: Float[np.ndarray, "L 2 C n"], high: float, low: float) -> Float64[np.ndarray, " L"]:
    """LoRC's progressive ranks, before they are rounded.

        d_l = d_max (1 - (max log k - log k_l) / (max log k - min log k) (1 - d_min / d_max))

    where k_l is the product of the condition numbers of the keys' and values' projections from layer l to the last: an
    error in an early layer passes through all of them. The first layer has the largest product and gets d_max, the last
    gets d_min; all get d_max where the products are equal.

    Source: LoRC (arXiv 2410.03111), progressive compression.
    Differs: sums of logarithms, as products overflow; singular values below 1e-6 of the largest, which are noise, count
      as that; for groups, the mean of their logarithms.
    Cost: nothing beside the spectra.
    """
    return high - _depth(spectra) * (high - low)


def ramp_to(spectra: Float[np.ndarray, "L 2 C n"], keep: Fraction) -> Float64[np.ndarray, " L"]:
    """The `ramp` whose mean is `keep * n`.

    The paper names no ends. Here `d_max = min(n, 4/3 keep n)`, and d_min follows, about `2/3 keep n`, as the products
    fall off almost evenly; where it would be less than the least rank it is that, and d_max follows.
    """
    n, unit, depth = spectra.shape[-1], _units(spectra)[0], float(_depth(spectra).mean())
    mean = float(keep * n)
    high = min(float(n), 4 / 3 * mean)
    low = max(high - (high - mean) / depth, float(unit)) if depth > 0 else float(unit)
    return ramp(spectra, (mean - depth * low) / (1 - depth), low)


def lorc(spectra: Float[np.ndarray, "L 2 C n"], keep: Fraction) -> Int[np.ndarray, "L 2"]:
    """`ramp_to`, the same rank for a layer's keys and values. See `ramp` for its source."""
    return _whole(ramp_to(spectra, keep), spectra, keep)


def uniform(spectra: Float[np.ndarray, "L 2 C n"], keep: Fraction) -> Int[np.ndarray, "L 2"]:
    """The same rank everywhere; where that falls short of `keep`, the first layers get one unit more."""
    return _whole(np.full(len(spectra), float(keep * spectra.shape[-1])), spectra, keep)


def energy(spectra: Float[np.ndarray, "L 2 C n"], keep: Fraction) -> Int[np.ndarray, "L 2"]:
    """Each unit where it captures the largest share of its own matrix's energy, the sum of squared singular values.

    Every matrix gets one unit. Keys and values are told apart, and a deep layer may get more than a shallow one.

    Source: truncation by explained variance, for one budget of all matrices; no paper's rule.
    Cost: a sort of `2 L n / unit` numbers.
    """
    (layers, two, _, n), (unit, most) = spectra.shape, _units(spectra)
    squares = spectra**2
    gain = squares[..., : most * unit].reshape(layers * two, -1, most, unit).sum(axis=(1, 3))
    total = squares.sum(axis=(2, 3)).reshape(-1, 1)
    share = np.divide(gain, total, out=np.zeros_like(gain), where=total > 0)
    share[:, 0] = np.inf
    best = np.argsort(-share, axis=None, kind="stable")[: math.floor(keep * layers * two * n / unit)]
    return np.bincount(best // most, minlength=layers * two).reshape(layers, two) * unit


RULES: dict[str, Callable[..., Int[np.ndarray, "L 2"]]] = {"lorc": lorc, "uniform": uniform, "energy": energy}


def _units(spectra: Float[np.ndarray, "L 2 C n"]) -> tuple[int, int]:
    """Channels of a unit, and the most units of a group."""
    groups, n = spectra.shape[2:]
    unit = unit_of(groups * n, n)
    return unit, n // unit


def _depth(spectra: Float[np.ndarray, "L 2 C n"]) -> Float64[np.ndarray, " L"]:
    """Where each layer stands on the ramp: 0 in the first, 1 in the last, by the products of condition numbers."""
    first, last = spectra[..., 0], spectra[..., -1]
    ratio = np.divide(last, first, out=np.ones_like(first), where=first > 0)
    log_kappa = -np.log(np.maximum(ratio, FLOOR)).mean(axis=-1).sum(axis=-1)
    log_product = np.cumsum(log_kappa[::-1])[::-1]
    span = np.ptp(log_product)
    return (log_product.max() - log_product) / span if span > FLAT else np.zeros(len(spectra))


def _whole(
    wanted: Float[np.ndarray, " L"], spectra: Float[np.ndarray, "L 2 C n"], keep: Fraction
) -> Int[np.ndarray, "L 2"]:
    """Ranks of keys and values alike: rounded down, then a unit more for those that lost most, as `keep` admits."""
    unit, most = _units(spectra)
    wanted = wanted / unit
    units = np.clip(np.floor(wanted), 1, most).astype(int)
    total = min(math.floor(keep * len(units) * spectra.shape[-1] / unit), most * len(units))
    for _ in range(total - int(units.sum())):
        units[np.argmax(np.where(units < most, wanted - units, -np.inf))] += 1
    return units[:, None].repeat(2, axis=1) * unit


def _channels(bound: int | Fraction, n: int) -> int | Fraction:
    return bound * n if isinstance(bound, Fraction) else bound


def parse(text: str) -> RankRequest:
    """The value of `--lorc`: what to keep, and by which of `RULES`, or the ends of LoRC's ramp.

    A whole number of d_max and d_min is a number of channels, one with a point or a percent sign is a share.

    >>> parse("keep=60%,rule=energy").keep, parse("d_max=512,d_min=25%").bounds
    (Fraction(3, 5), (512, Fraction(1, 4)))
    """
    sides = [part.partition("=") for part in text.split(",")]
    given = {name.strip(): value.strip() for name, _, value in sides}
    match sorted(given) if len(given) == len(sides) and all(given.values()) else []:
        case ["keep"] | ["keep", "rule"]:
            rule = given.get("rule", "lorc")
            if rule not in RULES:
                raise InputError(f"--lorc rule={rule} is not one of {', '.join(RULES)}")
            return RankRequest(Fraction(_amount("keep", given["keep"], share=True)), rule)
        case ["d_max", "d_min"]:
            return RankRequest(bounds=(_amount("d_max", given["d_max"]), _amount("d_min", given["d_min"])))
    rules = "|".join(RULES)
    raise InputError(f"--lorc {text!r}: expected keep=60% or keep=60%,rule={rules} or d_max=80%,d_min=40%")


def write(request: RankRequest) -> str:
    """The value of `--lorc` that is read as this request.

    >>> write(parse("keep=0.6"))
    'keep=60%,rule=lorc'
    """
    if request.bounds is not None:
        return "d_max={},d_min={}".format(*map(_show, request.bounds))
    return f"keep={_show(request.keep)},rule={request.rule}"


def read_ranks(path: Path) -> tuple[int | None, Ranks]:
    """How many heads share a latent, None if the file does not say, and the ranks.

    The file is JSON: the ranks of each layer, `[[keys, values], ...]`, or `{"heads": 2, "ranks": [...]}`.
    """
    content = parse_json(read_text(path), path)
    fields = content if isinstance(content, dict) else {"ranks": content}
    if unknown := sorted(fields.keys() - {"heads", "ranks"}):
        raise InputError(f"{path}: unknown field {unknown[0]}, expected heads and ranks")
    heads, ranks = fields.get("heads"), fields.get("ranks")
    positive = lambda value: type(value) is int and value > 0
    if heads is not None and not positive(heads):
        raise InputError(f"{path}: heads = {heads!r}, expected how many heads share a latent")
    if not isinstance(ranks, list) or not ranks:
        raise InputError(f"{path}: holds no list of ranks, expected [keys, values] for each layer")
    for layer, pair in enumerate(ranks):
        if not isinstance(pair, list) or len(pair) != 2 or not all(map(positive, pair)):
            raise InputError(f"{path}: layer {layer} has {pair!r}, expected two ranks, [keys, values], of at least 1")
    return heads, tuple((key, value) for key, value in ranks)


def _amount(name: str, text: str, *, share: bool = False) -> int | Fraction:
    """A number of channels, or a share of them; only that if `share`."""
    if re.fullmatch(r"[0-9]{1,9}", text):
        amount = Fraction(text) if share else int(text)
    elif re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,4})?%", text):
        amount = Fraction(text[:-1]) / 100
    elif re.fullmatch(r"[0-9]{0,9}\.[0-9]{1,6}", text):
        amount = Fraction(text)
    else:
        raise InputError(f"--lorc {name}={text} is not a share (60%, 0.6){'' if share else ' or a number of channels'}")
    if amount == 0:
        raise InputError(f"--lorc {name}={text} keeps nothing: give more than 0")
    if isinstance(amount, Fraction) and amount > 1:
        raise InputError(f"--lorc {name}={text} is more than everything: give at most 100%")
    return amount


def _show(bound: int | Fraction) -> str:
    return f"{bound}" if isinstance(bound, int) else f"{float(bound * 100):g}%"
