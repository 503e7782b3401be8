"""What a run measured: its samples, and their means with intervals."""

import math
import sys
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from kvjax.errors import InputError
from kvjax.files import journal
from kvjax.files.text import read_json

Line = dict[str, Any]  # of samples.jsonl: one sample under one method and budget
Key = tuple[str, str, int, int, str, str | None]  # task, part, index, which question, method, budget

SAMPLES, RUN = "samples.jsonl", "run.json"  # in the folder of a run
STRINGS = ("task", "part", "method", "metric", "better")
LEAST = {
    "index": 0,
    "score": -math.inf,
    "prompt_tokens": 1,
    "new_tokens": 0,
    "cache_bytes": 0,
    "full_bytes": 1,
    "kept": 0,
}
OF_CONTEXT = ("context_bytes", "context_full_bytes")  # where questions are asked beside it
TIMING = ("batch", "decode_s", "decoded")
METRICS = ("score", "perplexity", "kl")
KINDS = {"arguments": dict, "versions": dict, "calls": list, "command": str}  # of what `run.json` says


class Row(NamedTuple):
    """One task, or one part of it, under one method and budget. What is not known is nan.

    Attributes:
      part: "all" = the whole task.
      budget: None for methods without one.
      metric: "score", "perplexity" or "kl".
      better: "higher" or "lower".
      value: mean score, perplexity, or mean divergence [nats].
      low, high: its 95% interval.
      p99: 99th percentile of the tokens' divergences [nats].
      bytes_per_token: cache over prompt and new tokens, counted as `generation.Compared` does.
      full_bytes_per_token: the same of a full cache.
      of_full: their ratio.
      context: the same of a context alone, which questions are asked beside.
      kept: filled slots over those of a full cache, mean over samples.
      tokens_per_s: decoding speed, all sequences of a batch together.
      n: questions.
      contexts: that they are about.
      largest: most samples of any row of this task and part; more than n = this row is incomplete.
    """

    task: str
    part: str
    method: str
    budget: str | None
    metric: str
    better: str
    value: float
    low: float
    high: float
    p99: float
    bytes_per_token: float
    full_bytes_per_token: float
    of_full: float
    context: float
    kept: float
    tokens_per_s: float
    n: int
    contexts: int
    largest: int


def read(path: Path) -> list[Line]:
    """The samples of a run, each one once."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    found: dict[Key, Line] = {}
    for line in check(((number, line) for number, line, _ in journal.lines(raw, path)), path):
        found.setdefault(key(line), line)
    if not found:
        raise InputError(f"{path} holds no samples: run an evaluation first")
    return list(found.values())


def check(numbered: Iterable[tuple[int, Any]], path: Path) -> list[Line]:
    """Lines of results, with budgets as text; raises `InputError` for any that is not one.

    Args:
      numbered: numbers of lines, from 1, and what they say.
      path: the file, for errors.
    """
    found, metrics = [], {}
    for number, line in numbered:
        if fault := _fault(line, metrics):
            raise InputError(f"{path}:{number}: {fault}")
        found.append(line | {"budget": None if line["budget"] is None else str(line["budget"])})
    return found


def key(line: Line) -> Key:
    """What a line is the result of."""
    return line["task"], line["part"], line["index"], line.get("asked", 0), line["method"], line["budget"]


def context(line: Line) -> tuple[str, int]:
    """What a line's question is about, within its task."""
    return line["part"], line["index"]


def _fault(line: object, metrics: dict[str, str]) -> str | None:
    """What is wrong with a line, if anything; `metrics` are those of the tasks so far."""
    if not isinstance(line, dict):
        return "not an object"
    for name in STRINGS:
        if not isinstance(line.get(name), str):
            return f"{name!r} is not a string"
    for name, least in LEAST.items():
        if not _is_number(line.get(name), least):
            return f"{name!r} is not a finite number" + f" from {least} on" * (least >= 0)
    for name in ("asked", *OF_CONTEXT):
        if name in line and not _is_number(line[name], 0):
            return f"{name!r} is not a number from 0 on"
    if [name in line for name in OF_CONTEXT] == [True, False] or not line.get(OF_CONTEXT[1], 1):
        return f"{OF_CONTEXT[0]!r} is there without {OF_CONTEXT[1]!r}"
    if isinstance(line.get("budget", 0.0), bool) or not isinstance(line.get("budget", 0.0), str | int | None):
        return "'budget' is neither a string, an integer nor null"
    for name, numbers in (("timing", TIMING), ("facts", ("depth", "length"))):
        given = line.get(name) or {}
        if not isinstance(given, dict) or not all(_is_number(given[key], 0) for key in numbers if key in given):
            return f"{name!r} is not an object whose {', '.join(numbers)} are numbers"
    if line["metric"] not in METRICS:
        return f"unknown metric {line['metric']!r}: known are {', '.join(METRICS)}"
    if (metric := metrics.setdefault(line["task"], line["metric"])) != line["metric"]:
        return f"the metric of task {line['task']} is {line['metric']}, not {metric} as before"
    if line["metric"] == "score":
        return None if 0 <= line["score"] <= 1 else f"score {line['score']} is not from 0 to 1"
    tokens = line.get("tokens")
    good = isinstance(tokens, list) and tokens and all(map(_is_number, tokens))
    return None if good else "'tokens' is not a list of finite numbers"


def _is_number(value: object, least: int | float = -math.inf) -> bool:
    """Whether a value is a number that arithmetic can use."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return max(least, -sys.float_info.max) <= value <= sys.float_info.max


def read_run(path: Path) -> dict[str, Any]:
    """What was run; empty if there is no such file."""
    if not path.exists():
        return {}
    run = read_json(path)
    good = all(isinstance(run[name], kind) for name, kind in KINDS.items() if name in run)
    if not good or not all(isinstance(call, dict) for call in run.get("calls", ())):
        raise InputError(f"{path} does not describe a run")
    return run


def model_of(run: dict[str, Any]) -> str:
    """The last part of the evaluated model's name; "" if it is not known."""
    return str(run.get("arguments", {}).get("model") or "").rstrip("/").rpartition("/")[-1]


def aggregate(lines: Iterable[Line]) -> list[Row]:
    """Rows by task, then by method and budget in order of first appearance, the full cache first; parts before all."""
    groups: dict[str, dict[tuple, list[Line]]] = {}
    for line in lines:
        groups.setdefault(line["task"], {}).setdefault((line["method"], line["budget"]), []).append(line)
    rows = []
    for methods in groups.values():
        for _, group in sorted(methods.items(), key=lambda item: item[0][0] != "full"):
            for part in dict.fromkeys(line["part"] for line in group):
                rows.append(_row(part, [line for line in group if line["part"] == part]))
            rows.append(_row("all", group))
    largest: dict[tuple[str, str], int] = {}
    for row in rows:
        largest[row.task, row.part] = max(row.n, largest.get((row.task, row.part), 0))
    return [row._replace(largest=largest[row.task, row.part]) for row in rows]


def _row(part: str, group: Sequence[Line]) -> Row:
    first, total = group[0], lambda key: float(sum(line[key] for line in group))
    value, low, high = estimate(group)
    tokens = total("prompt_tokens") + total("new_tokens")
    beside = all("context_bytes" in line for line in group)
    divergences = [value for line in group for value in line["tokens"]] if first["metric"] == "kl" else [math.nan]
    return Row(
        **{key: first[key] for key in ("task", "method", "budget", "metric", "better")},
        part=part,
        value=value,
        low=low,
        high=high,
        p99=float(np.percentile(divergences, 99)),
        bytes_per_token=total("cache_bytes") / tokens,
        full_bytes_per_token=total("full_bytes") / tokens,
        of_full=total("cache_bytes") / total("full_bytes"),
        context=total("context_bytes") / total("context_full_bytes") if beside else math.nan,
        kept=total("kept") / len(group),
        tokens_per_s=speed(group),
        n=len(group),
        contexts=len(set(map(context, group))),
        largest=len(group),
    )


def speed(group: Iterable[Line]) -> float:
    """Decoded tokens per second; every batch counts once."""
    timings = [line.get("timing") or {} for line in group]
    batches = {tuple(timing.get(key, 0) for key in ("batch", "decode_s", "decoded")) for timing in timings}
    seconds = sum(seconds for _, seconds, _ in batches)
    return sum(decoded for *_, decoded in batches) / seconds if seconds else math.nan


def estimate(group: Sequence[Line]) -> tuple[float, float, float]:
    """A metric's mean over samples with its 95% interval.

    All parts weigh the same, however many samples they have; for perplexity all tokens do. With equal parts this is the
    plain mean and its plain interval. Parts of unequal size widen it as unequal weights do (Kish's effective n), and
    questions about one context as far as they agree.
    """
    metric, contexts = group[0]["metric"], list(map(context, group))
    if metric == "perplexity":
        values, weights = zip(*((np.mean(line["tokens"]), len(line["tokens"])) for line in group), strict=True)
        with np.errstate(over="ignore"):
            mean, low, high = np.exp(student(values, weights, contexts)).tolist()
        return mean, max(low, 1.0), high  # no perplexity is less
    sizes = Counter(line["part"] for line in group)
    values, weights = [line["score"] for line in group], [1 / sizes[line["part"]] for line in group]
    if metric == "kl":
        mean, low, high = student(values, weights, contexts)
        return mean, max(low, 0.0), high  # a divergence is not negative
    mean = float(np.average(values, weights=weights))
    return mean, *wilson(mean, independent(values, weights, contexts))


def independent(values: Sequence[float], weights: Sequence[float], contexts: Sequence[Hashable]) -> float:
    """So many independent scores tell as much as these, of which those about one context are alike.

    Kish's effective n, divided by the design effect: what the variance of the mean is, beside what it would be if every
    score were about a context of its own. It lies between the numbers of contexts and of scores; where all scores are
    equal they do not tell how alike they are, and a context counts as one.

    Source: Korn & Graubard, Survey Methodology 24 (1998).

    >>> independent([1.0, 1.0, 0.0, 0.0], [1.0] * 4, "aabb"), independent([1.0, 0.0, 1.0, 0.0], [1.0] * 4, "aabb")
    (2.0, 4.0)
    """
    from scipy.special import stdtrit

    w = np.asarray(weights, float)
    x = w * (np.asarray(values, float) - np.average(values, weights=w))
    kish = lambda each: float(each.sum() ** 2 / (each**2).sum())
    together = kish(_sums(w, contexts)), kish(w)
    if together[0] == together[1] or not x.any():
        return together[0]
    effect = _variance(_sums(x, contexts)) / _variance(x)
    known = [stdtrit(len(each) - 1, 0.975) for each in (x, set(contexts))]
    return float(np.clip(together[1] / max(effect, 1e-9) * (known[0] / known[1]) ** 2, *together))


def _sums(values: np.ndarray, contexts: Sequence[Hashable]) -> np.ndarray:
    """Of each context."""
    number = {context: i for i, context in enumerate(dict.fromkeys(contexts))}
    return np.bincount([number[context] for context in contexts], values)


def _variance(residuals: np.ndarray) -> float:
    """Of their sum; they are independent, and their mean is 0."""
    n = len(residuals)
    return n / (n - 1) * float(np.sum(residuals**2))


def wilson(mean: float, n: int | float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a mean of n scores from 0 to 1.

    It is meant for scores that are 0 or 1. Scores in between vary less: there it is conservative.

    >>> [round(x, 3) for x in wilson(0.5, 4)]  # 2 of 4
    [0.15, 0.85]
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre, scale = mean + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(mean * (1 - mean) / n + (z / (2 * n)) ** 2)
    return max((centre - half) / scale, 0.0), min((centre + half) / scale, 1.0)


def student(
    values: Sequence[int | float],
    weights: Sequence[int | float],
    contexts: Sequence[Hashable],
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """A weighted mean and its Student t interval, those of one context being alike: nan for a single context.

    >>> [round(x, 3) for x in student([1.0, 2.0, 3.0], [1, 1, 1], "abc")]
    [2.0, -0.484, 4.484]
    """
    from scipy.special import stdtrit

    x, w = np.asarray(values, float), np.asarray(weights, float) / sum(weights)
    mean = float(np.average(x, weights=w))
    sums = _sums(w * (x - mean), contexts)
    if len(sums) == 1:
        return mean, math.nan, math.nan
    half = float(stdtrit(len(sums) - 1, (1 + confidence) / 2)) * math.sqrt(_variance(sums))
    return mean, mean - half, mean + half


def by_task(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows grouped by their task, in order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.task, []).append(row)
    return groups
