"""After one warm-up nothing is compiled: lengths, budgets, new tokens and ways of sampling are data."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
import pytest

import kvjax
from kvjax import InputError, Model, Sampling
from tests.lib.oracle import random_model

TOTAL, NEW = 2048, 200
METHODS = ("full", "streaming_llm", "h2o", "snapkv+window=8", "dynamickv+window=8", "mikv")
BUDGETS = {"5%": (100, "5.4%"), "20%": (400, "19%"), "60%": (1200, "57%")}  # warmed up with, and near it
SAMPLED = Sampling(0.8, top_k=20, top_p=0.9, repetition_penalty=1.1, seed=3)


@contextlib.contextmanager
def compiling() -> Iterator[list[str]]:
    """What is compiled meanwhile, one entry for each program."""
    found: list[str] = []

    def listen(event: str, duration: float, **more: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(str(more.get("fun_name", event)))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(random_model(5, num_layers=2, max_position=8192), None, (), "random")


def texts(rng: np.random.Generator, lengths: list[int]) -> list[list[int]]:
    return [rng.integers(0, 90, n).tolist() for n in lengths]


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_compiled_after_a_warm_up(model: Model, method: str) -> None:
    rng = np.random.default_rng(0)
    budgets = [None] if method == "full" else list(BUDGETS)
    for budget in budgets:
        assert model.warm_up(method, budget, max_length=TOTAL, max_new_tokens=NEW) > 0
    with compiling() as found:
        for i, prompt in enumerate(texts(rng, rng.integers(10, 1800, 20).tolist())):
            budget = budgets[i % len(budgets)]
            near = budget if budget is None else BUDGETS[budget][i % 2]
            new, sampling = (3, 30, NEW)[i % 3] if i < 6 else 3, SAMPLED if i % 2 else None
            out = model.generate(
                [prompt], method, near, max_new_tokens=new, sampling=sampling, max_length=TOTAL
            )  # fmt: skip
            assert out.sequences[0].finish_reason == "length"
    assert found == []


def test_a_conversation_compiles_nothing_after_its_first_turn(model: Model) -> None:
    rng, talk = np.random.default_rng(1), []
    with compiling() as found:
        for turn, said in enumerate(texts(rng, [30, 200, 500, 700])):
            out = model.generate([talk + said], "h2o", "20%", max_new_tokens=20, max_length=TOTAL)
            talk += said + out.sequences[0].tokens
            if turn == 0:
                found.clear()
    assert found == []


@pytest.mark.parametrize("method", ["full", "h2o", "snapkv+window=8", "pyramidkv+window=8", "d2o", "mikv"])
def test_a_total_length_changes_no_token(model: Model, method: str) -> None:
    prompts = texts(np.random.default_rng(2), [300, 41])
    budget = None if method == "full" else "30%"
    exact = model.generate(prompts, method, budget, max_new_tokens=12)
    roomy = model.generate(prompts, method, budget, max_new_tokens=12, max_length=TOTAL)
    assert [s.tokens for s in roomy.sequences] == [s.tokens for s in exact.sequences]
    assert roomy.slots == exact.slots
    assert roomy.bytes.total > exact.bytes.total
    assert roomy.full_bytes == 2 * TOTAL * model.spec.num_layers * 2 * model.spec.num_kv_heads * model.spec.head_dim * 4
    np.testing.assert_allclose(roomy.logits, exact.logits, rtol=1e-4, atol=1e-5)


def test_a_total_length_that_cannot_be_is_refused(model: Model) -> None:
    with pytest.raises(InputError, match=r"max-length 100000 is not a whole number from 2 to the context limit 8192"):
        model.generate([[1]], max_length=100000)
    with pytest.raises(
        InputError, match=r"prompt \(60 tokens\) and max-new-tokens \(5\) pass max-length \(64\): .* 65"
    ):
        model.generate([[1] * 60], max_new_tokens=5, max_length=64)
    with pytest.raises(InputError, match="max-length True"):
        model.warm_up(max_length=True)


def test_lengths_are_rungs() -> None:
    assert [kvjax.padded_length(n) for n in (1, 64, 65, 256, 257, 1025, 4097)] == [64, 64, 256, 256, 1024, 2048, 8192]
