"""The laws that every method obeys, for every model. A method that is added to `METHODS` is tested without further ado.

Here: what rows, pages and bytes are after the prompt and after every token. See `test_loop.py` for whole generations.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import methods
from kvjax.cache import layout
from kvjax.cache import tier as tiers_
from kvjax.parallel import mesh
from kvjax.plan import dry_run
from kvjax.spec import RopeSpec, readable
from tests.lib import matrix, oracle
from tests.lib.matrix import (
    BATCH,
    BUDGET,
    EVICTING,
    MATES,
    STEPS,
    VARIANTS,
    WINDOW,
    WITH_BUDGET,
    Greedy,
    assert_close,
    decoder,
    describe,
    every_case,
    every_method_and_a_full_cache,
    every_model,
    greedy,
    model_of,
    parts,
    recipe_of,
    small_budget,
    teacher,
    tiers_of,
)


@functools.cache
def full_cache(model: str, store: str = "dense"):
    return oracle.run(decoder(model), methods.full(store=store), BATCH, teacher())


def contents(cache: layout.Cache, b: int, model: str) -> list[np.ndarray]:
    """Everything that a cache holds of one sequence."""
    found, each = [], len(BATCH) // mesh.shape_of(decoder(model))["data"]
    for tier in tiers_of(cache):
        own = parts(tier, model)
        heads = len(own) * each // len(BATCH)
        for part in own[b // each * heads : (b // each + 1) * heads]:
            found += _of_sequence(part, b % each)
    return found


def _of_sequence(tier: tiers_.Tier, b: int) -> list[np.ndarray]:
    found = [tier.length[:, b], tier.budget[:, b], *(x[:, b] for x in jax.tree.leaves((tier.balance, tier.state)))]
    for leaf in jax.tree.leaves((tier.k, tier.v, tier.pos, tier.score)):
        for table, length in zip(tier.table[:, b], tier.length[:, b], strict=True):
            for row, n in zip(table, length, strict=True):
                pages = leaf[row[row < tier.free.shape[0]]]
                found.append(pages.reshape(-1, *leaf.shape[2:])[:n])
    return found


def alive(positions: list, model: str) -> list:
    """Those of the positions `[steps][B][L][K]` that the next token can read."""
    windows = [decoder(model).spec.window(i) for i in range(decoder(model).spec.num_layers)]
    oldest = lambda now, window: now - readable(now, window)
    return [
        [
            [[[p for p in row if p >= oldest(len(prompt) + step, window)] for row in rows] for rows, window in layers]
            for prompt, layers in zip(BATCH, (zip(x, windows, strict=True) for x in batch), strict=True)
        ]
        for step, batch in enumerate(positions)
    ]


@every_case
def test_a_large_budget_is_the_full_cache(model, method):
    recipe, store = recipe_of(method, 1000), VARIANTS[method].get("store", "dense")
    same = not recipe.stores[0].balanced and (store == "dense" or recipe.rotate == "write")
    if method not in WITH_BUDGET or not same:
        pytest.skip("has no budget, or encodes other numbers than the full cache")
    if recipe.positions is not None and decoder(model).spec.windows:
        pytest.skip("keeps sinks in its window, which the full cache has forgotten")
    logits, positions, _ = oracle.run(decoder(model), recipe, BATCH, teacher())
    full, everything, _ = full_cache(model, store)
    assert alive(positions, model) == alive(everything, model)
    assert_close(logits, full, 5e-2 if decoder(model).dtype == jnp.bfloat16 else 1e-5)


def test_keys_that_turn_in_part_as_they_are_read_are_those_that_turned_before():
    model = oracle.random_model(5, num_layers=2, rope=RopeSpec(100.0, partial=0.75))
    got, want = (oracle.run(model, recipe, BATCH, teacher()) for recipe in (methods.streaming_llm(64), methods.full()))
    assert got[1] == want[1]
    assert_close(got[0], want[0], 1e-5)


IN_PARTS = [
    *((model, matrix.MADE_FOR.get(model, "h2o")) for model in matrix.MODELS),
    *((matrix.model_of(method), method) for method in matrix.VARIANTS if method != "h2o"),
]
QUICKLY = [("gqa", "h2o"), ("latent", "h2o"), ("gated", "dmc"), ("gqa", "mikv"), ("gqa", "full kivi2")]


@pytest.mark.parametrize("case", matrix.quick(dict.fromkeys(IN_PARTS), QUICKLY), ids=" ".join)
def test_a_prompt_may_be_read_in_parts(case):
    """Projections and the feed-forward network know nothing of other tokens; what is behind the prompt is not read."""
    model, method = case
    whole, recipe = small_budget(model, method), recipe_of(method, BUDGET)
    last, cache = oracle.start(decoder(model), recipe, BATCH, STEPS, chunk=16 * len(BATCH))
    assert oracle.kept_positions(decoder(model), cache) == whole.positions[0]
    assert_close(np.asarray(last), whole.logits[0], 5e-2 if decoder(model).dtype == jnp.bfloat16 else 1e-5)


@every_model
def test_decoding_a_token_is_prefilling_one_more(model):
    network = decoder(model)
    tolerance = 5e-2 if network.dtype == jnp.bfloat16 else 1e-5
    logits, _, _ = full_cache(model)
    longer = [[*prompt, int(new[0])] for prompt, new in zip(BATCH, teacher(), strict=True)]
    last, _ = oracle.start(network, methods.full(), longer, STEPS - 1)
    assert_close(logits[1], np.asarray(last), tolerance)
    for b, prompt in enumerate(BATCH):
        whole = matrix.reference(network, [*prompt, *teacher()[b].tolist()])
        assert_close(logits[:, b], whole[len(prompt) - 1 :], tolerance)


def _full(n: int, now: int) -> set[int]:
    return set(range(now))


def _streaming(n: int, now: int) -> set[int]:
    return {*range(4), *range(now - (BUDGET - 4), now)}


def _h2o(n: int, now: int) -> set[int]:
    return set(range(now - BUDGET // 2, now))


def _window(n: int, now: int) -> set[int]:
    return set(range(n - WINDOW, now))


PROTECTED = {"full": _full, "streaming_llm": _streaming, "h2o": _h2o, "snapkv": _window, "pyramidkv": _window}


@every_case
def test_rows_hold_what_they_may(model, method):
    """Positions are unique, never from the future; sinks, windows and recent tokens are there."""
    protected = PROTECTED.get(method.split()[0], lambda n, now: set())
    budget = recipe_of(method, BUDGET).budget
    uneven = budget is not None and (budget.split or budget.allocate) is not None  # rows share their slots
    for step, batch in enumerate(small_budget(model, method).positions):
        for prompt, layers in zip(BATCH, batch, strict=True):
            now = len(prompt) + step
            rows = [row for layer in layers for row in layer]
            for index, row in ((i, row) for i, layer in enumerate(layers) for row in layer):
                oldest = now - readable(now, decoder(model).spec.window(index))
                assert row and len(set(row)) == len(row) and row[-1] < now
                assert {pos for pos in protected(len(prompt), now) if pos >= oldest} <= set(row)
                if method in EVICTING and method != "pyramidkv" and not uneven:
                    assert len(row) <= BUDGET + step
            if uneven and method in EVICTING:
                assert sum(map(len, rows)) <= (BUDGET + step) * len(rows)


@every_case
def test_every_page_has_one_owner(model, method):
    caches = small_budget(model, method).caches
    assert all(describe(cache) == describe(caches[0]) for cache in caches)
    for tier in (part for cache in caches for whole in tiers_of(cache) for part in parts(whole, model)):
        size = tier.free.shape[0]
        assert (tier.length <= tier.capacity).all()
        owned = tier.table < size
        held = owned.sum(axis=-1)
        assert (owned == (np.arange(owned.shape[-1]) < held[..., None])).all()
        assert (held * tier.page >= tier.length).all()
        pages = np.concatenate([tier.table[owned], tier.free[: int(tier.num_free[0])]])
        assert sorted(pages.tolist()) == list(range(size))


@every_case
def test_bytes_are_those_of_the_arrays(model, method):
    for cache in small_budget(model, method).caches[:: STEPS // 2]:
        for tier in tiers_of(jax.tree.map(jnp.asarray, cache)):
            parts = tiers_.nbytes(tier)
            assert parts.total == sum(parts) - parts.total == sum(x.nbytes for x in jax.tree.leaves(tier))
            assert min(parts) >= 0


@every_case
def test_shares_are_those_of_a_cache_in_bfloat16(model, method):
    """Whatever a run computes in: beside numbers of 32 bits a store would look half as large."""
    recipe = recipe_of(method, BUDGET)
    models = [dry_run.without_weights(decoder(model).spec, dtype, None, "") for dtype in (jnp.float32, jnp.bfloat16)]
    wide, half = (dry_run.plan_cache(each, recipe, 40, 8, batch=2) for each in models)
    assert wide.compared == half.compared == (half.bytes["total"], half.full_bytes)
    assert half.full_bytes < wide.full_bytes and half.bytes["total"] <= wide.bytes["total"]


def assert_same(a: Greedy, i: int, b: Greedy, j: int, tolerance: float = 1e-5) -> None:
    """Sequence i of one batch went like sequence j of another."""
    assert a.tokens[i].tolist() == b.tokens[j].tolist()
    assert [step[i] for step in a.positions] == [step[j] for step in b.positions]
    assert_close(a.logits[:, i], b.logits[:, j], tolerance)


@every_case
def test_a_sequence_ignores_its_batch_mates(model, method):
    assert_same(greedy(decoder(model), recipe_of(method, BUDGET), MATES), 2, small_budget(model, method), 0)


@every_method_and_a_full_cache
def test_a_sequence_ignores_padding_and_may_be_alone(method):
    model, recipe = decoder(model_of(method)), recipe_of(method, BUDGET)
    alone = greedy(model, recipe, [BATCH[1]] * mesh.shape_of(model)["data"], padded=96)
    assert_same(alone, 0, small_budget(model_of(method), method), 1)


@pytest.mark.parametrize("method", matrix.quick(VARIANTS, ("mikv",)))
def test_the_pages_of_a_platform_change_nothing(method):
    model = model_of(method)
    small, large = small_budget(model, method), greedy(decoder(model), recipe_of(method, BUDGET), BATCH, platform="tpu")
    for ours, theirs in zip(tiers_of(large.caches[-1]), tiers_of(small.caches[-1]), strict=True):
        assert ours.page == 1 == theirs.page or ours.page == 128 > theirs.page
    assert large.positions == small.positions
    assert_close(large.logits, small.logits, 1e-5)


@every_method_and_a_full_cache
@pytest.mark.parametrize("model", ["gqa", pytest.param("gqa-bf16", marks=pytest.mark.slow)])
def test_a_finished_sequence_leaves_its_cache_alone(model, method):
    if model_of(method) != "gqa":
        if model != "gqa":
            pytest.skip("its models are tried in float32")
        model = model_of(method)
    active = np.array([[True, step < 2, *[True] * (len(BATCH) - 2)] for step in range(STEPS)])
    stopped = greedy(decoder(model), recipe_of(method, BUDGET), BATCH, active=active)
    for b in (0, 2):
        assert_same(stopped, b, small_budget(model, method), b)
    for step in range(2, STEPS + 1):
        assert stopped.positions[step][1] == small_budget(model, method).positions[2][1]
    for x, y in zip(contents(stopped.caches[2], 1, model), contents(stopped.caches[-1], 1, model), strict=True):
        np.testing.assert_array_equal(x, y)
