"""The engine: what a request gets is what it gets alone, whoever joins, leaves or is cancelled."""

import contextlib
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import Sampling, methods
from kvjax.engine import engine as engines
from kvjax.engine import reading as readings
from kvjax.engine.capacity import tiers
from kvjax.engine.request import ContextsFull, EngineError
from kvjax.errors import InputError
from kvjax.generation.model import Model
from tests.lib.matrix import VARIANTS, decoder, model_of, quick, recipe_of, text

LENGTH = 96
QUICK = ("full", "h2o int4", "dynamickv", "mikv", "full kivi2", "dmc")
HOW = (
    Sampling(),
    Sampling(1.0, seed=3),
    Sampling(0.8, top_p=0.9, repetition_penalty=1.2, seed=5),
    Sampling(presence_penalty=0.7, frequency_penalty=0.4, logit_bias=((5, 2.0), (7, -3.0))),
)
# Prompt, new tokens, how, log-probabilities.
ASKED = [
    (text(n, 7), new, HOW[i % 4], (None, 3, 0)[i % 3])
    for i, (n, new) in enumerate([(40, 9), (60, 6), (5, 20), (33, 2), (70, 12), (20, 1), (48, 16), (12, 30)])
]


@contextlib.contextmanager
def compilations():
    """Names of what is compiled."""
    names = []

    def listen(event, *_, fun_name="", **__):
        if event.startswith("/jax/core/compile/backend_compile"):
            names.append(fun_name)

    jax.monitoring.register_event_time_span_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_time_span_listener(listen)


class Watched(kvjax.Engine):
    """Checks after every turn that pages are held by whoever they were promised to."""

    def _turn(self):
        super()._turn()
        for lane in self._lanes:
            for tier, promised in zip(tiers(lane.seats.state.cache), lane.schedule.promised, strict=True):
                size = tier.free.shape[0]
                held = np.asarray(tier.table)[np.asarray(tier.table) < size]
                assert len(set(held.tolist())) == held.size == size - int(tier.num_free[0]) <= promised


def is_empty(engine):
    load = engine.load
    caches = [lane.seats.state.cache for lane in engine._lanes]
    if engine._shelf is not None:
        caches.insert(1, engine._shelf.cache)
    free = [int(tier.num_free[0]) for cache in caches for tier in tiers(cache)]
    busy = load.waiting, load.reading, load.decoding, load.contexts, *load.promised, *load.context_promised
    return not any(busy) and free == [*load.pages, *load.context_pages]


@pytest.mark.parametrize("method", quick([name for name in VARIANTS if name != "oracle"], QUICK))
def test_a_request_gets_what_it_gets_alone(method):
    model, recipe = Model(decoder(model_of(method)), None, (), "random"), recipe_of(method, "20%")
    with Watched(model, recipe, seats=3, max_length=LENGTH, stall=0.0, steps=3) as engine, compilations() as names:
        ask = lambda prompt, new, how, ranks=None: engine.submit(
            prompt, max_new_tokens=new, sampling=how, logprobs=ranks
        )
        both = [ask(*each) for each in ASKED]
        early, late = ask(text(80, 8), 10, HOW[0]), ask(text(30, 8), 60, HOW[1])
        early.cancel()  # waits, or is read
        while len(late.choices[0].tokens) < 5:
            time.sleep(0.001)
        late.cancel()
        together = [request.result()[0] for request in both]
        assert [request.result()[0].finish_reason for request in (early, late)] == ["cancelled"] * 2
        for each, found in zip(ASKED, together, strict=True):
            alone = ask(*each).result()[0]
            assert alone.tokens == found.tokens
            jax.tree.map(np.testing.assert_array_equal, alone.logprobs, found.logprobs)
        assert not names
        assert is_empty(engine)
    for (prompt, new, how, ranks), found in zip(ASKED, together, strict=True):
        out = model.generate([prompt], recipe, max_new_tokens=new, sampling=how, max_length=LENGTH, logprobs=ranks)
        assert out.sequences[0].tokens == found.tokens
        if ranks is not None:
            chosen, ids, top = out.sequences[0].logprobs
            np.testing.assert_allclose(
                found.logprobs.chosen, chosen, atol=2e-2
            )  # few bits round apart in batches of other sizes
            np.testing.assert_allclose(
                found.logprobs.top, top, atol=2e-2
            )  # few bits round apart in batches of other sizes
            assert found.logprobs.ids.shape == ids.shape == (new, ranks)


@pytest.mark.parametrize(
    "method", quick([name for name in VARIANTS if name != "oracle"], ("h2o int4", "full kivi2", "mikv"))
)
def test_contexts_answer_as_they_do_alone(method):
    """Whoever else asks this one, another one, or none; and nothing of them stays when they are forgotten."""
    model, recipe = Model(decoder(model_of(method)), None, (), "random"), recipe_of(method, "20%")
    texts = [text(60, 3), text(33, 4)]
    asked = [(i % 2, text(n, 5 + n), new, HOW[i % 4]) for i, (n, new) in enumerate([(3, 9), (20, 6), (0, 8), (1, 1)])]
    engine = Watched(model, recipe, seats=2, max_length=LENGTH, stall=0.0, steps=3, contexts=2, after_context=32)
    with engine, compilations() as names:
        kept = [engine.read(each).wait() for each in texts]
        with pytest.raises(ContextsFull):
            engine.read(texts[0])
        other = engine.submit(text(50, 9), max_new_tokens=30)
        requests = [engine.submit(q, context=kept[i], max_new_tokens=new, sampling=how) for i, q, new, how in asked]
        for each in kept:
            engine.forget(each)  # which waits for those that read it
        with pytest.raises(InputError, match="has forgotten it"):
            engine.submit([1], context=kept[0])
        found = [request.result()[0] for request in requests]
        alone = engine.submit(text(50, 9), max_new_tokens=30).result()[0]
        assert other.result()[0].tokens == alone.tokens
        again = engine.read(texts[1]).wait()
        assert (
            engine.submit(asked[1][1], context=again, max_new_tokens=6, sampling=HOW[1]).result()[0].tokens
            == found[1].tokens
        )
        engine.forget(again)
        assert not names
    engine._shelf.sweep()
    assert is_empty(engine)
    contexts = [model.read(each, recipe, max_length=LENGTH) for each in texts]
    for (i, question, new, how), out in zip(asked, found, strict=True):
        (same,) = contexts[i].ask([question], max_new_tokens=new, sampling=how).sequences
        assert (same.tokens, same.prompt_tokens) == (out.tokens, out.prompt_tokens)


def test_contexts_that_cannot_be():
    model = Model(decoder("gqa"), None, (), "random")
    with kvjax.Engine(model, seats=1, max_length=LENGTH, contexts=1, after_context=8, steps=1) as engine:
        wrong = {"is empty": ([],), "passes this engine's length": (text(LENGTH, 1),), "no budget": ([1], "20%")}
        for words, given in wrong.items():
            with pytest.raises(InputError, match=words):
                engine.read(*given)
        reading = engine.read(text(80, 1))
        with pytest.raises(InputError, match="still being read"):
            engine.submit([1], context=reading)
        engine.forget(reading)
        while engine.load.contexts:
            time.sleep(0.001)
        kept = engine.read([1, 2]).wait()
        for words, given in {
            "room after a context": {"prompt": text(6, 1), "max_new_tokens": 3},
            "has its own budget": {"prompt": [1], "budget": 3},
            "not in the vocabulary": {"prompt": [99999]},
        }.items():
            with pytest.raises(InputError, match=words):
                engine.submit(context=kept, **given)
        with pytest.raises(InputError, match="no such context"):
            engine.submit([1], context=reading)


@pytest.mark.parametrize(
    "method", quick(["h2o", "snapkv", "dynamickv", "adakv", "pyramidkv", "d2o", "tova int8/int3"], ("h2o", "dynamickv"))
)
def test_budgets_of_requests_are_those_of_generate(method):
    """Side by side, in one program; less is promised to those with less."""
    model, recipe = Model(decoder("gqa"), None, (), "random"), recipe_of(method, "50%")
    asked = [(text(70, 1), "20%"), (text(60, 2), 14), (text(64, 3), None), (text(40, 4), "40%")]
    with Watched(model, recipe, seats=4, max_length=LENGTH, stall=0.0, steps=3) as engine, compilations() as names:
        requests = [engine.submit(prompt, max_new_tokens=12, budget=budget) for prompt, budget in asked]
        found = [request.result()[0].tokens for request in requests]
        promised = [engine._main.kind.promise(70, 12, engine._main.kind.amounts(b, 70, 12)) for b in ("20%", "50%")]
        assert promised[0] < promised[1]
        with pytest.raises(InputError, match="is more than this engine's, which is 50%"):
            engine.submit(text(70, 1), budget="60%")
        assert not names and is_empty(engine)
    for (prompt, budget), tokens in zip(asked, found, strict=True):
        recipe = recipe_of(method, budget or "50%")
        assert model.generate([prompt], recipe, max_new_tokens=12, max_length=LENGTH).sequences[0].tokens == tokens


def test_requests_of_very_different_lengths_have_one_shape():
    model = Model(decoder("gqa"), None, (), "random")
    with Watched(model, recipe_of("snapkv", "20%"), seats=2, max_length=128) as engine:
        asked = [(text(3, 1), 120), (text(120, 1), 4), (text(60, 1), 1)]
        requests = [engine.submit(prompt, max_new_tokens=new) for prompt, new in asked]
        assert [len(request.result()[0].tokens) for request in requests] == [120, 4, 1]


@pytest.mark.parametrize(
    ("method", "arguments", "prompt"),
    [("snapkv", {"decode_budget": "16", "window": 4}, 70), ("pyramidkv", {"decode_budget": "20%", "window": 8}, 118)],
)
def test_promises_are_those_of_the_lengths_themselves(method, arguments, prompt):
    model, recipe = Model(decoder("gqa"), None, (), "random"), methods.make(method, "20%", arguments)
    with Watched(model, recipe, seats=2, max_length=128) as engine:
        assert len(engine.submit(text(prompt, 1), max_new_tokens=8).result()[0].tokens) == 8


def test_what_a_method_cannot_keep_is_refused_and_others_go_on():
    model, recipe = Model(decoder("gqa"), None, (), "random"), methods.make("d2o", "60%", {"full_layers": "0"})
    with Watched(model, recipe, seats=2, max_length=128) as engine:
        other = engine.submit(text(60, 1), max_new_tokens=60)
        with pytest.raises(InputError, match="full layers"):
            engine.submit(text(5, 1), max_new_tokens=4)
        assert len(other.result()[0].tokens) == 60


def test_a_prompt_that_cannot_be_read_again_is_refused():
    model = Model(decoder("gqa"), None, (), "random")
    with Watched(model, recipe_of("kvzip", "20%"), seats=1, max_length=128) as engine:
        assert len(engine.submit(text(60, 1), max_new_tokens=2).result()[0].tokens) == 2
        with pytest.raises(InputError, match="reads the 126 tokens of a prompt again"):
            engine.submit(text(126, 1), max_new_tokens=1)


def test_a_small_pool_makes_requests_wait():
    model = Model(decoder("gqa"), None, (), "random")
    whole = kvjax.Engine(model, seats=4, max_length=LENGTH)
    whole.close()
    with Watched(model, seats=4, max_length=LENGTH, cache=whole.cache_bytes // 2, stall=0.0, steps=2) as engine:
        assert engine.cache_bytes <= whole.cache_bytes // 2
        requests = [engine.submit(text(n, 3), max_new_tokens=20) for n in (70, 60, 50, 75, 40)]
        assert [len(request.result()[0].tokens) for request in requests] == [20] * 5
        assert is_empty(engine)
    with pytest.raises(InputError, match="one sequence of the largest length needs"):
        kvjax.Engine(model, max_length=LENGTH, cache=1000)


@pytest.fixture(scope="module")
def engine():
    with kvjax.Engine(kvjax.load(), "h2o", "20%", seats=3, max_length=200, steps=4, queue=4) as engine:
        yield engine


def test_text_comes_in_pieces(engine):
    request = engine.submit("river: 217 130\nriver:", max_new_tokens=12)
    pieces = list(request)
    (out,) = request.result()
    assert "".join(pieces) == out.text == engine.model.tokenizer.decode(out.tokens)
    alone = engine.model.generate(["river: 217 130\nriver:"], "h2o", "20%", max_new_tokens=12)
    assert (out.tokens, out.finish_reason) == (alone.sequences[0].tokens, alone.sequences[0].finish_reason)


def test_choices_are_those_of_their_seeds(engine):
    ask = lambda seed, n: engine.submit([5, 6, 7], max_new_tokens=8, sampling=Sampling(1.0, seed=seed), n=n).result()
    both = [choice.tokens for choice in ask(3, 2)]
    assert both == [ask(seed, 1)[0].tokens for seed in (3, 4)] and both[0] != both[1]


def test_a_text_ends_by_itself_or_is_made_to_go_on(engine):
    stop = engine.submit([1, 2, 3], max_new_tokens=8).result()[0].tokens[3]
    model = engine.model
    with kvjax.Engine(
        Model(model.decoder, model.tokenizer, (stop,), "stops"), "h2o", "20%", seats=1, max_length=200
    ) as other:
        ended = other.submit([1, 2, 3], max_new_tokens=8).result()[0]
        assert ended.finish_reason == "stop" and ended.tokens[-1] == stop and len(ended.tokens) <= 4
        assert len(other.submit([1, 2, 3], max_new_tokens=8, ignore_stop=True).result()[0].tokens) == 8


def test_what_cannot_be_is_refused(engine):
    for words, given in {
        "the prompt is empty": {"prompt": []},
        "pass this engine's length": {"prompt": [1] * 190, "max_new_tokens": 11},
        "max-new-tokens": {"prompt": [1], "max_new_tokens": 0},
        "top-p": {"prompt": [1], "sampling": Sampling(top_p=0)},
        "n 0 is not": {"prompt": [1], "n": 0},
        "need 4 seats": {"prompt": [1], "n": 4},
        "not in the vocabulary": {"prompt": [99999]},
    }.items():
        with pytest.raises(InputError, match=words):
            engine.submit(**given)
    for words, given in {"seats": {"seats": 0}, "stall": {"stall": -1.0}, "max-length": {"max_length": 1}}.items():
        with pytest.raises(InputError, match=words):
            kvjax.Engine(engine.model, **given)
    assert is_empty(engine)


def test_a_full_queue_is_said(engine):
    requests = [engine.submit([1] * 100, max_new_tokens=90, ignore_stop=True) for _ in range(3)]
    with pytest.raises(InputError, match="are waiting: try again later"):
        for _ in range(20):
            requests.append(engine.submit([1] * 100, max_new_tokens=90, ignore_stop=True))
    for request in requests:
        request.cancel()
    assert {out.finish_reason for request in requests for out in request.result()} <= {"cancelled", "length"}


def test_a_long_layer_stops_nobody(engine, monkeypatch):
    """Nor does who is cancelled while it is read wait for it."""
    held, goes_on, read = threading.Event(), threading.Event(), readings._next
    running = engine.submit([1, 2, 3], max_new_tokens=150, ignore_stop=True)
    while not running.choices[0].tokens:
        time.sleep(0.001)
    monkeypatch.setattr(readings, "_next", lambda parts: (held.set(), goes_on.wait(), read(parts))[-1])
    gone, later = (engine.submit([4, i], max_new_tokens=2) for i in (5, 6))
    assert held.wait(60) and not running.done
    gone.cancel()
    assert len(running.result()[0].tokens) == 150 and gone.result()[0].finish_reason == "cancelled"
    assert not later.done
    goes_on.set()
    assert len(later.result()[0].tokens) == 2


def test_listeners_are_told(engine):
    told = threading.Event()
    request = engine.submit([1, 2], max_new_tokens=5)
    request.listen(told.set)
    request.result()
    assert told.wait(10)


def test_damaged_weights_end_a_request_and_a_failure_all(monkeypatch):
    model = Model(decoder("gqa"), None, (), "random")
    engine = kvjax.Engine(model, seats=2, max_length=LENGTH)
    nans = jax.tree.map(lambda x: x * jnp.nan if x.dtype == jnp.float32 else x, decoder("gqa"))
    monkeypatch.setattr(engine, "model", Model(nans, None, (), "damaged"))
    with pytest.raises(InputError, match="not finite"):
        engine.submit([1, 2, 3], max_new_tokens=4).result()
    assert is_empty(engine)
    monkeypatch.setattr(engine, "model", model)

    def fail(*_, **__):
        raise MemoryError("none is left")

    running = engine.submit([1, 2, 3], max_new_tokens=80)
    monkeypatch.setattr(engines.programs, "steps", fail)
    with pytest.raises(EngineError, match="MemoryError: none is left"):
        running.result()
    with pytest.raises(EngineError):
        engine.submit([1])
    engine.close()


def test_closing_lets_requests_end():
    engine = kvjax.Engine(Model(decoder("gqa"), None, (), "random"), seats=1, max_length=LENGTH)
    requests = [engine.submit([1, 2], max_new_tokens=5) for _ in range(3)]
    engine.close(drain=60.0)
    assert [len(request.result()[0].tokens) for request in requests] == [5] * 3
    with pytest.raises(EngineError, match="it was closed"):
        engine.submit([1])
