"""DMC: a prompt read at once, and tokens after it, are the paper's algorithm token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import InputError, methods
from kvjax.cache import tier as tiers_
from kvjax.cache.quantize import named
from kvjax.generation.allocate import init_cache
from kvjax.models import gate as gates
from kvjax.policies.budgets.apportion import choose_best
from kvjax.spec import GateSpec, RopeSpec
from tests.lib import oracle
from tests.lib.brute_gate import compare, compression, forced, gated_model, tokens

PROMPTS, NEW = (50, 31, 9), 12
DTYPES = (jnp.bfloat16, jnp.float32)
dmc = methods.dmc

CASES = [  # window, key/value heads, offset of the logit, and the compression that this gives
    (12, 2, 1.5, 1.2),
    (12, 4, -0.5, 2.7),
    (12, 2, -2.5, 19.4),
    pytest.param(0, 4, 1.0, 1.4, marks=pytest.mark.slow),
    (0, 2, -2.0, 10.7),
]


@pytest.mark.parametrize(("window", "heads", "offset", "rate"), CASES)
def test_a_prompt_at_once_and_then_tokens_are_the_paper_token_by_token(window, heads, offset, rate):
    _, oracles = compare(gated_model("dmc", window, heads, offset), dmc(), PROMPTS, NEW)
    assert round(compression(oracles), 1) == rate


def test_layers_with_a_sliding_window_forget_slots_too():
    compare(gated_model("dmc", 12, 2, 0.5, windows=(10, None)), dmc(capacity=500), PROMPTS, NEW)


def test_heads_may_turn_in_part():
    compare(gated_model("dmc", 12, 2, 0.5, rope=RopeSpec(100.0, partial=0.5)), dmc(), PROMPTS, NEW)


@pytest.mark.parametrize(("window", "capacity"), [(12, "30%"), (0, 7)])
def test_a_full_cache_merges_what_asks_least_for_a_slot(window, capacity):
    model = gated_model("dmc", window, 2, 2.0)
    tiers, oracles = compare(model, dmc(capacity=capacity), PROMPTS, NEW)
    assert forced(tiers, oracles) > 100
    for b, prompt in enumerate(PROMPTS):
        row = 7 if capacity == 7 else 0.3 * (prompt + NEW)
        assert np.asarray(tiers[0].length)[:, b].sum() <= row * model.spec.num_layers * 2


def test_weights_are_the_same_in_both_formats():
    """Small ones too: what keeps them above 0 is not the format's epsilon."""
    spec = GateSpec("dmc", rate=2.0, window=3)
    q, k = jnp.linspace(-60, 5, 64).reshape(4, 2, 8), jnp.ones((4, 1, 8))
    low, high = (gates.read(spec, *(x.astype(jnp.bfloat16).astype(t) for x in (q, k)), None)[0].weight for t in DTYPES)
    np.testing.assert_allclose(low, high, rtol=0.05)
    assert 0 < high.min() < 1e-6


@pytest.mark.parametrize("store", ["int4/int8", pytest.param("int8", marks=pytest.mark.slow)])
def test_closed_slots_are_encoded_once_and_the_open_one_is_exact(store):
    """In the first layer, whose keys do not depend on what attention read from codes."""
    model, codec = gated_model("dmc", 12, 2, -0.5), named(store)
    prompts, new = [tokens(1, n)[0] for n in PROMPTS], tokens(3, NEW, seed=1)
    _, positions, exact = oracle.run(model, dmc(), prompts, new)
    logits, same, low = oracle.run(model, dmc(store=store), prompts, new)
    assert np.isfinite(logits).all()
    assert [[layers[0] for layers in step] for step in positions] == [[layers[0] for layers in step] for step in same]
    whole, closed, newest = (_contents(tier) for tier in (*exact[0], *low[0]))
    wanted = codec.decode(*codec.encode(whole.k, whole.v, ()), ())
    stored = codec.decode(closed.k, closed.v, ())
    for at in np.ndindex(3, 2):
        filled, n = np.asarray(whole.pos[at] >= 0).sum(), np.asarray(closed.pos[at] >= 0).sum()
        assert n == filled - 1 and closed.pos[at][:n].tolist() == whole.pos[at][:n].tolist()
        assert newest.pos[at].tolist() == [whole.pos[at][n]]
        for got, want, source in zip(stored, wanted, (whole.k, whole.v), strict=True):
            error = np.abs(np.asarray(got[at][:n] - want[at][:n]))
            assert (error > 1e-5).mean() < 0.05  # a number between two codes may become either
            assert error.max(initial=0) <= np.abs(source[at][:n]).max(initial=0) / 5
        for got, want in ((newest.k, whole.k), (newest.v, whole.v)):
            np.testing.assert_allclose(got[at][0], want[at][n], atol=1e-5)


def _contents(tier: tiers_.Tier) -> tiers_.Slots:
    """All slots of the first layer."""
    view = tiers_.layer(tier, 0)
    return tiers_.take(view, jnp.broadcast_to(jnp.arange(view.capacity), (*view.length.shape, view.capacity)))


@pytest.mark.parametrize(("offset", "trained"), [(0.5, 2.0), (-0.5, 2.0), (-2.0, 4.0)])
@pytest.mark.parametrize("method", methods.LEARNED)
def test_bytes_are_those_of_the_rate_that_is_measured(method, offset, trained):
    """2,048 tokens in float32: at most 1 / rate and 5% of the full cache, all arrays counted, and nothing refused."""
    model = oracle.random_model(1, num_layers=2, head_dim=32, gate=GateSpec(method, trained, 12, offset=offset))
    prompts, new = tokens(2, 2000).tolist(), 48
    _, cache = oracle.start(model, methods.make(method), prompts, new)
    (tier,) = cache[0]
    rate = 2000 / float(np.mean(tier.length))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert size <= (1 / rate + 0.05) * 2 * 2 * 2 * 2 * 32 * 4 * 2048
    assert not np.any(tier.state.forced) and rate > 1.1
    share, room = np.asarray(tier.length).sum(axis=(0, 2)) / 2000, np.asarray(tier.state.max_slots)[0, :, 0]
    assert (room >= np.asarray(tier.length).sum(axis=(0, 2)) + np.minimum(1.5 * new * share, 4 * new)).all()


@pytest.mark.parametrize("arguments", [{}, {"store": "int4"}])
def test_the_pool_is_updated_in_place(arguments):
    """No copy of it is made in a step, in any of the tiers."""
    model = oracle.random_model(0, num_layers=2, head_dim=64, gate=GateSpec("dmc", 4.0, 12))
    recipe, now = dmc(**arguments), jax.ShapeDtypeStruct((1,), jnp.int32)
    cache = jax.eval_shape(lambda: init_cache(model, recipe, kvjax.Lengths((60000,), 64, 61440)))
    active = jax.ShapeDtypeStruct((1,), bool)
    memory = oracle.step.lower(model, cache, now, now, active, recipe=recipe).compile().memory_analysis()
    assert memory.temp_size_in_bytes < sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache[0][0].k)) / 2


@pytest.mark.parametrize(("method", "other"), [("dmc", "dms"), ("dms", "dmc")])
def test_other_models_and_arguments_are_refused(method, other):
    lengths = kvjax.Lengths((5,), 2, 64)
    with pytest.raises(InputError, match=r"kvjax\.retrofit: this model has no gate"):
        init_cache(oracle.random_model(0), methods.make(method), lengths)
    with pytest.raises(InputError, match=f"this model's gate is for {other}"):
        init_cache(gated_model(other, 3, 2, 0.0), methods.make(method), lengths)
    with pytest.raises(InputError, match="capacity 'much' is not a number of tokens"):
        methods.make(method, None, {"capacity": "much"})
    with pytest.raises(InputError, match="lets its model decide and takes no budget"):
        methods.make(method, "20%")
    with pytest.raises(InputError, match="kivi quantises keys that follow each other"):
        methods.make(method, None, {"store": "kivi2"})


def test_the_best_of_all_rows_are_chosen_exactly():
    rng = np.random.default_rng(0)
    scores = np.round(rng.random((3, 40, 17)) * 8) / 8  # many ties
    scores[rng.random(scores.shape) < 0.2] = -1
    k = rng.integers(0, 60, 40)
    got = np.asarray(choose_best(jnp.asarray(scores, jnp.float32), jnp.asarray(k, jnp.int32)))
    for b in range(40):
        best = sorted((-scores[r, b, t], r, t) for r in range(3) for t in range(17) if scores[r, b, t] >= 0)
        assert {(r, t) for _, r, t in best[: k[b]]} == set(map(tuple, np.argwhere(got[:, b]).tolist()))
