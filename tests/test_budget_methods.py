"""DynamicKV, Ada-KV and D2O against `brute`: positions, logits, cached vectors and thresholds, step by step."""

import functools
import inspect
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax import methods
from kvjax.cache import layout
from kvjax.cache import tier as tiers_
from kvjax.errors import InputError
from kvjax.generation.allocate import init_cache
from kvjax.generation.generate import cached_positions
from kvjax.generation.model import Model
from kvjax.models.decoder import Decoder
from kvjax.policies.base import Recipe
from kvjax.policies.budgets import allocation
from kvjax.spec import Lengths, ModelSpec
from tests.lib import brute, oracle
from tests.lib.oracle import Entry, Oracle

STEPS = 10
TOLERANCE = 1e-5
LENGTHS = (125, 60, 33, 6, 1)  # longer and shorter than the budgets and windows below
LONG = (125, 60, 33)  # a share of each of them is more than the least that d2o keeps
MODELS = {
    "gqa": dict(num_layers=3, num_kv_heads=2),
    "mqa": dict(num_layers=3, num_kv_heads=1),
    "mha": dict(num_layers=3, num_kv_heads=4),
    "deep": dict(num_layers=6, num_kv_heads=2),
}
LAYERS = (1.3, 0.4, 0.9, 0.2, 0.2, 0.2)  # how far from uniform a layer attends
HEADS = ((1.0, 0.3, 0.3, 0.3), (1.0, 1.0, 0.9, 0.2), (1.0, 0.5, 0.8, 0.3))  # its query heads, layer by layer


@functools.cache
def model_of(name: str) -> Decoder:
    """A decoder whose layers and heads differ: from almost uniform attention to a few tokens that get most of it."""
    model = oracle.random_model(7, **MODELS[name])

    def scaled(path: tuple, x: jax.Array) -> jax.Array:
        if path[-2:] != ("q", "kernel"):
            return x
        strength = np.array(LAYERS)[path[1]] * np.array(HEADS)[path[1] % len(HEADS)]
        return x * jnp.asarray(np.repeat(strength, model.spec.head_dim), x.dtype)

    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    nnx.update(model, nnx.from_flat_state([(path, leaf.replace(scaled(path, leaf[...]))) for path, leaf in flat]))
    return model


@functools.cache
def texts(lengths: tuple[int, ...], seed: int = 15) -> tuple[list[list[int]], np.ndarray]:
    """Prompts and their continuations `[B STEPS]`; a prompt depends on its length and its place alone."""
    draw = lambda b, n, count: np.random.default_rng((seed, b, n)).integers(0, 97, n + count).tolist()
    drawn = [draw(b, n, STEPS) for b, n in enumerate(lengths)]
    return [d[:-STEPS] for d in drawn], np.array([d[-STEPS:] for d in drawn])


class Held(NamedTuple):
    """What kvjax caches, on the host."""

    rows: list[list[list[dict[int, tuple[np.ndarray, np.ndarray]]]]]  # [B][L][K]: position -> key, value
    tau: np.ndarray | None  # [L B K]

    def positions(self, b: int) -> list[list[list[int]]]:
        return [[sorted(row) for row in layer] for layer in self.rows[b]]


@functools.partial(jax.jit, static_argnames=("layers",))
def _slots(tier: tiers_.Tier, *, layers: int) -> list[tiers_.Slots]:
    views = [tiers_.layer(tier, i) for i in range(layers)]
    return [tiers_.take(v, jnp.broadcast_to(jnp.arange(v.capacity), (*v.length.shape, v.capacity))) for v in views]


def held(spec: ModelSpec, cache: layout.Cache) -> Held:
    ((tier,),) = cache
    slots = jax.device_get(_slots(tier, layers=spec.num_layers))
    _, batch, heads = tier.length.shape

    def row(layer: tiers_.Slots, b: int, k: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        filled = np.flatnonzero(np.asarray(layer.pos)[b, k] >= 0)
        positions = np.asarray(layer.pos)[b, k, filled].tolist()
        assert len(set(positions)) == len(positions), "a position is cached twice"
        return {p: (layer.k[b, k, s], layer.v[b, k, s]) for p, s in zip(positions, filled, strict=True)}

    rows = [[[row(layer, b, k) for k in range(heads)] for layer in slots] for b in range(batch)]
    constants = jax.tree.leaves((tier.balance, tier.state))  # d2o's threshold; nothing else has any
    return Held(rows, np.asarray(constants[0]) if constants else None)


def run(
    model: Decoder, recipe: Recipe, prompts: Sequence[Sequence[int]], teacher: np.ndarray, steps: int
) -> Iterator[tuple[np.ndarray, Held]]:
    """kvjax: logits `[B V]` and the cache, after the prompts and after each given token."""
    last, cache = oracle.start(model, recipe, prompts, STEPS)
    yield np.asarray(last), held(model.spec, cache)
    pos, active = np.asarray([len(p) for p in prompts], np.int32), jnp.ones(len(prompts), bool)
    for i, token in enumerate(teacher[:, :steps].T.astype(np.int32)):
        last, cache = oracle.step(model, cache, jnp.asarray(token), jnp.asarray(pos + i), active, recipe=recipe)
        yield np.asarray(last), held(model.spec, cache)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(np.asarray(a) - b).max() / np.abs(b).max())


def assert_same(logits: np.ndarray, cache: Held, b: int, expected: brute.Moment, where: str) -> None:
    """One sequence of a batch."""
    rows = [[sorted(e.pos for e in row) for row in layer] for layer in expected.rows]
    assert cache.positions(b) == rows, where
    for layer, layer_rows in enumerate(expected.rows):
        for k, row in enumerate(layer_rows):
            keys, values = zip(*(cache.rows[b][layer][k][e.pos] for e in row), strict=True)
            assert distance(np.stack(keys), np.stack([e.key for e in row])) < TOLERANCE, f"{where}: keys"
            assert distance(np.stack(values), np.stack([e.value for e in row])) < TOLERANCE, f"{where}: values"
    error = distance(logits[b], expected.logits)
    assert error < TOLERANCE, f"{where}: logits differ by {error:.1e}"
    if expected.tau is not None:
        assert cache.tau is not None and cache.tau.dtype == np.float32
        np.testing.assert_allclose(cache.tau[:, b], expected.tau, rtol=TOLERANCE, err_msg=where)


def compare(name: str, define, model_name: str, lengths, budget, arguments: dict, defined: dict, steps: int) -> None:
    """kvjax's method `name` with `arguments` and brute's `define` with `defined`."""
    model, (prompts, teacher) = model_of(model_name), texts(lengths)
    recipe = getattr(methods, name)(budget, **arguments)
    reference = Oracle(model)
    moments = []
    for prompt, continuation in zip(prompts, teacher[:, :steps], strict=True):
        method = define(model.spec, len(prompt), budget, **defined)
        moments.append(brute.follow(reference.copy(), prompt, continuation, method))
    for step, (logits, cache) in enumerate(run(model, recipe, prompts, teacher, steps)):
        for b, prompt in enumerate(prompts):
            assert_same(logits, cache, b, next(moments[b]), f"prompt of {len(prompt)} tokens, step {step}")


def named(*cases: tuple, quick: tuple[int, ...]) -> list:
    """Cases with readable names, all but those at some places left to the slow tests."""
    name = lambda c: "-".join([*map(str, c[:3]), *(f"{k}={v}" for k, v in c[3].items())])
    marks = [[] if i in quick else [pytest.mark.slow] for i in range(len(cases))]
    return [pytest.param(*c, id=name(c).replace(" ", ""), marks=m) for c, m in zip(cases, marks, strict=True)]


DYNAMICKV = named(  # model, budget, tokens read after the prompt, arguments
    ("deep", 20, 0, {}),
    ("gqa", 20, STEPS, dict(update_interval=2)),
    ("mqa", "25%", STEPS, dict(update_interval=1)),  # of 33 tokens: the window alone; of 6: less
    ("mha", 20, STEPS, dict(update_interval=2, pooling="max")),
    ("deep", 20, 0, dict(ada=True)),
    ("deep", 20, 0, dict(update_interval=0)),
    ("deep", 20, 0, dict(r_max=1.5)),
    ("deep", 20, 0, dict(r_max=1.5, regrow=False)),
    ("deep", 20, 0, dict(r_max=1.0)),  # a layer may hold its mean share and no more
    ("deep", 20, 0, dict(floor=0.25)),
    ("deep", "25%", 0, dict(ada=True, floor=0.25, regrow=False, update_interval=2, r_max=3.0)),
    ("gqa", 20, 0, dict(ada=True, floor=1.0)),  # uniform
    ("gqa", 20, 0, dict(window=5, kernel=3)),
    ("gqa", 4, 0, {}),  # smaller than the window
    quick=(0, 2, 4, 6, 8, 10, 12),
)  # fmt: skip


@pytest.mark.parametrize(("model", "budget", "steps", "arguments"), DYNAMICKV)
def test_dynamickv(model, budget, steps, arguments):
    compare("dynamickv", brute.dynamickv, model, LENGTHS, budget, arguments, arguments, steps)


ADAKV = named(
    ("gqa", 20, STEPS, dict(window=8)),
    ("mha", 20, 0, dict(window=8, floor=0.0)),
    ("mqa", 20, 0, dict(window=8)),  # one head: SnapKV
    ("gqa", "40%", 0, {}),  # of 60 tokens: less than the window
    ("gqa", 20, 0, dict(window=8, floor=1.0, pooling="avg", kernel=3)),  # SnapKV
    ("mha", "50%", 0, dict(window=4, floor=0.125)),
    quick=(0, 3, 4),
)  # fmt: skip


@pytest.mark.parametrize(("model", "budget", "steps", "arguments"), ADAKV)
def test_adakv(model, budget, steps, arguments):
    compare("adakv", brute.adakv, model, LENGTHS, budget, arguments, arguments, steps)


def test_snapkv_with_budgets_per_head_is_adakv():
    arguments = dict(window=8, kernel=5, pooling="avg")
    compare("snapkv", brute.adakv, "mha", LENGTHS, 20, dict(arguments, split="layer"), arguments, 0)


def test_snapkv_under_one_threshold_is_dynamickv_with_shares_of_heads():
    arguments = dict(window=8, kernel=7, pooling="avg")
    defined = arguments | dict(ada=True, update_interval=0)
    compare("snapkv", brute.dynamickv, "deep", LENGTHS, 20, dict(arguments, split="global"), defined, 0)


def test_pyramidkv_with_budgets_per_head():
    arguments = dict(window=8, kernel=7, pooling="max", beta=20)
    compare("pyramidkv", brute.adakv, "deep", LENGTHS, 24, dict(arguments, split="layer"), arguments, 0)


D2O = named(
    ("gqa", 20, STEPS, {}),
    ("gqa", 20, STEPS, dict(layer_rule="released")),
    ("gqa", 20, STEPS, dict(merge="off")),
    ("mqa", 20, STEPS, dict(merge="scatter_mean")),
    ("mha", 21, STEPS, dict(important=0.5, sinks=0)),
    ("gqa", 12, STEPS, dict(important=1.0, sinks=2, beta=0.2)),  # 6 tokens: fills up, then evicts
    ("gqa", 12, STEPS, dict(important=0.0, beta=0.95)),  # the newest tokens
    ("gqa", 6, STEPS, dict(important=0.9, beta=0.05)),  # the least that a layer keeps binds
    ("gqa", "90%", STEPS, dict(merge="scatter_mean")),  # a layer keeps everything
    ("deep", "75%", STEPS, dict(full_layers="0,1,-1")),
    ("deep", "60%", STEPS, dict(full_layers="0,-1", layer_rule="released", merge="off")),
    quick=(0, 1, 6, 8, 10),
)  # fmt: skip


@pytest.mark.parametrize(("model", "budget", "steps", "arguments"), D2O)
def test_d2o(model, budget, steps, arguments):
    lengths = LONG if isinstance(budget, str) else LENGTHS
    compare("d2o", brute.d2o, model, lengths, budget, arguments, arguments, steps)


SHARED = {"dynamickv": dict(update_interval=2), "adakv": dict(window=8), "d2o": {}}


@pytest.mark.parametrize("name", SHARED)
def test_batch_mates_change_nothing(name):
    """The first sequence, beside others: equal positions, budgets and thresholds."""
    model, recipe = model_of("gqa"), getattr(methods, name)(20, **SHARED[name])
    (first, *mates), teacher = texts(LENGTHS)
    others = [mate[::-1] for mate in reversed(mates)]  # other texts, other lengths
    runs = [run(model, recipe, [first, *rest], teacher, 3) for rest in (mates, others)]
    for (logits, cache), (logits_, cache_) in zip(*runs, strict=True):
        assert cache.positions(0) == cache_.positions(0)
        assert distance(logits_[0], logits[0]) < TOLERANCE
        if cache.tau is not None and cache_.tau is not None:
            np.testing.assert_allclose(cache_.tau[:, 0], cache.tau[:, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("prompts", "budget", "arguments"),
    [
        ((60,), 20, dict(full_layers="0")),  # the full layer takes all
        ((60,), 21, dict(full_layers="0")),  # and leaves less than the least
        ((60,), 59, dict(full_layers="0,1,-1")),
        ((60,), 30, dict(full_layers="3")),  # there is no such layer
        ((60,), 30, dict(full_layers="first")),
    ],
)
def test_d2o_budget_out_of_reach_is_an_error(prompts, budget, arguments):
    model = model_of("gqa")
    with pytest.raises(InputError):
        init_cache(model, methods.d2o(budget, **arguments), Lengths(prompts, STEPS, 128))


@pytest.mark.parametrize(
    ("prompts", "budget", "arguments"), [((60,), 25, dict(full_layers="0")), ((9, 5), 9, {}), ((60,), 5, {})]
)
def test_d2o_budget_within_reach_is_none(prompts, budget, arguments):
    assert init_cache(model_of("gqa"), methods.d2o(budget, **arguments), Lengths(prompts, STEPS, 128))


def test_the_cases_are_not_vacuous():
    """Budgets differ between layers and heads, a trim that comes too early costs, tokens are merged and dropped."""
    spec, ns = model_of("deep").spec, [n for n in LENGTHS if n > 20]
    seen = {n: layers_of("deep", LENGTHS)[LENGTHS.index(n)] for n in ns}
    scores = {n: window_scores(seen[n]) for n in ns}
    once = {n: brute.dynamickv_budgets(scores[n], 12, update_interval=0)[-1][:, 0] for n in ns}
    assert all(b.sum() == 12 * spec.num_layers for b in once.values())
    assert max(np.ptp(b) for b in once.values()) >= 12
    early = {n: brute.dynamickv_budgets(scores[n], 12, update_interval=4)[-1][:, 0] for n in ns}
    assert any((early[n] != once[n]).any() for n in ns)
    tight = [brute.dynamickv_budgets(scores[n], 12, r_max=1.5, regrow=r)[-1][:, 0] for n in ns for r in (True, False)]
    assert any(a.sum() > b.sum() for a, b in zip(tight[::2], tight[1::2], strict=True))
    heads = brute.dynamickv_budgets(scores[125], 12, ada=True)[-1]
    assert np.ptp(heads, axis=1).max() >= 6

    per_head = [brute.adakv_budgets(window_scores([p], "max")[0], 12, 0.2) for p in layers_of("mha", LENGTHS)[0]]
    assert max(np.ptp(b) for b in per_head) >= 6

    for budget, arguments in ((20, {}), (12, dict(important=1.0, sinks=2, beta=0.2))):
        prefill, decoding = d2o_log("gqa", budget, **arguments)
        for log in (prefill, decoding):
            evicted, merged = np.sum(log, axis=0)[1:]
            assert 0 < merged < evicted
    rows = [brute.d2o_rows(brute.d2o_statistic([p.probs for p in layers_of(name, LENGTHS)[0]], rule), 125, 20, sinks=4)
            for name in ("gqa", "deep") for rule in ("paper", "released")]  # fmt: skip
    assert all(np.ptp(r) >= 4 for r in rows), rows


@functools.cache
def layers_of(name: str, lengths: tuple[int, ...]) -> list[list[oracle.LayerPrompt]]:
    """`[B][L]`."""
    reference = Oracle(model_of(name))
    return [brute.read(reference, prompt)[1] for prompt in texts(lengths)[0]]


def window_scores(layers: list[oracle.LayerPrompt], pooling: str = "avg") -> np.ndarray:
    return np.stack([brute.window_scores(p, window=8, kernel=7, pooling=pooling) for p in layers])


def d2o_log(name: str, budget: int, **arguments) -> tuple[list, list]:
    """Of the longest prompt: what its compression, and what the tokens after it did to each row."""
    model, (prompts, teacher), log = model_of(name), texts(LENGTHS), []
    method = brute.d2o(model.spec, len(prompts[0]), budget, log=log, **arguments)
    moments = brute.follow(Oracle(model), prompts[0], teacher[0], method)
    next(moments)
    prefill = list(log)
    for _ in moments:
        pass
    return prefill, log[len(prefill) :]


# The definitions themselves


def skewed_scores(seed: int, layers: int, heads: int, past: int, skew: float) -> np.ndarray:
    """Scores with long tails, peakier in some layers than in others."""
    rng = np.random.default_rng(seed)
    scores = rng.gamma(0.3, size=(layers, heads, past)) ** 2
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores ** np.clip(np.exp(skew * rng.normal(size=(layers, 1, 1))), 0.3, 3)


# Of an independent program: one count over all layers, capped by what a layer may hold, the rest by largest want.
RECORDED = [
    (0, (8, 2, 400, 0.3), 32, 10.0, [3, 38, 14, 71, 4, 100, 18, 8]),
    (1, (8, 3, 400, 1.0), 32, 1.5, [28, 26, 26, 48, 26, 48, 28, 26]),
    (2, (6, 2, 50, 0.6), 32, 10.0, [22, 24, 44, 46, 44, 12]),
    (3, (10, 4, 300, 1.0), 64, 5.0, [0, 0, 77, 13, 143, 175, 1, 0, 56, 175]),
]


@pytest.mark.parametrize(("seed", "shape", "base", "r_max", "expected"), RECORDED)
def test_dynamickv_budgets_are_those_recorded(seed, shape, base, r_max, expected):
    (budgets,) = brute.dynamickv_budgets(skewed_scores(seed, *shape), base, r_max=r_max, update_interval=0)
    assert (budgets == np.array(expected)[:, None]).all()


@pytest.mark.parametrize("ada", [False, True])
@pytest.mark.parametrize("regrow", [False, True])
@pytest.mark.parametrize(("r_max", "floor"), [(10.0, 0.0), (2.0, 0.0), (10.0, 0.25), (0.5, 0.25)])
def test_dynamickv_updates(ada, regrow, r_max, floor):
    scores, base = skewed_scores(4, 10, 2, 200, 0.8), 16
    history = brute.dynamickv_budgets(scores, base, r_max=r_max, update_interval=4, regrow=regrow, floor=floor, ada=ada)
    assert [len(b) for b in history] == [4, 8, 10]
    total = base * 10 * 2  # also of an update that has seen fewer layers
    stored = min(int(r_max * base), 200)
    most = np.full((4, 2), stored)
    for budgets in history:
        most = np.concatenate([most, np.full((len(budgets) - len(most), 2), stored)])
        assert (budgets <= most).all()
        assert budgets.sum() == min(total, most.sum()) if regrow else budgets.sum() <= total
        most = budgets
    if not ada:
        assert all((b[:, 0] == b[:, 1]).all() for b in history)
    if r_max == 10 and floor and regrow:
        assert history[-1].min() >= int(floor * base) and np.ptp(history[-1]) > base


def test_dynamickv_takes_the_largest_scores_where_nothing_clips():
    scores = np.array([[[5.0, 1, 1, 1], [4, 1, 1, 1]], [[9, 8, 7, 6], [3, 2, 1, 0]]])  # L K P
    (budgets,) = brute.dynamickv_budgets(scores, 2, update_interval=0)  # of all, the eight largest: 1 + 1, 4 + 2
    assert budgets.tolist() == [[1, 1], [3, 3]]
    (budgets,) = brute.dynamickv_budgets(scores, 2, update_interval=0, ada=True)
    assert budgets.tolist() == [[1, 1], [4, 2]]
    # 1 + 2 * 1/2 * 2/4, 1 + 6 * 1/2 * 2/4
    (budgets,) = brute.dynamickv_budgets(scores, 2, update_interval=0, floor=0.5)
    assert budgets.tolist() == [[2, 2], [2, 2]]  # 3/2 and 5/2: the first of equals gets what is left
    # First: layer 0 alone is given both layers' rows.
    first, last = brute.dynamickv_budgets(scores, 2, update_interval=1)
    assert first.tolist() == [[4, 4]] and last.tolist() == [[1, 1], [3, 3]]


def test_equal_scores_go_to_the_first():
    assert brute.counts_of_largest(np.ones((2, 3, 4)), 6).tolist() == [[4, 2, 0], [0, 0, 0]]


def test_adakv_budgets():
    scores = np.array([[9.0, 8, 7, 6, 1, 1], [5, 1, 1, 1, 1, 1]])
    assert brute.adakv_budgets(scores, 2, 0.0) == [4, 0]
    assert brute.adakv_budgets(scores, 2, 1.0) == [2, 2]
    assert brute.adakv_budgets(scores, 2, 0.5) == [3, 1]
    assert brute.adakv_budgets(scores, 2, 0.2) == [4, 0]  # 3.6 and 0.4
    assert brute.hand_out([Fraction(7, 2), Fraction(7, 2)], [9, 9], 7) == [4, 3]
    assert brute.hand_out([Fraction(6), Fraction(1)], [3, 9], 7) == [3, 4]


def test_snapkv_is_adakv_with_nothing_to_redistribute():
    """`brute` and the SnapKV of `test_methods` were written apart."""
    from tests import test_methods as others

    model, (prompts, _) = model_of("gqa"), texts(LENGTHS)
    arguments = dict(window=8, kernel=5, pooling="avg")
    for prompt, layers in zip(prompts, layers_of("gqa", LENGTHS), strict=True):
        n = len(prompt)
        rows = brute.adakv(model.spec, n, 20, floor=1.0, **arguments).compress(layers)
        select = others.snapkv(model.spec, n, 20, **arguments).select
        kept = lambda layer: [sorted(e.pos for e in row) for row in layer]
        assert [kept(layer) for layer in rows] == [kept(select(i, seen)) for i, seen in enumerate(layers)]


def test_d2o_weights():
    own, (other,) = brute.d2o_weights([0.9], "paper")
    assert (round(own, 3), round(other, 3)) == (0.525, 0.475)
    own, (other,) = brute.d2o_weights([0.6], "paper")
    assert (round(own, 3), round(other, 3)) == (0.599, 0.401)
    own, (other,) = brute.d2o_weights([0.9], "scatter_mean")
    assert (own, other) == (0.5, 0.45)
    own, (other,) = brute.d2o_weights([0.6], "scatter_mean")
    assert own + other == pytest.approx(0.8)
    own, others = brute.d2o_weights([0.9, 0.8, -0.3], "paper")
    assert own + sum(others) == pytest.approx(1) and own > others[0] > others[1] > others[2] > 0
    assert others[0] / own == pytest.approx(math.exp(0.9) / math.e)


def test_d2o_moves_its_threshold_before_it_compares_which_changes_no_decision():
    m, tau, beta = np.random.default_rng(0).uniform(0, 1, (3, 10_000))
    np.testing.assert_array_equal(m >= beta * m + (1 - beta) * tau, m >= tau)


def layer_of(*heads: tuple[float, ...]) -> np.ndarray:
    """Heads whose keys received so much attention, all of it from the last query."""
    probs = np.zeros((len(heads), len(heads[0]), len(heads[0])))
    probs[:, -1] = heads
    return probs


def test_d2o_statistics():
    three = layer_of((1, 1, 1), (3, 0, 0), (0, 1, 2))  # variances 0, 3, 1; of the mean 4/3, 2/3, 1 it is 1/9
    assert brute.d2o_released(three) == pytest.approx((0 + 1 + 1 / 3) / 3, rel=1e-5)
    assert brute.d2o_released(np.ones((4, 1, 1))) == brute.d2o_variance(np.ones((1, 1))) == 0
    spread, sharp = layer_of((1, 1, 1), (1, 1, 1)), layer_of((3, 0, 0), (3, 0, 0))
    assert brute.d2o_statistic([spread, three, sharp], "paper") == pytest.approx([0, 1 / 27, 1], rel=1e-5)
    assert brute.d2o_statistic([spread, three, sharp], "paper", "-1")[:2] == pytest.approx([0, 1], rel=1e-4)
    assert brute.d2o_statistic([spread, three, sharp], "released") == pytest.approx([0, 4 / 9, 0], rel=1e-5)


@pytest.mark.parametrize(("rule", "times"), [("paper", 100), ("released", 1)])
def test_only_the_released_rule_is_blind_to_how_concentrated_a_layer_is(rule, times):
    """Ten times the deviations: the variance is a hundred times as large, what the released rule sees the same."""
    sums, alive = np.random.default_rng(0).gamma(1, size=(1, 4, 50)).astype(np.float32), jnp.ones((1, 50), bool)
    once, ten = (float(allocation.RULES[rule](jnp.asarray(x), alive)[0]) for x in (sums, np.float32(10) * sums))
    assert ten == pytest.approx(times * once, rel=1e-4)


@pytest.mark.parametrize(
    ("layers", "more"), [("0,-1", {}), ("0", {"merge": "off"}), ("2", {"decode_budget": "70%"})], ids=str
)
def test_a_full_layer_keeps_every_token_and_merges_none(layers, more):
    """However many are generated; the others hold what they were given, and the memory is there from the start."""
    model, (first, second, *_), new = Model(model_of("deep"), None, (), "random"), texts(LENGTHS)[0], 5 * STEPS
    out = model.generate([first, second], methods.d2o("50%", full_layers=layers, **more), max_new_tokens=new)
    (tier,), positions, full = out.cache[0], cached_positions(model, out), sorted(brute.d2o_layers(layers, 6))
    length = np.asarray(tier.length)
    for b, prompt in enumerate((first, second)):
        n, read = len(prompt), len(prompt) + new - 1
        for row in positions[b, full].reshape(-1, positions.shape[-1]):
            assert sorted(row[row >= 0].tolist()) == list(range(read))
        beyond = n * 7 // 10 - n // 2 if "decode_budget" in more else 0
        others = np.delete(length[:, b], full, axis=0)
        assert (others.sum(axis=0) == 6 * (n // 2) - len(full) * n + beyond * len(others)).all()
    assert ((np.asarray(tier.table) < tier.free.shape[0]).sum(axis=-1) * tier.page >= length).all()
    assert tier.free.shape[0] * tier.page <= 1.2 * length.sum()
    if "merge" not in more:
        assert np.isnan(np.asarray(tier.state.action)[full]).all()


def test_a_full_layer_goes_on_where_the_prompt_fits_the_budget():
    model = Model(model_of("gqa"), None, (), "random")
    out = model.generate([texts(LENGTHS)[0][2]], methods.d2o(40, full_layers="0"), max_new_tokens=40)
    assert np.asarray(out.cache[0][0].length)[:, 0, 0].tolist() == [72, 40, 40]  # 33 tokens and 39 that were read


def test_d2o_rows():
    spread = np.linspace(0.05, 0.6, 32)
    rows = brute.d2o_rows(spread.tolist(), 10_000, 2_000, sinks=4)
    assert sum(rows) == 32 * 2_000 and sorted(rows, reverse=True) == rows
    assert (round(min(rows) / 1e4, 3), round(max(rows) / 1e4, 3)) == (0.150, 0.260)
    some = brute.d2o_rows(spread.tolist(), 10_000, 2_000, sinks=4, full_layers="0,1,-1")
    assert some[0] == some[1] == some[31] == 10_000 and sum(some) == 32 * 2_000
    assert brute.d2o_rows([0.0, 1.0], 50, 20, sinks=4) == [29, 11]  # 40 e/(1 + e) = 29.24
    assert brute.d2o_rows([0.0, 1.0], 50, 40, sinks=4) == [50, 30]  # the first has all
    assert brute.d2o_rows([0.0, 1.0], 50, 6, sinks=4) == [7, 5]  # 8.8 and 3.2: sinks and one more token
    assert brute.d2o_rows([0.0, 1.0], 50, 60, sinks=4) == [60, 60]  # longer than the prompt
    assert brute.d2o_rows([0.5, 0.5, 0.5], 50, 10, sinks=4, full_layers="") == [10, 10, 10]
    for out_of_reach in (dict(sinks=4, full_layers="0,1"), dict(sinks=4, full_layers="-1")):
        with pytest.raises(ValueError, match="slots"):
            brute.d2o_rows([0.0, 1.0], 50, 20, **out_of_reach)


@pytest.mark.parametrize("merge", ["paper", "scatter_mean"])
def test_d2o_merges_what_is_similar_and_drops_the_rest(merge):
    entry = lambda pos, *key: Entry(pos, np.array(key, float), np.zeros(2), np.array([pos, 1.0]))
    kept, evicted = [entry(0, 2, 0), entry(1, 0, 1)], [entry(2, 3, 1), entry(3, -1, 1), entry(4, 1, 0.5)]
    tau, merged = brute.d2o_merge(kept, evicted, lambda m: float(np.mean(m)), merge)
    cosines = 3 / math.sqrt(10), 1 / math.sqrt(2), 2 / math.sqrt(5)
    assert tau == pytest.approx(sum(cosines) / 3) and merged == 2  # both into the first
    own, (a, b) = brute.d2o_weights([cosines[0], cosines[2]], merge)
    np.testing.assert_allclose(kept[0].key, [2 * own + 3 * a + b, a + b / 2])
    np.testing.assert_allclose(kept[0].value, [2 * a + 4 * b, own + a + b])
    np.testing.assert_array_equal(kept[1].key, [0, 1])


def test_defaults():
    """Those of the papers and of their released code, as `brute` has them."""
    for name, define in (("dynamickv", brute.dynamickv), ("adakv", brute.adakv), ("d2o", brute.d2o)):
        parameters = inspect.signature(getattr(methods, name)).parameters
        assert parameters["budget"].default == "20%"
        for key, mine in {
            **inspect.signature(define).parameters,
            **(inspect.signature(brute.dynamickv_budgets).parameters if name == "dynamickv" else {}),
        }.items():
            if mine.default is not inspect.Parameter.empty and key not in ("log", "beta" if name == "adakv" else ""):
                assert parameters[key].default == mine.default, (name, key)
