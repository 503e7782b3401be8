"""Every method that selects tokens against its paper's definition, written down once more on top of `oracle`.

Both sides read the same prompts and the same continuation; after the prompt and after every further token the kept
positions must be the same and the logits must agree. Definitions are per key/value head, with scores averaged over the
query heads of its group.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import methods
from kvjax.methods.expected import foreseen
from kvjax.models import rope
from kvjax.policies.budgets import budget as budgets
from kvjax.spec import Prompt, RopeSpec
from tests.lib import oracle
from tests.lib.oracle import Entry, LayerPrompt, Oracle, Rows, entries

LENGTHS = (141, 60, 33, 9, 1)  # longer and shorter than the budgets and windows below
STEPS = 10
GROUPS: dict[str, dict] = {
    "gqa": dict(num_kv_heads=2),
    "mqa": dict(num_kv_heads=1, sinks=True),
    "mha": dict(num_kv_heads=4, score_cap=2.0, score_scale=0.5),
}


class Definition(NamedTuple):
    """A method for one prompt: the callbacks of `Oracle`."""

    select: oracle.Select
    insert: oracle.Insert
    observe: oracle.Observe | None = None
    attend: oracle.Attend | None = None


def tokens(budget: int | str, n: int) -> int:
    """A budget for a prompt of n tokens: itself, or a percentage, rounded down, at least 1."""
    return budget if isinstance(budget, int) else max(n * int(budget.removesuffix("%")) // 100, 1)


def best(scores: np.ndarray, count: int) -> list[int]:
    """The `count` highest, the earlier one of equals. Numbers too close for float32 are an error of the test."""
    order = np.argsort(-scores, kind="stable")
    if 0 < count < len(scores):
        inside, outside = scores[order[count - 1]], scores[order[count]]
        assert inside == outside or inside - outside > 1e-5 * abs(inside), "scores too close: choose another seed"
    return order[:count].tolist()


def grouped(probs: np.ndarray, heads: int) -> np.ndarray:
    """`[N ...]` averaged over the query heads of each key/value head: `[K ...]`."""
    return probs.reshape(heads, -1, *probs.shape[1:]).mean(axis=1)


def append(layer: int, rows: Rows, new: list[Entry], q: np.ndarray) -> None:
    for row, entry in zip(rows, new, strict=True):
        row.append(entry)


def snapkv(model, n, budget, *, window, kernel, pooling, cap: Callable[[int], int] | None = None) -> Definition:
    """The last `window` queries vote for earlier tokens; votes are pooled over neighbours; the window is kept."""

    def select(layer: int, prompt: LayerPrompt) -> Rows:
        most, heads = tokens(budget, n) if cap is None else cap(layer), model.num_kv_heads
        if n <= most:
            return [entries(prompt, k, range(n)) for k in range(heads)]
        if most <= window:
            return [entries(prompt, k, range(n - most, n)) for k in range(heads)]
        past = n - window
        votes = grouped(prompt.probs[:, past:, :past].sum(axis=1), heads)  # K past
        half = kernel // 2
        padded = np.pad(votes, ((0, 0), (half, half)))
        pool = {"avg": lambda x: x.sum(axis=-1) / kernel, "max": lambda x: x.max(axis=-1)}[pooling]
        pooled = np.stack([pool(padded[:, j : j + kernel]) for j in range(past)], axis=-1)
        return [entries(prompt, k, [*best(pooled[k], most - window), *range(past, n)]) for k in range(heads)]

    return Definition(select, append)


def pyramid_cap(n: int, cap: int, layer: int, layers: int, *, window: int, beta: int) -> int:
    """PyramidKV's number of kept tokens of one layer."""
    b = cap - window
    if n < cap:
        return n
    if b <= 0 or n < 2 * b or layers == 1:
        return cap
    low = b // beta
    high = 2 * b - low
    if high >= n - window:
        high = n - window
        low = 2 * b - high
    return high - layer * ((high - low) // (layers - 1)) + window


def pyramidkv(model, n, budget, *, window, kernel, pooling, beta) -> Definition:
    """SnapKV with a budget that falls linearly with depth."""
    cap = lambda layer: pyramid_cap(n, tokens(budget, n), layer, model.num_layers, window=window, beta=beta)
    return snapkv(model, n, budget, window=window, kernel=kernel, pooling=pooling, cap=cap)


def tova(model, n, budget) -> Definition:
    """After every step all heads of a layer keep the tokens that the newest query attends to most."""
    most = tokens(budget, n)

    def select(layer: int, prompt: LayerPrompt) -> Rows:
        kept = best(prompt.probs[:, -1].mean(axis=0), most)
        return [entries(prompt, k, kept) for k in range(model.num_kv_heads)]

    def observe(layer: int, rows: Rows, probs: list[np.ndarray]) -> None:
        mean = np.concatenate(probs).mean(axis=0)
        kept = best(mean, most)
        for row in rows:
            row[:] = [row[i] for i in kept]

    return Definition(select, append, observe)


def h2o(model, n, budget, *, recent) -> Definition:
    """The newest tokens, and of the others those with the largest sums of attention over all queries so far."""
    most = tokens(budget, n)
    newest = int(most * recent)

    def shrink(row: list[Entry]) -> list[Entry]:
        row = sorted(row, key=lambda e: e.pos)
        if len(row) <= most:
            return row
        old, new = row[: len(row) - newest], row[len(row) - newest :]
        return [old[i] for i in best(np.array([e.stat for e in old]), most - newest)] + new

    def select(layer: int, prompt: LayerPrompt) -> Rows:
        sums = grouped(prompt.probs.sum(axis=1), model.num_kv_heads)
        rows = [entries(prompt, k, range(n)) for k in range(model.num_kv_heads)]
        for row, column in zip(rows, sums, strict=True):
            for entry, total in zip(row, column, strict=True):
                entry.stat = float(total)
        return [shrink(row) for row in rows]

    def observe(layer: int, rows: Rows, probs: list[np.ndarray]) -> None:
        for row, prob in zip(rows, probs, strict=True):
            for entry, p in zip(row, prob.mean(axis=0), strict=True):
                entry.stat += float(p)
            row[:] = shrink(row)

    return Definition(select, append, observe)


def streaming_llm(model, n, budget, *, sinks, positions, rotate, scores) -> Definition:
    """The first tokens and the newest; room is made before a token arrives; keys stand at their place in the cache."""
    most = tokens(budget, n)
    first = min(sinks, most - 1)

    def select(layer: int, prompt: LayerPrompt) -> Rows:
        kept = range(n) if n <= most else [*range(first), *range(n - (most - first), n)]
        return [entries(prompt, k, kept) for k in range(model.num_kv_heads)]

    def insert(layer: int, rows: Rows, new: list[Entry], q: np.ndarray) -> None:
        for row, entry in zip(rows, new, strict=True):
            if len(row) + 1 > most:
                row[:] = row[:first] + row[len(row) - (most - first - 1) :]
            row.append(entry)

    def attend(layer: int, rows: Rows, q: np.ndarray, pos: int) -> tuple[np.ndarray, None]:
        heads = []
        for row, group in zip(rows, q.reshape(model.num_kv_heads, model.group_size, -1), strict=True):
            keys = rotate(np.stack([e.raw for e in row])[:, None], np.arange(len(row)))[:, 0]
            logits = scores(rotate(group, len(row) - 1) @ keys.T)
            heads.append(oracle.softmax(logits) @ np.stack([e.value for e in row]))
        return np.concatenate(heads), None

    return Definition(select, insert, attend=attend if positions == "cache" else None)


def keydiff(model, n, budget, *, split, recent, sinks) -> Definition:
    """The first tokens, the newest, and of the others those whose keys are least like the mean of all directions."""
    assert split == "row"
    most = tokens(budget, n)
    newest = min(recent, most)
    first = min(sinks, most - newest)

    def select(layer: int, prompt: LayerPrompt) -> Rows:
        heads = model.num_kv_heads
        if n <= most:
            return [entries(prompt, k, range(n)) for k in range(heads)]
        rows = []
        for k in range(heads):
            keys = prompt.key[:, k]
            mean = np.mean([key / np.linalg.norm(key) for key in keys], axis=0)
            far = np.array([1 - key @ mean / (np.linalg.norm(key) * np.linalg.norm(mean)) for key in keys])
            others = [first + i for i in best(far[first : n - newest], most - newest - first)]
            rows.append(entries(prompt, k, [*range(first), *others, *range(n - newest, n)]))
        return rows

    return Definition(select, append)


def turns(pos: np.ndarray, width: int, theta: float) -> np.ndarray:
    """Matrices `[n H H]` of the rotations by some positions; pairs are (i, i + H / 2)."""
    found, half = np.zeros((len(pos), width, width)), width // 2
    for i in range(half):
        angle, j = pos * theta ** (-i / half), i + half
        found[:, i, i] = found[:, j, j] = np.cos(angle)
        found[:, j, i], found[:, i, j] = np.sin(angle), -np.sin(angle)
    return found


def expected_attention(q, key, size, *, scale, theta, future, eps, sinks) -> np.ndarray:
    """`[K T]` for rotated queries `[T N H]` and keys `[T K H]`, and each token's norms `[N T]`."""
    (n, heads, width), rows = q.shape, key.shape[1]
    ahead = turns(np.arange(n, n + future), width, theta).mean(axis=0)
    before = np.einsum("tij,tni->tnj", turns(np.arange(n), width, theta), q)
    score = np.zeros((rows, n))
    for head in range(heads):
        row, seen = head // (heads // rows), before[sinks:, head]
        p = np.zeros(n)
        if n > sinks:
            mean, cov = ahead @ seen.mean(axis=0), np.zeros((width, width))
            for one in seen - seen.mean(axis=0):
                cov += np.outer(one, one) / len(seen)
            cov = ahead @ cov @ ahead.T
            logits = [scale * k @ mean + scale**2 / 2 * k @ cov @ k for k in key[sinks:, row]]
            p[sinks:] = oracle.softmax(np.array(logits))
        score[row] += (eps + p) * size[head] * rows / heads
    return score


def expected(model, n, budget, *, out, split, norm, eps, recent, sinks, future) -> Definition:
    """The first tokens, the newest, and of the others those that future queries should attend to, times their norm."""
    assert split == "row"
    most = tokens(budget, n)
    newest = min(recent, most)
    first = min(sinks, most - newest)

    def select(layer: int, prompt: LayerPrompt) -> Rows:
        heads = model.num_kv_heads
        if n <= most:
            return [entries(prompt, k, range(n)) for k in range(heads)]
        values = np.repeat(prompt.value, model.group_size, axis=1)  # T N H
        added = np.einsum("tnh,nhd->ntd", values, out[layer]) if norm == "out" else np.swapaxes(values, 0, 1)
        options = dict(scale=model.scale, theta=model.rope.theta, future=future, eps=eps, sinks=sinks)
        score = expected_attention(prompt.q, prompt.key, np.linalg.norm(added, axis=-1), **options)
        kept = [[first + i for i in best(row[first : n - newest], most - newest - first)] for row in score]
        return [entries(prompt, k, [*range(first), *row, *range(n - newest, n)]) for k, row in enumerate(kept)]

    return Definition(select, append)


@functools.cache
def model_of(group: str, layers: int):
    return oracle.random_model(7, num_layers=layers, **GROUPS[group])


@functools.cache
def texts() -> tuple[list[list[int]], np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 97, n).tolist() for n in LENGTHS], rng.integers(0, 97, (len(LENGTHS), STEPS))


SNAPKV = dict(window=8, kernel=5, pooling="avg")
PYRAMIDKV = dict(window=8, kernel=7, pooling="max", beta=20)
STREAMING = dict(sinks=4, positions="cache")
EXPECTED = dict(split="row", norm="out", eps=0.02, recent=4, sinks=4, future=512)
CASES = [
    *((define, group, 2 + (define is pyramidkv), 20, arguments) for define, arguments in (
        (snapkv, SNAPKV), (pyramidkv, PYRAMIDKV), (tova, {}), (h2o, dict(recent=0.5)), (streaming_llm, STREAMING),
    ) for group in GROUPS),
    (snapkv, "gqa", 2, "25%", dict(SNAPKV, kernel=7, pooling="max")),  # of 33 tokens: the window alone
    (snapkv, "gqa", 2, 5, SNAPKV),  # smaller than the window
    (snapkv, "mha", 2, 40, dict(window=32, kernel=1, pooling="avg")),
    (pyramidkv, "gqa", 2, "25%", PYRAMIDKV),
    (pyramidkv, "gqa", 5, 38, dict(PYRAMIDKV, beta=3)),  # 60 tokens: uniform is exact; 141: the schedule
    (pyramidkv, "mqa", 1, 20, dict(PYRAMIDKV, pooling="avg", kernel=3)),
    (pyramidkv, "gqa", 2, 36, PYRAMIDKV),  # 60 tokens: clamped; 33: all
    (pyramidkv, "gqa", 2, 6, PYRAMIDKV),  # smaller than the window
    (tova, "gqa", 2, "25%", {}),
    (tova, "gqa", 2, 1, {}),
    (h2o, "gqa", 2, "25%", dict(recent=0.25)),
    (h2o, "gqa", 2, 7, dict(recent=0.0)),
    (h2o, "mqa", 2, 7, dict(recent=1.0)),
    (streaming_llm, "gqa", 2, "25%", dict(sinks=4, positions="absolute")),
    (streaming_llm, "gqa", 2, "10%", STREAMING),  # of 33 tokens: fewer than the sinks
    (streaming_llm, "mqa", 2, 12, dict(sinks=0, positions="cache")),
    (keydiff, "gqa", 2, "25%", dict(split="row", recent=4, sinks=4)),
    (keydiff, "gqa", 2, 6, dict(split="row", recent=4, sinks=4)),  # fewer than both together
    (keydiff, "mqa", 2, 20, dict(split="row", recent=0, sinks=0)),
    (expected, "gqa", 2, "25%", EXPECTED),
    (expected, "gqa", 2, 6, dict(EXPECTED, norm="value", eps=0.0, future=3)),  # fewer than what stays
    (expected, "mqa", 2, 20, dict(EXPECTED, recent=0, sinks=0)),
    (expected, "mha", 2, 20, EXPECTED),
]  # fmt: skip


@pytest.mark.parametrize(
    ("define", "group", "layers", "budget", "arguments"),
    [pytest.param(*c, marks=[] if c[1] == "gqa" or c[0] is h2o else [pytest.mark.slow]) for c in CASES],
    ids=[f"{c[0].__name__}-{c[1]}-{c[2]}-{c[3]}-{'-'.join(map(str, c[4].values()))}" for c in CASES],
)
def test_method_follows_its_paper(define, group, layers, budget, arguments):
    model = model_of(group, layers)
    prompts, teacher = texts()
    recipe = getattr(methods, define.__name__)(budget, **arguments)
    logits, positions, _ = oracle.run(model, recipe, prompts, teacher)
    reference = Oracle(model)
    if define is streaming_llm:
        arguments = dict(arguments, rotate=reference.rotate, scores=reference.logits)
    if define is expected:
        kernels = [layer["attention"]["o"]["kernel"] for layer in reference.weights["layers"].values()]
        arguments = dict(arguments, out=[x.reshape(model.spec.num_heads, -1, x.shape[-1]) for x in kernels])
    for b, prompt in enumerate(prompts):
        n = len(prompt)
        select, insert, observe, attend = define(model.spec, n, budget, **arguments)
        for step in range(STEPS + 1):
            if step == 0:
                want = reference.prefill(prompt, select)
            else:
                want = reference.decode(int(teacher[b, step - 1]), n + step - 1, insert, observe, attend)
            kept = [[sorted(e.pos for e in row) for row in rows] for rows in reference.rows]
            assert positions[step][b] == kept, f"prompt of {n} tokens, step {step}"
            error = np.abs(logits[step, b] - want).max() / np.abs(want).max()
            assert error < 1e-3, f"prompt of {n} tokens, step {step}: logits differ by {error:.1e}"


@pytest.mark.parametrize(("layers", "window", "beta"), [*itertools.product((1, 2, 3, 32), (1, 8, 32), (1, 3, 20))])
def test_pyramid_schedule(layers, window, beta):
    lengths = np.arange(1, 400)
    for keep in (1, 7, 8, 9, 12, 40, 64, 129, "10%", "50%", "100%"):
        slots = functools.partial(budgets.pyramid(window=window, beta=beta).slots, budgets.parse_keep(keep))
        for layer in sorted({0, 1, layers // 2, layers - 1} & set(range(layers))):
            cap = lambda n: pyramid_cap(n, tokens(keep, n), layer, layers, window=window, beta=beta)  # noqa: B023
            kept = np.minimum(np.asarray(slots(layer, layers, lengths)), lengths)
            np.testing.assert_array_equal(kept, [cap(n) for n in lengths.tolist()])


def test_pyramid_reaches_every_branch():
    """The cases above are not vacuous."""
    caps = lambda n, cap, layers: [pyramid_cap(n, cap, i, layers, window=8, beta=20) for i in range(layers)]
    assert caps(15, 20, 3) == [15, 15, 15]  # shorter than the budget
    assert caps(50, 38, 3) == [38, 38, 38]  # shorter than twice the budget besides the window
    assert caps(60, 36, 2) == [60, 12]  # the first layer would keep more than there is
    assert caps(141, 34, 3) == [59, 34, 9]  # the schedule


@pytest.mark.parametrize("norm", ["out", "value"])
def test_expected_attention_is_its_closed_form(norm):
    """To 1e-5, of prompts of different lengths in one batch, in groups of three query heads."""
    rng, (b, t, heads, group, h, d) = np.random.default_rng(4), (3, 40, 2, 3, 8, 20)
    lengths, rope_spec = (40, 23, 3), RopeSpec(theta=100.0)
    q, k, v = (rng.normal(size=(b, t, n, h)) + 0.3 for n in (heads * group, heads, heads))
    out = rng.normal(size=(heads * group, h, d))
    rotation = rope.rotation(rope_spec, h, jnp.asarray(lengths)[:, None])
    q, k, v, weights = (jnp.asarray(x, jnp.float32) for x in (q, k, v, out))
    lse, length = jnp.zeros((b, heads * group, t)), jnp.asarray(lengths)
    prompt = Prompt(q, k, v, k, v, lse, length, 0, 1, None, h**-0.5, out=lambda: weights, rotation=rotation)
    found = np.asarray(foreseen(32, 0.01, norm, 4, 4).prompt(prompt))
    for i, n in enumerate(lengths):
        values = np.repeat(np.asarray(v[i, :n], np.float64), group, axis=1)
        added = np.einsum("tnh,nhd->ntd", values, out) if norm == "out" else np.swapaxes(values, 0, 1)
        options = dict(scale=h**-0.5, theta=100.0, future=32, eps=0.01, sinks=4)
        args = np.asarray(q[i, :n], np.float64), np.asarray(k[i, :n], np.float64), np.linalg.norm(added, axis=-1)
        want = expected_attention(*args, **options)
        if n > 4:  # else all are first tokens
            np.testing.assert_allclose(found[i, :, :n], want, rtol=1e-5)
        assert np.isfinite(found[i]).all() and (found[i] >= 0).all()
