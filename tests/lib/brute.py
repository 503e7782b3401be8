"""Methods whose budgets depend on the prompt, and the one that merges: loops over float64 numbers, on top of `oracle`.

DynamicKV (arXiv 2412.14838), Ada-KV (arXiv 2407.11550) on SnapKV and PyramidKV, D2O (arXiv 2406.13035). Everything is
per key/value head, scores are means over the query heads of its group, and sequences know nothing of each other.

A choice that float32 could make differently is an error of the test ("too close"): choose another seed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from kvjax.spec import ModelSpec
from tests.lib.oracle import Entry, LayerPrompt, Observe, Oracle, Rows, entries
from tests.test_methods import append, best, pyramid_cap, tokens

TOO_CLOSE = 2e-6  # of cosines


class Method(NamedTuple):
    """A method for one prompt.

    Attributes:
      compress: `prompts of all layers -> rows of all layers`, after the prompt.
      observe: after each further token's attention; None = tokens are appended.
      tau: D2O's threshold of every layer and head, nan = nothing was evicted so far; filled by the other two.
    """

    compress: Callable[[list[LayerPrompt]], list[Rows]]
    observe: Observe | None = None
    tau: np.ndarray | None = None  # [L K]


class Moment(NamedTuple):
    """A sequence after its prompt, or after one more token."""

    logits: np.ndarray  # [V]
    rows: list[Rows]  # [L][K]
    tau: np.ndarray | None  # [L K]


def follow(reference: Oracle, prompt: Sequence[int], continuation: Sequence[int], method: Method) -> Iterator[Moment]:
    """What a method makes of a prompt and of each token of its continuation; the next moment changes the rows."""
    logits, layers = read(reference, prompt)
    reference.rows = method.compress(layers)
    yield Moment(logits, reference.rows, method.tau)
    for i, token in enumerate(continuation):
        logits = reference.decode(int(token), len(prompt) + i, append, method.observe)
        yield Moment(logits, reference.rows, method.tau)


def read(reference: Oracle, prompt: Sequence[int]) -> tuple[np.ndarray, list[LayerPrompt]]:
    """Logits of a prompt's last token, and what every layer saw."""
    layers: list[LayerPrompt] = []

    def select(layer: int, seen: LayerPrompt) -> Rows:
        layers.append(seen)
        return []

    return reference.prefill(prompt, select), layers


# Budgets from window scores


def window_scores(prompt: LayerPrompt, *, window: int, kernel: int, pooling: str) -> np.ndarray:
    """Attention from the last `window` queries to each token before them, pooled over neighbours `[K P]`."""
    query_heads, n, _ = prompt.probs.shape
    heads = prompt.key.shape[1]
    group, past = query_heads // heads, max(n - window, 0)
    votes, pooled = np.zeros((heads, past)), np.zeros((heads, past))
    for k in range(heads):
        for p in range(past):
            votes[k, p] = np.mean([prompt.probs[h, past:, p].sum() for h in range(k * group, (k + 1) * group)])
    for k in range(heads):
        for p in range(past):
            near = [votes[k, i] if 0 <= i < past else 0.0 for i in range(p - kernel // 2, p + kernel // 2 + 1)]
            pooled[k, p] = max(near) if pooling == "max" else sum(near) / kernel
    return pooled


def counts_of_largest(scores: np.ndarray, k: int) -> np.ndarray:
    """How many of the k largest of all entries `[... P]` each row `[...]` has; of equal ones, the first are taken."""
    counts = np.zeros(scores.shape[:-1], int)
    for i in best(scores.reshape(-1), k):
        counts.reshape(-1)[i // scores.shape[-1]] += 1
    return counts


def hand_out(want: list[Fraction], most: list[int], total: int) -> list[int]:
    """Whole rows near `want`, at most `most`: what is left of `total` goes to the largest want that is not met."""
    rows = [min(math.floor(w), m) for w, m in zip(want, most, strict=True)]
    while sum(rows) < min(total, sum(most)):
        room = [j for j in range(len(rows)) if rows[j] < most[j]]
        rows[max(room, key=lambda j: want[j] - rows[j])] += 1  # the first of equals
    return rows


def dynamickv_budgets(
    scores: np.ndarray,
    base: int,
    *,
    r_max: float = 10.0,
    update_interval: int = 4,
    regrow: bool = True,
    floor: float = 0.0,
    ada: bool = False,
) -> list[np.ndarray]:
    """Rows besides the window, `[N K]` after each update, of the N layers seen so far.

    Args:
      scores: `[L K P]`.
      base: mean rows per layer and head besides the window.
      r_max, update_interval, regrow, floor, ada: the method's.
    """
    layers, heads, past = scores.shape
    stored = min(int(exact(r_max) * base), past)
    fixed = int(exact(floor) * base)
    rows: dict[tuple, int] = {}  # of a layer, or of a layer's head, since its last trim
    history = []
    for seen in range(1, layers + 1):
        if seen < layers and (update_interval == 0 or seen % update_interval != 0):
            continue
        counts = counts_of_largest(scores[:seen], base * heads * seen)  # N K
        if ada:
            share = {(j, h): Fraction(int(counts[j, h])) for j in range(seen) for h in range(heads)}
            total = base * layers * heads
        else:
            share = {(j,): Fraction(int(counts[j].sum()), heads) for j in range(seen)}
            total = base * layers
        most = [rows.get(unit, stored) for unit in share]
        want = [fixed + s * (1 - exact(floor)) * layers / seen for s in share.values()]
        given = hand_out(want, most, total if regrow else 0)
        rows.update(zip(share, given, strict=True))
        history.append(np.array([[rows[(j, h) if ada else (j,)] for h in range(heads)] for j in range(seen)]))
    return history


def adakv_budgets(scores: np.ndarray, base: int, floor: float) -> list[int]:
    """Rows of each head of one layer besides the window; `scores [K P]`."""
    heads, past = scores.shape
    counts = counts_of_largest(scores, base * heads)
    want = [exact(floor) * base + (1 - exact(floor)) * int(c) for c in counts]
    return hand_out(want, [past] * heads, base * heads)


def exact(x: float) -> Fraction:
    """What was meant by a decimal number."""
    return Fraction(x).limit_denominator(1000)


def keep_window(prompt: LayerPrompt, cap: int, window: int, scores: np.ndarray, rows: Sequence[int]) -> Rows:
    """Each head's `rows[k]` best tokens and the window; everything, or the newest, where `cap` decides that."""
    n, heads = prompt.key.shape[:2]
    if n <= cap:
        return [entries(prompt, k, range(n)) for k in range(heads)]
    if cap < window:
        return [entries(prompt, k, range(n - cap, n)) for k in range(heads)]
    recent = range(n - window, n)
    return [entries(prompt, k, [*best(scores[k], int(rows[k])), *recent]) for k in range(heads)]


def dynamickv(
    spec: ModelSpec, n: int, budget: int | str, *, window: int = 8, kernel: int = 7, pooling: str = "avg", **arguments
) -> Method:
    """A layer's rows are its share of the largest scores of all layers."""

    def compress(prompts: list[LayerPrompt]) -> list[Rows]:
        cap = tokens(budget, n)
        scores = np.stack([window_scores(p, window=window, kernel=kernel, pooling=pooling) for p in prompts])
        base = max(min(cap - window, scores.shape[-1]), 0)
        rows = dynamickv_budgets(scores, base, **arguments)[-1]
        return [keep_window(p, cap, window, scores[i], rows[i]) for i, p in enumerate(prompts)]

    return Method(compress)


def adakv(
    spec: ModelSpec,
    n: int,
    budget: int | str,
    *,
    window: int = 32,
    kernel: int = 7,
    pooling: str = "max",
    floor: float = 0.2,
    beta: int | None = None,
) -> Method:
    """A head's rows are its share of the largest scores of its layer; with `beta`, layers have PyramidKV's budgets."""

    def compress(prompts: list[LayerPrompt]) -> list[Rows]:
        kept = []
        for layer, prompt in enumerate(prompts):
            cap = tokens(budget, n)
            if beta is not None:
                cap = pyramid_cap(n, cap, layer, spec.num_layers, window=window, beta=beta)
            scores = window_scores(prompt, window=window, kernel=kernel, pooling=pooling)
            base = max(min(cap - window, scores.shape[-1]), 0)
            kept.append(keep_window(prompt, cap, window, scores, adakv_budgets(scores, base, floor)))
        return kept

    return Method(compress)


# D2O


def d2o_variance(probs: np.ndarray) -> float:
    """Over keys, of the attention that each received from all queries; `probs [T T]`."""
    n = len(probs)
    sums = [probs[:, j].sum() for j in range(n)]
    mean = sum(sums) / n
    return float(sum((x - mean) ** 2 for x in sums) / (n - 1)) if n > 1 else 0.0


def d2o_released(probs: np.ndarray) -> float:
    """Where the variances of a layer's heads lie between the least and the largest; `probs [N T T]`."""
    variance = [d2o_variance(head) for head in probs]
    low, high = min(variance), max(variance)
    return float(np.mean([(x - low) / (high - low + 1e-6) for x in variance]))


def d2o_statistic(layers: list[np.ndarray], layer_rule: str, full_layers: str = "") -> list[float]:
    """Of each layer, between 0 and 1: less means more slots; `[N T T]` of each."""
    if layer_rule == "released":
        return [d2o_released(probs) for probs in layers]
    f = [d2o_variance(probs.mean(axis=0)) for probs in layers]
    others = [x for i, x in enumerate(f) if i not in d2o_layers(full_layers, len(f))]
    return [(x - min(others)) / (max(others) - min(others) + 1e-6) for x in f]


def d2o_layers(full_layers: str, layers: int) -> set[int]:
    """Layers that are kept full."""
    return {int(i) % layers for i in full_layers.split(",") if i}


def d2o_rows(statistic: Sequence[float], n: int, cap: int, *, sinks: int, full_layers: str = "") -> list[int]:
    """Slots of each layer for a prompt; ValueError where they cannot add up to the budget."""
    layers = len(statistic)
    if cap >= n:
        return [cap] * layers
    full = d2o_layers(full_layers, layers)
    others = [i for i in range(layers) if i not in full]
    total, least = layers * cap - len(full) * n, min(n, max(math.ceil(n / 100), sinks + 1, 2), cap)
    if not len(others) * least <= total <= len(others) * n:
        raise ValueError(f"{total} slots for {len(others)} layers of {least} to {n}")
    weight = {i: math.exp(-statistic[i]) for i in others}
    want = {i: total * weight[i] / sum(weight.values()) for i in others}
    rows = {i: min(max(math.floor(want[i]), least), n) for i in others}
    while sum(rows.values()) < total:
        rows[max((i for i in others if rows[i] < n), key=lambda i: want[i] - rows[i])] += 1
    while sum(rows.values()) > total:
        rows[min((i for i in others if rows[i] > least), key=lambda i: want[i] - rows[i])] -= 1
    return [rows.get(i, n) for i in range(layers)]


def d2o_weights(similarities: Sequence[float], merge: str) -> tuple[float, list[float]]:
    """Weight of a kept vector, and of each that is merged into it."""
    if merge == "scatter_mean":  # the released code
        return 1 / (1 + len(similarities)), [u / (1 + len(similarities)) for u in similarities]
    total = math.e + sum(math.exp(u) for u in similarities)
    return math.e / total, [math.exp(u) / total for u in similarities]


def d2o_merge(
    kept: list[Entry], evicted: list[Entry], threshold: Callable[[list[float]], float], merge: str
) -> tuple[float, int]:
    """Merge each evicted token into the kept one with the most similar key, or drop it.

    Args:
      kept: changed in place.
      evicted: tokens that leave; similarities are those before any of them is merged.
      threshold: of the evicted tokens' largest similarities.
      merge: which weights.

    Returns:
      The threshold and how many were merged.
    """
    unit = lambda entry: entry.key / np.linalg.norm(entry.key)
    largest, target = [], []
    for entry in evicted:
        similarity = np.array([unit(entry) @ unit(other) for other in kept])
        target.append(int(np.argmax(similarity)))
        largest.append(float(similarity[target[-1]]))
        others = np.delete(similarity, target[-1])
        assert others.size == 0 or largest[-1] - others.max() > TOO_CLOSE, "cosines too close: choose another seed"
    tau = threshold(largest)
    new = {}
    for j, entry in enumerate(kept):
        mine = [i for i in range(len(evicted)) if target[i] == j and largest[i] >= tau]
        own, weights = d2o_weights([largest[i] for i in mine], merge)
        key, value = own * entry.key, own * entry.value
        for i, weight in zip(mine, weights, strict=True):
            key, value = key + weight * evicted[i].key, value + weight * evicted[i].value
        if mine:
            new[j] = key, value
    for j, (key, value) in new.items():
        kept[j].key, kept[j].value = key, value
    return tau, sum(m >= tau for m in largest)


def d2o(
    spec: ModelSpec,
    n: int,
    budget: int | str,
    *,
    important: float = 0.75,
    sinks: int = 4,
    beta: float = 0.7,
    merge: str = "paper",
    layer_rule: str = "paper",
    full_layers: str = "",
    log: list | None = None,
) -> Method:
    """Slots per layer from the variance of its column sums; evicted tokens are merged or dropped.

    Args:
      log: receives `(layer, evicted, merged)` for every compression of a row.
    """
    heads = spec.num_kv_heads
    tau = np.full((spec.num_layers, heads), np.nan)
    full = d2o_layers(full_layers, spec.num_layers)
    rows_of: list[int] = []
    log = [] if log is None else log

    def protected(rows: int) -> tuple[int, int]:
        recent = math.floor(rows * exact(1 - important))
        return min(sinks, rows - recent), recent

    def compress(prompts: list[LayerPrompt]) -> list[Rows]:
        statistic = d2o_statistic([p.probs for p in prompts], layer_rule, full_layers)
        rows_of[:] = d2o_rows(statistic, n, tokens(budget, n), sinks=sinks, full_layers=full_layers)
        for noise in np.random.default_rng(0).normal(0, 1e-5, (4, len(statistic))):
            near = d2o_rows([s * (1 + x) for s, x in zip(statistic, noise, strict=True)], n, tokens(budget, n),
                            sinks=sinks, full_layers=full_layers)  # fmt: skip
            assert near == rows_of, "budgets too close: choose another seed"
        return [[compress_row(layer, prompt, k) for k in range(heads)] for layer, prompt in enumerate(prompts)]

    def compress_row(layer: int, prompt: LayerPrompt, k: int) -> list[Entry]:
        row = entries(prompt, k, range(n))
        group = prompt.probs.shape[0] // heads
        for entry in row:
            column = prompt.probs[k * group : (k + 1) * group, :, entry.pos]
            entry.stat = float(np.mean([head.sum() for head in column]))
        rows = rows_of[layer]
        if n <= rows or layer in full:
            return row
        first, recent = protected(rows)
        middle = row[first : n - recent]
        important_ones = sorted(best(np.array([e.stat for e in middle]), rows - first - recent))
        kept = row[:first] + [middle[i] for i in important_ones] + row[n - recent :]
        evicted = [e for e in row if all(e is not other for other in kept)]
        if merge == "off":
            return kept

        def mean(largest: list[float]) -> float:
            tau[layer, k] = np.mean(largest) if len(largest) > 1 else largest[0]
            margin = min(abs(m - tau[layer, k]) for m in largest)
            assert len(largest) == 1 or margin > TOO_CLOSE, "threshold too close: choose another seed"
            return float(tau[layer, k])

        _, merged = d2o_merge(kept, evicted, mean, merge)
        log.append((layer, len(evicted), merged))
        return kept

    def observe(layer: int, rows: Rows, probs: list[np.ndarray]) -> None:
        for k, row in enumerate(rows):
            for entry, p in zip(row, probs[k].T, strict=True):
                entry.stat += float(p.mean())
            if len(row) > rows_of[layer] and layer not in full:
                observe_full(layer, k, row)

    def observe_full(layer: int, k: int, row: list[Entry]) -> None:
        first, recent = protected(rows_of[layer])
        now = max(e.pos for e in row) + 1
        exposed = sorted((e for e in row if first <= e.pos < now - recent), key=lambda e: e.stat)
        victim = exposed[0]
        assert len(exposed) == 1 or exposed[1].stat - victim.stat > 1e-5 * victim.stat, "scores too close"
        kept = [e for e in row if e is not victim]
        before = tau[layer, k]

        def track(largest: list[float]) -> float:
            (m,) = largest
            tau[layer, k] = m if np.isnan(before) else beta * m + (1 - beta) * before
            assert np.isnan(before) or beta == 1 or abs(m - tau[layer, k]) > TOO_CLOSE, "threshold too close"
            return float(tau[layer, k])

        if merge != "off":
            _, merged = d2o_merge(kept, [victim], track, merge)
            log.append((layer, 1, merged))
        row[:] = kept

    return Method(compress, observe, None if merge == "off" else tau)
