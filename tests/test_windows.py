"""Layers with sliding windows: no row holds more than its window, and what nobody can read decides nothing."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import methods
from kvjax.attention.prompt import prefill_attention
from kvjax.attention.prompt_scores import window_sums
from kvjax.cache import layout
from kvjax.errors import InputError
from kvjax.generation import decode, prefill
from kvjax.generation.accounting import full_bytes
from kvjax.generation.generate import cached_positions
from kvjax.generation.model import Model
from kvjax.plan import dry_run
from kvjax.policies.base import PromptHooks, Recipe
from kvjax.spec import Lengths, ModelSpec, Prompt
from tests.lib import matrix, oracle
from tests.test_methods import append, best, grouped

WINDOW, PROMPTS, STEPS, LONG = 12, (60, 30, 7), 20, 10**9
GEMMA: dict[str, Any] = dict(
    vocab_size=262144, embed_dim=640, num_layers=18, num_heads=4, num_kv_heads=1, head_dim=256, mlp_dim=2048
)
GEMMA |= dict(max_position=32768, windows=tuple(None if i % 6 == 5 else 512 for i in range(18)), tie_embeddings=True)
GATES = {"dmc": matrix.MODELS["gated"]["gate"], "dms": matrix.MODELS["gated-dms"]["gate"]}


@functools.cache
def model(*windows: int | None, gate: str | None = None):
    gates = {} if gate is None else {"gate": GATES[gate]}
    return oracle.random_model(5, num_layers=len(windows), windows=windows, **gates)


def prompts() -> list[list[int]]:
    return [matrix.text(n, 1) for n in PROMPTS]


def teacher() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 97, (len(PROMPTS), STEPS))


def is_full(decoder, recipe: Recipe, tolerance: float = 1e-5) -> list:
    """The positions that a method keeps whose logits are those of a forward pass without a cache."""
    logits, positions, _ = oracle.run(decoder, recipe, prompts(), teacher())
    for b, prompt in enumerate(prompts()):
        whole = matrix.reference(decoder, [*prompt, *teacher()[b].tolist()])[len(prompt) - 1 :]
        matrix.assert_close(logits[:, b], whole, tolerance)
    return positions


def readable(positions: list, layer: int, window: int) -> None:
    """Rows of a layer hold tokens only that the next query, or the one that was last, can read."""
    for step, batch in enumerate(positions):
        for n, layers in zip(PROMPTS, batch, strict=True):
            for row in layers[layer]:
                assert len(row) <= window and min(row) >= n + step - window


LARGE = {"full": None, "h2o": 500, "tova": 500, "snapkv": 500, "dynamickv": 500, "d2o": 500, "mikv": 500}


@pytest.mark.parametrize("name", matrix.quick(LARGE, ("full", "snapkv", "mikv")))
@pytest.mark.parametrize("windowed", ["whole", "compressed"])
def test_a_window_is_never_exceeded_and_loses_nothing_that_can_be_read(name, windowed):
    recipe = methods.make(name, LARGE[name], {"windowed": windowed})
    readable(is_full(model(WINDOW, None), recipe), 0, WINDOW)


@pytest.mark.parametrize("name", matrix.quick(("h2o", "tova", "adakv", "pyramidkv", "d2o", "mikv"), ("d2o",)))
def test_a_budget_is_of_what_a_layer_can_read(name):
    """Half of what the next token can read is kept, and no token that has left the window."""
    budget, arguments = ("50%", {"window": 3} if name in matrix.ARGUMENTS else {})
    recipe = methods.make(name, budget, arguments)
    _, positions, cache = oracle.run(model(WINDOW, WINDOW), recipe, prompts(), teacher())
    for layer in range(2):
        readable(positions, layer, WINDOW)
    rows = [row for layers in positions[0] for layer in layers for row in layer]
    if name != "mikv":  # which demotes
        mean = sum(map(len, rows)) / len(rows)
        assert mean == np.mean([max(n // 2, 1) for n in (WINDOW - 1, WINDOW - 1, 7)])
    assert all(tier.capacity <= 16 for tier in matrix.tiers_of(cache))


def test_merging_spares_tokens_that_can_be_read():
    """D2O where the window is always kept: nothing that can be read is evicted, so nothing may be merged into it."""
    recipe = methods.d2o(budget=36)
    positions = is_full(model(6, 6), recipe)
    readable(positions, 0, 6)


def test_a_share_of_the_oracle_is_of_the_window():
    """Half of a window of 12 are 6 tokens, however many slots its pages have."""
    decoder, prompt = model(WINDOW), matrix.text(40, 1)
    got, _, cache = oracle.run(decoder, methods.oracle(budget="50%"), [prompt, [1, 2, 3]], teacher()[:2])
    assert cache[0][0].capacity != WINDOW
    reference = oracle.Oracle(decoder)

    def insert(layer: int, rows: oracle.Rows, new: list, q: np.ndarray) -> None:
        for row, entry in zip(rows, new, strict=True):
            row[:] = [e for e in row if e.pos > entry.pos - WINDOW] + [entry]

    def attend(layer: int, rows: oracle.Rows, q: np.ndarray, pos: int) -> tuple[np.ndarray, None]:
        heads = []
        for row, group in zip(rows, reference.rotate(q, pos).reshape(2, 2, -1), strict=True):
            logits = reference.logits(group @ np.stack([e.key for e in row]).T)
            chosen = best(oracle.softmax(logits).mean(0), min(WINDOW, pos + 1) // 2)
            heads.append(oracle.softmax(logits[:, chosen]) @ np.stack([row[i].value for i in chosen]))
        return np.concatenate(heads), None

    for b, text in enumerate((prompt, [1, 2, 3])):
        rows = [range(len(text))] * 2
        whole = lambda layer, seen, rows=rows: [oracle.entries(seen, k, row) for k, row in enumerate(rows)]
        expected = [reference.prefill(text, whole)]
        for step, token in enumerate(teacher()[b]):
            expected.append(reference.decode(int(token), len(text) + step, insert, None, attend))
        matrix.assert_close(got[:, b], np.stack(expected), 1e-5)


@pytest.mark.parametrize("windowed", ["whole", pytest.param("compressed", marks=pytest.mark.slow)])
def test_h2o_follows_its_definition(windowed):
    """Against loops over float64 numbers."""
    decoder, budget, prompt = model(WINDOW, None), 8, matrix.text(40, 1)
    recipe = methods.make("h2o", budget, {"windowed": windowed})
    got, kept, _ = oracle.run(decoder, recipe, [prompt], teacher()[:1])
    windows, newest = decoder.spec.windows, budget // 2
    reference = oracle.Oracle(decoder)

    def shrink(layer: int, row: list, now: int) -> list:
        row = [e for e in row if windows[layer] is None or e.pos > now - WINDOW]
        if len(row) <= budget or (windows[layer] is not None and windowed == "whole"):
            return row
        old, new = row[: len(row) - newest], row[len(row) - newest :]
        return [old[i] for i in sorted(best(np.array([e.stat for e in old]), budget - newest))] + new

    def select(layer: int, seen: oracle.LayerPrompt) -> oracle.Rows:
        sums, rows = grouped(seen.probs.sum(axis=1), 2), [oracle.entries(seen, k, range(len(prompt))) for k in range(2)]
        for row, column in zip(rows, sums, strict=True):
            for entry, total in zip(row, column, strict=True):
                entry.stat = float(total)
        return [shrink(layer, row, len(prompt)) for row in rows]

    logits = [reference.prefill(prompt, select)]
    for step, token in enumerate(teacher()[0]):
        now = len(prompt) + step

        def observe(layer: int, rows: oracle.Rows, probs: list[np.ndarray], now: int = now) -> None:
            for row, p in zip(rows, probs, strict=True):
                for entry, weight in zip(row, p.mean(axis=0), strict=True):
                    entry.stat += float(weight)
                row[:] = shrink(layer, row, now + 1)

        logits.append(reference.decode(int(token), now, append, observe))
        for layer, rows in enumerate(reference.rows):
            held = [sorted(e.pos for e in row) for row in rows]
            ours = [
                [p for p in row if windows[layer] is None or p > now + 1 - WINDOW] for row in kept[step + 1][0][layer]
            ]
            assert ours == held
    matrix.assert_close(got[:, 0], np.stack(logits), 1e-5)


UNBOUNDED = {"full kivi2": ("full", {"store": "kivi2:8:8"}, (40,)), "full int4": ("full", {"store": "int4"}, (WINDOW,))}
ROOM = {"capacity": 500}  # so that nothing is refused
UNBOUNDED |= {name: (name, ROOM, (WINDOW,)) for name in GATES} | {
    "dmc int4": ("dmc", {"store": "int4"} | ROOM, (WINDOW,))
}


@pytest.mark.parametrize("name", matrix.quick(UNBOUNDED, ("full kivi2", "dmc int4", "dms")))
def test_slots_are_used_again_without_a_trace(name):
    """What a window reads is the same where no slot is ever given to another token."""
    method, arguments, windows = UNBOUNDED[name]
    decoder = model(*windows, gate=method if method in GATES else None)
    recipe = methods.make(method, None, arguments)
    plain = recipe.policy
    no_window = lambda x: x._replace(window=None)
    endless = plain._replace(
        windowed=None,
        init=lambda spec, layers, *rest: plain.init(spec, no_window(layers), *rest),
        prefill=lambda tiers, prompt: plain.prefill(tiers, no_window(prompt)),
        insert=lambda tiers, token: plain.insert(tiers, no_window(token)),
    )
    if rewrite := plain.prompt_hooks.rewrite:
        hooks = PromptHooks(lambda *x: rewrite(x[0], x[1], x[2], x[3], x[4], None, x[6]))
        endless = endless._replace(prompt_hooks=hooks)
    got, _, cache = oracle.run(decoder, recipe, prompts(), teacher())
    expected, _, longer = oracle.run(decoder, Recipe(name, endless), prompts(), teacher())
    matrix.assert_close(got, expected, 1e-5)
    slots = lambda cache: sum(tier.free.shape[0] * tier.page for tier in matrix.tiers_of(cache))
    assert slots(cache) < slots(longer)


def test_codes_of_tokens_that_the_ring_still_has_do_not_count():
    decoder, recipe = model(WINDOW, None), methods.full(store="kivi2:8:8")
    out = Model(decoder, None, (), "").generate([matrix.text(40, 1), [1, 2, 3, 4, 5]], recipe, max_new_tokens=6)
    rows = cached_positions(Model(decoder, None, (), ""), out)
    held = [[[len(set(row) - {-1}) for row in heads] for heads in layers] for layers in rows.tolist()]
    assert np.asarray(held).mean(-1).tolist() == out.slots == [[21, 45], [10, 10]]
    tiers = matrix.tiers_of(out.cache)
    slot = [sum(x.nbytes for x in jax.tree.leaves((t.k, t.v))) / (t.free.shape[0] * t.page) for t in tiers]
    assert out.bytes.payload < sum(map(sum, out.slots)) * decoder.spec.num_kv_heads * max(slot)


def transformers_bytes(spec: ModelSpec, tokens: int, itemsize: int) -> int:
    """Of `DynamicCache`, whose sliding layers hold one token less than the window."""
    held = [min(tokens, (window or LONG) - 1) for window in spec.windows]
    return 2 * spec.num_kv_heads * spec.head_dim * itemsize * sum(held)


def test_a_gemma_cache_costs_what_it_must():
    """1,501 prompt tokens and 16 more, in float32."""
    spec = ModelSpec(**GEMMA)
    shape = dry_run.without_weights(spec, jnp.float32, None, "gemma")
    theirs = transformers_bytes(spec, 1517, 4)
    assert round(theirs / 1e6, 1) == 25.0
    assert theirs <= full_bytes(shape, [1517]) <= 1.01 * theirs
    total = lambda name, budget, **arguments: (
        dry_run.cache_size(
            shape, methods.make(name, budget, arguments), Lengths((1501,), 16, prefill.padded_length(1501))
        ).bytes.total
    )
    assert total("full", None) <= 1.05 * theirs
    slot, appends = 2 * 256 * 4, ("snapkv", "pyramidkv", "adakv", "dynamickv")
    for name in ("streaming_llm", "h2o", "tova", "d2o", *appends):
        new = 16 if name in appends else 1
        whole = slot * (15 * 512 + 3 * (1501 // 5 + new))
        share = slot * (15 * (511 // 5 + new) + 3 * (1501 // 5 + new))
        assert total(name, "20%", windowed="whole") <= 1.05 * whole, name
        pages = 1.05 if name not in ("d2o", "adakv", "dynamickv", "pyramidkv") else 1.1  # rows of different lengths
        assert total(name, "20%") <= pages * share, name


def test_a_window_of_scores_is_as_long_as_the_prompt():
    """SnapKV with a window beyond it: no row of scores is computed for a query that is not there."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    q, k = draw(1, 60, 4, 8), draw(1, 60, 2, 8)
    length = jnp.asarray([50], jnp.int32)
    _, lse = prefill_attention(q, k, k, length, scale=1.0)
    prompt = Prompt(q, k, k, k, k, lse, length, 0, 1, None, 1.0)
    sums = lambda size: window_sums(prompt, size)
    np.testing.assert_allclose(sums(1_000_000), sums(50), rtol=1e-5)
    largest = max(v.aval.size for eqn in jax.make_jaxpr(lambda: sums(1_000_000))().eqns for v in eqn.outvars)
    assert largest <= 4 * 60 * 60


def test_what_becomes_of_windows_is_said_by_name():
    with pytest.raises(InputError, match="windowed=all is not one of compressed, whole"):
        methods.make("h2o", 8, {"windowed": "all"})
    recipe = methods.make("dmc", None, {"windowed": "whole"})
    with pytest.raises(InputError, match="the model decides in layers with a sliding window"):
        oracle.start(model(WINDOW, None, gate="dmc"), recipe, prompts(), 1)


@pytest.mark.parametrize("more", [{}, pytest.param({"decode_budget": 20}, marks=pytest.mark.slow)], ids=str)
def test_places_in_a_window_are_no_more_than_it_has(more):
    """StreamingLLM by places in the cache: sinks stay, the newest tokens are there, and no budget passes the window."""
    recipe = methods.make("streaming_llm", 8 if more else 500, more)
    _, positions, _ = oracle.run(model(WINDOW, WINDOW), recipe, prompts(), teacher())
    for step, batch in enumerate(positions):
        for n, layers in zip(PROMPTS, batch, strict=True):
            for row in (row for rows in layers for row in rows):
                assert len(row) <= WINDOW and row[-1] == n + step - 1 and row[:4] == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "full int8", "h2o"])
def test_two_thousand_tokens(name):
    """Against a forward pass over everything; int8 is as far from it as its codes are coarse."""
    decoder, n, steps = model(WINDOW, None), 50, 2000
    tokens = matrix.text(n + steps, 4)
    method, _, store = name.partition(" ")
    recipe = methods.make(method, 4000 if method == "h2o" else None, {"store": store} if store else {})
    logits, cache = oracle.start(decoder, recipe, [tokens[:n]], steps)
    given = jnp.asarray([tokens[n:]], jnp.int32)
    measure = lambda decoder, x, entry: decoder.logits(x)
    numbers = (jnp.asarray([n], jnp.int32), jnp.asarray([steps], jnp.int32))
    _, cache, got = decode.feed(decoder, cache, logits, given, *numbers, (), recipe=recipe, measure=measure)
    whole = matrix.reference(decoder, tokens)[n:]
    matrix.assert_close(np.asarray(got[:, 0]), whole, 5e-2 if store else 2e-5)
    (window, *_), *_ = cache
    assert int(window.length.max()) <= WINDOW and window.capacity <= 16
    assert layout.layer_groups(decoder.spec)[0].window == WINDOW
