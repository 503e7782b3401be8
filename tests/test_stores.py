"""Methods over low-bit stores: slots move as codes, tiers cost what the papers print, decoding makes no dense copy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax import METHODS, InputError, methods
from kvjax.cache import tier as tiers_
from kvjax.cache.quantize import named
from kvjax.generation import decode
from kvjax.generation.allocate import init_cache
from kvjax.models.decoder import Decoder
from kvjax.policies.layers import rotates_at_read
from kvjax.spec import Lengths, ModelSpec
from tests.lib import oracle
from tests.lib.matrix import ARGUMENTS, BATCH, BUDGET, STEPS, assert_close, decoder, quick, teacher

COMPOSED = ("h2o", "snapkv", "dynamickv", "adakv", "d2o")
QUICK = [("h2o", "int2"), ("snapkv", "int4"), ("adakv", "int8"), ("d2o", "int4")]


def contents(tier: tiers_.Tier, layer: int) -> tiers_.Slots:
    """Every slot of a layer."""
    view = tiers_.layer(tier, layer)
    return tiers_.take(view, jnp.broadcast_to(jnp.arange(view.capacity), (*view.length.shape, view.capacity)))


def by_position(held: tiers_.Slots, codes) -> list[dict[int, list[np.ndarray]]]:
    """For every row, the codes of each position that it holds."""
    leaves = [np.asarray(x).reshape(-1, *x.shape[2:]) for x in jax.tree.leaves(codes)]
    positions = np.asarray(held.pos).reshape(-1, held.pos.shape[-1])
    rows = enumerate(positions)
    return [{int(p): [x[i, slot] for x in leaves] for slot, p in enumerate(row) if p >= 0} for i, row in rows]


PAIRS = [
    pytest.param(method, store, marks=[] if (method, store) in QUICK else [pytest.mark.slow])
    for method in COMPOSED
    for store in ("int8", "int4", "int2")
]


@pytest.mark.parametrize(("method", "store"), PAIRS)
def test_every_choice_of_tokens_composes_with_every_store(method, store):
    """At first the dense run's tokens, encoded; later the same codes, wherever they moved."""
    model, arguments = decoder("gqa"), ARGUMENTS.get(method, {})
    dense, low = (methods.make(method, BUDGET, arguments | {"store": name}) for name in ("dense", store))
    _, exact = oracle.start(model, dense, BATCH, STEPS)
    _, before = oracle.start(model, low, BATCH, STEPS)
    assert oracle.kept_positions(model, before) == oracle.kept_positions(model, exact)
    firsts = []
    for layer in range(model.spec.num_layers):
        held, mine = contents(exact[0][0], layer), contents(before[0][0], layer)
        expected = by_position(held, low.stores[0].encode(held.k, held.v, ()))
        firsts.append(by_position(mine, (mine.k, mine.v)))
        for codes, wanted in zip(firsts[-1], expected, strict=True):
            for pos in wanted:  # packed codes differ by 1 in any place where a number lies between two codes
                same = [np.array_equal(x, y) for x, y in zip(codes[pos], wanted[pos], strict=True)]
                assert same[1] and same[2] and same[4] and same[5]  # scales and zero points
    logits, _, after = oracle.run(model, low, BATCH, teacher())
    assert np.isfinite(logits).all()
    for layer, first in enumerate(firsts):
        held = contents(after[0][0], layer)
        for codes, later in zip(first, by_position(held, (held.k, held.v)), strict=True):
            for pos in codes.keys() & later.keys() if method != "d2o" else ():  # it encodes merged slots again
                for x, y in zip(codes[pos], later[pos], strict=True):
                    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "full"])
def test_kivi_needs_all_tokens_in_order(method):
    argument = "low_store" if method == "mikv" else "store"
    with pytest.raises(InputError):
        METHODS[method](**{argument: "kivi2"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low_store": "dense"}, "must have few bits"),
        ({"importance": "recency"}, "is not one of accumulated, window"),
        ({"allocate": "pyramid"}, "is not one of uniform, from_scores, per_head"),
        ({"allocate": "from_scores"}, "set importance='window'"),
        ({"store": "int5"}, "is not one of"),
    ],
)
def test_contradictions_raise_with_a_reason(arguments, message):
    with pytest.raises(InputError, match=message):
        methods.make("mikv", None, arguments)


@functools.cache
def biased() -> Decoder:
    """As Qwen2.5: two channels of each head whose key biases are far larger than keys."""
    model = oracle.random_model(5, num_layers=2, qkv_bias=True)
    for layer in model.layers:
        bias = layer.attention.k.bias
        bias[...] = (bias[...].reshape(-1, 8) + jnp.asarray([-150.0, 0, 0, 0, 0, 0, 120, 0])).reshape(-1)
    return model


LOST = {"int8": 0.02, "int4": 0.2, "fp8": 0.1, "kivi4:8:16": 0.3}


@pytest.mark.parametrize("store", quick(LOST, ("int8", "kivi4:8:16")))
def test_large_biases_of_keys_do_not_take_the_codes(store):
    want, _, _ = oracle.run(biased(), methods.full(), BATCH, teacher())
    got, _, _ = oracle.run(biased(), methods.full(store=store), BATCH, teacher())
    assert_close(got, want, LOST[store])


def test_keys_are_rounded_before_rotation_only_if_that_spares_a_bias():
    plain, latent = decoder("gqa").spec, decoder("latent").spec
    for spec, recipe, at_read in (
        (biased().spec, methods.full(), False),
        (biased().spec, methods.full(store="int4"), True),
        (biased().spec, methods.full(store="dense/int4"), False),
        (biased().spec, methods.mikv(), False),  # balanced
        (biased().spec, methods.mikv(balance=False), True),
        (dataclasses.replace(biased().spec, qk_norm=True), methods.full(store="int4"), False),
        (plain, methods.full(store="int4"), False),
        (latent, methods.full(), True),
    ):
        assert rotates_at_read(spec, recipe) == at_read


def abstract(dtype, **heads: int) -> Decoder:
    """A decoder without weights for long prompts."""
    spec = ModelSpec(vocab_size=97, embed_dim=64, mlp_dim=64, max_position=40_000, **heads)
    return nnx.eval_shape(lambda: Decoder(spec, dtype=dtype, rngs=nnx.Rngs(0)))


def bits_per_number(store: str, width: int) -> float:
    """From the arrays of one page."""
    stored = named(store)
    pages = [codec.init(1, 1, width, jnp.bfloat16) for codec in (stored.key, stored.value)]
    return sum(8 * x.nbytes for x in jax.tree.leaves(pages)) / (2 * width)


@pytest.mark.parametrize(("high", "low", "printed"), [
    ("dense", "int2", 32.5), ("int8", "int2", 23.1), ("int4", "int2", 18.1), ("dense", "int4", 42.5),
    ("dense", "int3", 37.5), ("int8", "int4", 33.1), ("int8", "int3", 28.1), ("int4", "int4", 28.1),
])  # fmt: skip
def test_a_cache_costs_what_the_paper_prints(high, low, printed):
    """MiKV at 20% of the tokens, heads of 128, in percent of 16 bits: by the formula, and in an allocated cache."""
    share = (0.2 * bits_per_number(high, 128) + 0.8 * bits_per_number(low, 128)) / 16
    assert round(100 * share, 1) == pytest.approx(printed, abs=0.051)
    model = abstract(jnp.bfloat16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=128)
    spec = model.spec
    lengths = Lengths((10_000,), 16, 10_240)
    tiers = jax.eval_shape(lambda: init_cache(model, methods.mikv(store=high, low_store=low), lengths))[0]
    codes = sum(x.size * x.dtype.itemsize for tier in tiers for x in jax.tree.leaves((tier.k, tier.v)))
    full = 2 * spec.num_layers * spec.head_dim * 2 * (10_000 + 16)
    assert share <= codes / full <= 1.05 * share  # and the slack of ladders and pages


@pytest.mark.parametrize(("store", "percent"), [
    ("int8", 53.1), ("int4", 28.1), ("int3", 21.9), ("int2", 15.6), ("kivi4", 31.25), ("kivi2", 18.75),
])  # fmt: skip
def test_uniform_stores_cost_what_their_papers_print(store, percent):
    if store.startswith("kivi"):
        stored = named(store)
        pages = [codec.init(1, 32, 128, jnp.bfloat16) for codec in (stored.key, stored.value)]
        bits = sum(8 * x.nbytes for x in jax.tree.leaves(pages)) / (2 * 32 * 128)
    else:
        bits = bits_per_number(store, 128)
    assert 100 * bits / 16 == pytest.approx(percent, abs=0.05)


LONG = ["full int8", "full int4", "full int2", "full fp8", "full kivi2", "mikv", "mikv int8"]


@pytest.mark.parametrize("name", quick(LONG, ("full int4", "full kivi2", "mikv")))
def test_a_step_makes_no_dense_copy_of_a_row(name):
    """At 32,768 tokens the temporary memory of the compiled step is less than a tenth of the codes."""
    method, *store = name.split()
    recipe = methods.make(method, None, {"store": store[0]} if store else {})
    model = abstract(jnp.float32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=64)
    cache = jax.eval_shape(lambda: init_cache(model, recipe, Lengths((32_768,), 16, 32_768)))
    token = jax.ShapeDtypeStruct((1,), jnp.int32)
    step = jax.jit(decode.decode_step, static_argnames=("recipe",), donate_argnames=("cache",))
    memory = step.lower(model, recipe, cache, token, token).compile().memory_analysis()
    codes = sum(x.size * x.dtype.itemsize for tier in cache[0] for x in jax.tree.leaves((tier.k, tier.v)))
    assert memory.temp_size_in_bytes < 0.1 * codes


def test_the_oracle_with_a_budget_of_everything_is_the_full_cache():
    logits, positions, _ = oracle.run(decoder("gqa"), methods.oracle(budget="100%"), BATCH, teacher())
    full, everything, _ = oracle.run(decoder("gqa"), methods.full(), BATCH, teacher())
    assert positions == everything
    assert_close(logits, full, 1e-5)


def test_the_oracle_attends_to_what_full_attention_weighs_most():
    """Against brute force: the three tokens of each row with the largest mean weight over its query heads."""
    model, prompt, given = decoder("gqa"), BATCH[0], teacher()[:1]
    spec, reference = model.spec, oracle.Oracle(model)

    def everything(layer, seen):
        return [oracle.entries(seen, k, range(len(prompt))) for k in range(spec.num_kv_heads)]

    def append(layer, rows, new, q):
        for row, entry in zip(rows, new, strict=True):
            row.append(entry)

    def heaviest(layer, rows, q, pos):
        heads = []
        for row, group in zip(
            rows, reference.rotate(q, pos).reshape(spec.num_kv_heads, spec.group_size, -1), strict=True
        ):
            keys, values = (np.stack([getattr(entry, name) for entry in row]) for name in ("key", "value"))
            logits = group @ keys.T / np.sqrt(spec.head_dim)
            best = np.argsort(-oracle.softmax(logits).mean(axis=0))[:3]
            heads.append(oracle.softmax(logits[:, best]) @ values[best])
        return np.concatenate(heads), None

    reference.prefill(prompt, everything)
    logits, _, _ = oracle.run(model, methods.oracle(budget=3), [prompt], given)
    for i, token in enumerate(given[0]):
        expected = reference.decode(int(token), len(prompt) + i, append, attend=heaviest)
        assert_close(logits[i + 1, 0], expected, 1e-4)
