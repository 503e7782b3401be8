"""DMS: a prompt read at once, and tokens after it, are the released algorithm token by token; and what it reports."""

import io

import numpy as np
import pytest
from rich.console import Console

from kvjax import Model, methods
from kvjax.cli import tables
from kvjax.plan import dry_run
from tests.lib import oracle
from tests.lib.brute_gate import compare, compression, forced, gated_model, tokens
from tests.lib.matrix import assert_close

PROMPTS, NEW = (60, 31, 9), 14
dms = methods.dms

CASES = [  # window, key/value heads, offset of the logit, and the compression that this gives
    (12, 2, 1.0, 1.2),
    (12, 4, -3.0, 3.4),
    pytest.param(2, 2, 0.0, 1.9, marks=pytest.mark.slow),
    (0, 2, -3.0, 14.2),
]


@pytest.mark.parametrize(("window", "heads", "offset", "rate"), CASES)
def test_a_prompt_at_once_and_then_tokens_are_the_paper_token_by_token(window, heads, offset, rate):
    _, oracles = compare(gated_model("dms", window, heads, offset), dms(), PROMPTS, NEW)
    assert round(compression(oracles), 1) == rate


@pytest.mark.slow
def test_layers_with_a_sliding_window_forget_slots_too():
    compare(gated_model("dms", 3, 2, 0.5, windows=(10, None)), dms(), PROMPTS, NEW)


@pytest.mark.parametrize(("window", "capacity"), [(12, "30%"), (3, 7)])
def test_a_full_cache_evicts_what_asks_least_to_stay(window, capacity):
    model = gated_model("dms", window, 2, 1.0)
    tiers, oracles = compare(model, dms(capacity=capacity), PROMPTS, NEW)
    assert forced(tiers, oracles) > 100
    for b, prompt in enumerate(PROMPTS):
        row = max(7 if capacity == 7 else 0.3 * (prompt + NEW), min(window + 1, prompt + NEW))
        assert np.asarray(tiers[0].length)[:, b].sum() <= row * model.spec.num_layers * 2


@pytest.mark.parametrize("method", methods.LEARNED)
def test_a_gate_that_never_opens_is_the_full_cache(method):
    model = gated_model(method, 12, 2, 1e9)
    prompts, new = [tokens(1, n)[0] for n in PROMPTS], tokens(3, NEW, seed=1)
    got, positions, cache = oracle.run(model, methods.make(method), prompts, new)
    want, everything, _ = oracle.run(model, methods.full(), prompts, new)
    assert positions == everything
    assert_close(got, want, 1e-5)
    assert not np.asarray(cache[0][0].state.forced).any()


def test_a_generation_says_what_was_forced():
    model = Model(gated_model("dms", 3, 2, -1.0), None, (), "random")
    full, small = (
        model.generate(tokens(2, 40).tolist(), dms(capacity=capacity), max_new_tokens=NEW)
        for capacity in ("100%", "12%")
    )
    assert full.forced == 0 < small.forced == int(small.cache[0][0].state.forced.sum())
    assert tables.describe(model, small, None)["cache"]["forced"] == small.forced
    assert tables.shortage(full) is None
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(tables.summary([full, small], ["a", "b"], "float32"))
    said = " ".join(console.export_text().split())  # however its lines are cut
    assert f"dms: {small.forced:,} of" in said and "--set capacity=" in said


@pytest.mark.parametrize("method", methods.LEARNED)
def test_a_plan_says_that_the_model_decides(method):
    model = Model(gated_model(method, 3, 2, 0.0), None, (), "random")
    planned = dry_run.plan_cache(
        model, methods.make(method, None, {"capacity": "50%", "store": "int8"}), 1000, 24, batch=2
    )
    assert planned.budget is None and planned.decided.startswith("by the model")
    assert 0 < planned.bytes["total"] < planned.full_bytes
    assert methods.arguments_of(method, {"capacity": "50%"}) == {"capacity": "50%", "store": "dense"}
