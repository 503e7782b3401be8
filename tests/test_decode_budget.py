"""Budgets that hold while decoding, compositions of budgets with other choices, and what rows that share slots cost."""

import jax
import numpy as np
import pytest

import kvjax
from kvjax import InputError, methods
from kvjax.cache.pages import LARGEST
from kvjax.generation import allocate
from kvjax.generation.generate import cached_positions
from kvjax.generation.model import Model
from kvjax.plan import dry_run
from kvjax.policies import eviction, score
from kvjax.policies.base import Recipe
from kvjax.policies.budgets import budget as budgets
from kvjax.policies.budgets.allocation import from_scores, from_variance, per_head
from kvjax.policies.select import retain
from tests.lib import brute, oracle
from tests.lib.matrix import EVICTING, WINDOW, quick, text
from tests.test_budget_methods import assert_same, model_of, run, texts
from tests.test_loop import traced_functions
from tests.test_methods import best

SMALL = {name: {"window": WINDOW} for name in ("snapkv", "pyramidkv", "adakv", "dynamickv")}
UNEVEN = ("adakv", "dynamickv", "d2o")


def generate(method: str, new: int, **arguments):
    model = Model(oracle.with_gates(model_of("gqa")), None, (), "random")
    recipe = methods.make(method, 12, SMALL.get(method, {}) | arguments)
    return model.generate([text(40, 0), text(25, 0)], recipe, max_new_tokens=new)


EVICTING_DENSE = [name for name in EVICTING if name in methods.METHODS]


@pytest.mark.parametrize("method", quick(EVICTING_DENSE, ("h2o", "pyramidkv", "dynamickv")))
def test_a_long_generation_stays_inside_the_decode_budget(method):
    short, long = (generate(method, new, decode_budget=16) for new in (24, 8 * 12))
    assert long.bytes.total == short.bytes.total  # a cache of constant size
    most = 16 if method != "pyramidkv" else 17  # its schedule overspends
    assert all(np.mean(slots) <= most for slots in long.slots)
    for row in cached_positions(Model(model_of("gqa"), None, (), ""), long).reshape(-1, long.cache[0][0].capacity):
        kept = row[row >= 0]
        assert len(set(kept.tolist())) == len(kept)
        if method in SMALL:  # the newest tokens are there: the last one was chosen and not read
            assert {40 + 96 - 2, 25 + 96 - 2} & set(kept.tolist())


@pytest.mark.parametrize("interval", quick((0, 1, 2, 3, 4, 5, 6), (1, 4)))
def test_layers_that_were_given_their_slots_early_have_the_decode_budget_too(interval):
    """Six layers: those of the first updates are trimmed by the later ones."""
    recipe = methods.dynamickv(budget=20, decode_budget=32, update_interval=interval, **SMALL["dynamickv"])
    out = Model(model_of("deep"), None, (), "random").generate([text(100, 0)], recipe, max_new_tokens=24)
    (tier,) = out.cache[0]
    given = np.asarray(tier.budget)
    assert np.mean(out.slots[0]) == 32 and given.mean() == 32
    assert np.ptp(given) >= 12  # layers differ


@pytest.mark.parametrize("method", SMALL)
def test_without_a_decode_budget_tokens_are_appended(method):
    short, long = (generate(method, new) for new in (24, 96))
    assert long.bytes.total > 2 * short.bytes.total


def snapkv(spec, n: int, most: int, room: int, window: int, kernel: int) -> brute.Method:
    """SnapKV whose votes go on while decoding: of a full row the token with the fewest votes leaves."""

    def compress(prompts):
        layers = []
        for prompt in prompts:
            rows = []
            group = prompt.probs.shape[0] // spec.num_kv_heads
            for k in range(spec.num_kv_heads):
                votes = prompt.probs[k * group : (k + 1) * group, n - window :].sum(axis=1).mean(axis=0)
                past = np.where(np.arange(n) < n - window, votes, 0)
                padded = np.pad(past, kernel // 2)
                pooled = [padded[p : p + kernel].sum() / kernel for p in range(n - window)]
                stat = [*pooled, *votes[n - window :]]  # of the window: what those after them gave them
                row = oracle.entries(prompt, k, range(n))
                for entry, value in zip(row, stat, strict=True):
                    entry.stat = float(value)
                kept = [row[i] for i in sorted(best(np.array(pooled), most - window))]
                rows.append(kept + row[n - window :])
            layers.append(rows)
        return layers

    def observe(layer, rows, probs):
        for row, prob in zip(rows, probs, strict=True):
            for entry, p in zip(row, prob.mean(axis=0), strict=True):
                entry.stat = entry.stat * (1 - 1 / window) + float(p)
            if len(row) > most + room:
                row.remove(min(sorted(row, key=lambda e: e.pos)[:-window], key=lambda e: e.stat))

    return brute.Method(compress, observe)


def test_votes_go_on_while_decoding():
    model, (prompts, teacher) = model_of("gqa"), texts((60, 33))
    recipe = methods.snapkv(budget=20, window=4, kernel=3, decode_budget=23)
    for step, (logits, cache) in enumerate(run(model, recipe, prompts, teacher, 10)):
        for b in range(2):
            reference = snapkv(model.spec, len(prompts[b]), 20, 3, 4, 3)
            *_, last = brute.follow(oracle.Oracle(model), prompts[b], teacher[b][:step], reference)
            assert_same(logits, cache, b, last, f"step {step}")


def test_the_window_is_not_condemned_at_once():
    """Rows of the demo model lose 192 tokens, of slots of which a third hold the window: 154 would be the window's if
    its tokens began without votes, a third if all were alike.
    """
    model, n = kvjax.load(), 200
    recipe = methods.snapkv(budget=96, window=32, decode_budget=96)
    out = model.generate([list(range(n))], recipe, max_new_tokens=17)
    rows = cached_positions(model, out).reshape(6 * 2, -1)
    assert ((rows >= 0).sum(axis=1) == 96).all()  # of 16 more tokens
    assert 12 * 32 - ((rows >= n - 32) & (rows < n)).sum() <= 64


def test_a_decode_budget_below_the_budget_is_refused():
    with pytest.raises(InputError, match="decode_budget 16 tokens is less than the budget 20 tokens"):
        methods.snapkv(budget=20, decode_budget=16)
    with pytest.raises(InputError, match="method full has no argument 'decode_budget'"):
        methods.make("full", None, {"decode_budget": "16"})


VOTES = score.window(4, 3, "max")
HEAVY = score.accumulated(0.25, 4)
MERGE = eviction.merge(0.7, "paper")
COMPOSED = {
    "dynamickv's budgets, h2o's eviction": (score.accumulated(0.5), from_scores(update_interval=0), eviction.drop),
    "ada budgets, h2o's eviction": (score.accumulated(0.5), per_head(budgets.uniform(), 0.2), eviction.drop),
    "d2o's merge under dynamickv's budgets": (HEAVY, from_scores(update_interval=0), MERGE),
    "d2o's merge under ada budgets": (HEAVY, per_head(budgets.uniform(), 0.2), MERGE),
    "d2o's budgets, tova's choice": (score.last_row(), from_variance(min_slots=5, rule="paper"), eviction.drop),
    "dynamickv's budgets per head, tova's choice": (
        score.last_row(),
        from_scores(update_interval=2, ada=True),
        eviction.drop,
    ),
    "merging h2o": (score.accumulated(0.5, 4), budgets.uniform(), eviction.merge(0.7, "scatter_mean")),
}


@pytest.mark.parametrize("name", quick(COMPOSED, list(COMPOSED)[::2]))
def test_scores_budgets_and_fates_compose(name):
    """Rows share no more than they were given, and every row has the pages that it needs."""
    votes, keep, end = COMPOSED[name]
    recipe = Recipe(name, retain(votes, keep, evict="after", action=end), amounts=budgets.amounts(12))
    model = Model(model_of("gqa"), None, (), "random")
    out = model.generate([text(60, 0), text(41, 0)], recipe, max_new_tokens=10)
    assert all(np.mean(slots) == 12 for slots in out.slots)
    assert np.isfinite(out.logits).all()
    (tier,) = out.cache[0]
    owned = np.asarray(tier.table) < tier.free.shape[0]
    assert (owned.sum(axis=-1) * tier.page >= np.asarray(tier.length)).all()


def test_merging_needs_one_decision():
    with pytest.raises(InputError, match="give the budget update_interval=0"):
        retain(HEAVY, from_scores(update_interval=2), evict="after", action=MERGE)


def uneven_model() -> Model:
    """Four layers of four heads: some attend to a few tokens, some to all."""
    network = oracle.random_model(3, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=32, max_position=8192)
    for index, layer in enumerate(network.layers):
        strength = np.repeat([6.0, 0.2, 1.0, 0.1], 32) * (1.0, 0.3, 2.0, 0.6)[index]
        layer.attention.q.kernel[...] = layer.attention.q.kernel[...] * strength.astype(np.float32)
    return Model(network, None, (), "random")


@pytest.mark.parametrize("method", quick(UNEVEN, UNEVEN[:1]))
def test_rows_of_different_lengths_are_really_shorter(method):
    """A quarter of 4,096 tokens is a quarter of the bytes. Masking evicted tokens, as is usual, would save nothing."""
    arguments = {"ada": True} if method == "dynamickv" else {}
    out = uneven_model().generate([text(4096, 0)], methods.make(method, "25%", arguments), max_new_tokens=4)
    assert out.bytes.total - out.bytes.statistics <= 0.27 * out.full_bytes
    assert out.bytes.total == sum(x.nbytes for x in jax.tree.leaves(out.cache))
    rows = np.asarray(out.cache[0][0].length)
    assert rows.sum() <= (1024 + 4) * rows.size
    if method != "d2o":  # its shares lie within a factor e
        assert rows.max() > 4 * rows.min()


@pytest.mark.parametrize("method", quick(UNEVEN, UNEVEN[:1]))
def test_one_compilation_serves_every_split(method):
    model, splits = Model(model_of("deep"), None, (), "random"), set()
    recipe = methods.make(method, 30, SMALL.get(method))
    with traced_functions() as names:
        for seed in range(5):
            out = model.generate([text(100 - seed, seed)], recipe, max_new_tokens=3)
            splits.add(np.asarray(out.cache[0][0].budget).tobytes())
    assert len(splits) == 5
    for name in ("_prefill_layer", "_run_allocate", "_trim", "_write_selected", "decode_loop"):
        assert names.count(name) <= 1, name
    assert names.count("decode_loop") == 1


def test_dynamickv_holds_few_layers_beside_the_pool(monkeypatch):
    """At most `update_interval` layers wait, with `r_max` times the mean budget each, beside a pool for the sum."""
    waiting, after = [], allocate.Allocation.after

    def watched(self, cache, found):
        waiting.append([w.pos.shape[-1] for w in (*self._waiting.values(), found.pending)])
        return after(self, cache, found)

    monkeypatch.setattr(allocate.Allocation, "after", watched)
    recipe = methods.dynamickv(budget=20, r_max=3.0, update_interval=2, **SMALL["dynamickv"])
    out = Model(model_of("deep"), None, (), "random").generate([text(100, 0)], recipe, max_new_tokens=2)
    assert waiting == [[64], [64, 64]] * 3  # 60 and two new tokens, on the ladder
    (tier,) = out.cache[0]
    rows = 6 * 2  # layers x heads
    assert tier.free.shape[0] * tier.page <= rows * (20 + 2 + tier.page)


def test_one_token_is_not_the_whole_prompt():
    assert methods.snapkv(budget=1) is not methods.snapkv(budget="100%")
    assert methods.snapkv(budget="100%") is methods.snapkv(budget="100.0%")


@pytest.mark.parametrize("method", quick((*UNEVEN, "snapkv"), ("adakv", "d2o")))
def test_with_room_for_everything_a_decode_budget_changes_nothing(method):
    model = Model(model_of("gqa"), None, (), "random")
    arguments = SMALL.get(method, {}) | {"decode_budget": 64} | ({"split": "layer"} if method == "snapkv" else {})
    full = model.generate([text(30, 0), [5]], max_new_tokens=20)
    out = model.generate([text(30, 0), [5]], methods.make(method, 64, arguments), max_new_tokens=20)
    assert [s.tokens for s in out.sequences] == [s.tokens for s in full.sequences]
    assert out.slots == full.slots


def test_counts_stay_exact_beyond_the_square_root_of_32_bits():
    """Half of 131,072 tokens in each of four layers: the counts of a plain sort."""
    rng, tokens = np.random.default_rng(0), 131072
    stats = [rng.random((1, 1, tokens)).astype(np.float32) ** power for power in (1, 2, 3, 9)]
    budget = from_scores(update_interval=0)
    held, half = jax.numpy.full((4, 1, 1), LARGEST), jax.numpy.asarray([tokens // 2])
    rows = budget.allocate(
        [*map(jax.numpy.asarray, stats)], jax.numpy.asarray(4), jax.numpy.asarray([tokens]), held, half
    )
    best_of_all = np.argsort(-np.concatenate([s.ravel() for s in stats]), kind="stable")[: 2 * tokens]
    assert np.asarray(rows)[:, 0, 0].tolist() == np.bincount(best_of_all // tokens, minlength=4).tolist()


def test_shares_of_a_million_tokens_add_up():
    budget = from_variance(min_slots=5, rule="paper")
    infos = [jax.numpy.asarray([[x]], jax.numpy.float32) for x in np.linspace(0, 1, 8)]
    held = jax.numpy.full((8, 1, 1), LARGEST)
    slots = jax.numpy.asarray([20000])
    rows = budget.allocate(infos, jax.numpy.asarray(8), jax.numpy.asarray([1 << 20]), held, slots)
    assert int(rows.sum()) == 8 * 20000 and len(set(np.asarray(rows).ravel().tolist())) == 8


def test_a_decode_budget_of_another_unit_is_checked_for_every_prompt():
    recipe = methods.snapkv(budget=100, decode_budget="10%", window=4)
    with pytest.raises(InputError, match="is less than the budget 100 tokens"):
        Model(model_of("gqa"), None, (), "random").generate([text(120, 0)], recipe, max_new_tokens=2)


@pytest.mark.parametrize("method", [*EVICTING_DENSE, "mikv"])
def test_every_cache_can_be_planned(method):
    planned = dry_run.plan_cache(dry_run.abstract_model(None), methods.make(method, "20%"), context=200, new=4)
    assert planned.bytes["total"] < planned.full_bytes
