"""The laws of whole generations, for every method: compiled once, on the device, within the bytes asked for."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import METHODS, InputError, Model, Sampling, methods
from kvjax.cache import layout
from kvjax.generation import decode, sampling
from kvjax.models.decoder import Decoder
from kvjax.policies.base import Recipe
from tests.lib import matrix, oracle
from tests.lib.matrix import (
    BATCH,
    BUDGET,
    EVICTING,
    STEPS,
    assert_close,
    decoder,
    describe,
    every_method,
    model_of,
    quick,
    recipe_of,
    small_budget,
    text,
    tiers_of,
)


@contextmanager
def traced_functions() -> Iterator[list[str]]:
    """Names of the functions that JAX traces meanwhile."""
    names: list[str] = []

    def listen(event: str, start_time: float, end_time: float, **about: str | int) -> None:
        if event == "/jax/core/compile/jaxpr_trace_duration":
            names.append(str(about.get("fun_name")))

    jax.monitoring.register_event_time_span_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_time_span_listener(listen)


CHUNK, CHUNKS = 3, 3


def loop(model: Decoder, recipe: Recipe, prompts, stop: int) -> tuple[np.ndarray, layout.Cache]:
    """Tokens `[B 1 + CHUNKS x CHUNK]` of the compiled loop, which must keep its shapes and stay on the device."""
    chooser = sampling.chooser(Sampling(), len(prompts))
    ends = decode.ends([stop], 1 + CHUNK * CHUNKS, len(prompts))
    logits, cache = oracle.start(model, recipe, prompts, 1 + CHUNK * CHUNKS)
    length = jnp.asarray([len(p) for p in prompts], jnp.int32)
    state = decode.first_token(logits, cache, length, chooser, ends, jnp.zeros(logits.shape, bool))
    before, tokens = describe(state), [state.token[:, None] + 0]
    for _ in range(CHUNKS):
        with jax.transfer_guard("disallow"):
            state, chunk, _ = decode.decode_loop(model, state, chooser, ends, recipe=recipe, chunk=CHUNK)
        assert describe(state) == before
        tokens.append(chunk)
    return np.concatenate(tokens, axis=1), jax.device_get(state.cache)


@every_method
def test_the_loop_is_traced_once_and_stops_by_sequence(method):
    model, recipe = decoder(model_of(method)), recipe_of(method, BUDGET)
    with traced_functions() as names:
        tokens, first = loop(model, recipe, BATCH, stop=-1)
        _, second = loop(model, recipe, [text(39, 2), text(29, 2), text(25, 2)], stop=-1)
        assert (tokens >= 0).all()
        assert tokens[:, :STEPS].tolist() == small_budget(model_of(method), method).tokens.tolist()
        stop = int(tokens[0, 4])
        stopped, cache = loop(model, recipe, BATCH, stop)
    shapes = [[leaf.shape for leaf in jax.tree.leaves(cache)] for cache in (first, second)]
    assert shapes[0] == shapes[1] or recipe.policy.pool_hooks.shrink is not None  # cut to what a prompt has filled
    assert names.count("decode_loop") == (1 if shapes[0] == shapes[1] else 2)
    for b, row in enumerate(tokens.tolist()):
        end = row.index(stop) + 1 if stop in row else len(row)
        assert stopped[b].tolist() == row[:end] + [-1] * (len(row) - end)
        if method == "full":  # the stop token itself is never read
            read = len(BATCH[b]) + min(end - 1, CHUNK * CHUNKS)
            assert all((tier.length[:, b] == read).all() for tier in tiers_of(cache))


@pytest.mark.parametrize("method", quick([x for x in EVICTING if x in METHODS], ("streaming_llm", "adakv", "d2o")))
def test_a_fifth_of_the_prompt_is_a_fifth_of_the_bytes(method):
    network = oracle.with_gates(oracle.random_model(1, dtype=jnp.bfloat16, num_layers=2, head_dim=32))
    model = Model(network, None, (), "random")
    out = model.generate([text(1500, 0)], methods.make(method, "20%"), max_new_tokens=16)
    budget = out.recipe.budget
    tables = (
        0 if budget is None or budget.max_slots is None else out.bytes.tables
    )  # wide where any row may be the longest
    assert out.bytes.total - out.bytes.statistics - tables <= 0.22 * out.full_bytes
    assert out.bytes.total == sum(x.nbytes for x in jax.tree.leaves(out.cache))


@every_method
def test_extreme_prompts(method):
    """One token, far more than the budget, and up to the context limit."""
    recipe, network = recipe_of(method, BUDGET), decoder(model_of(method))
    model, limit, new = Model(network, None, (), "random"), network.spec.max_position, 4
    longest = limit if recipe.positions is not None else limit - new
    out = model.generate([[5], text(longest, 0)], recipe, max_new_tokens=new)
    assert [len(s.tokens) for s in out.sequences] == [new, new]
    assert all(0 <= token < network.spec.vocab_size for s in out.sequences for token in s.tokens)
    assert np.isfinite(out.logits).all()
    exact = recipe.policy.prompt_hooks.rewrite is None  # else tokens merge or leave within a prompt
    if exact:
        assert_close(out.logits[1], matrix.reference(network, text(longest, 0))[-1], 1e-5)
    if exact and all(store.is_dense for store in recipe.stores):  # the short one is never compressed
        tokens = [5]
        for _ in range(new):
            tokens.append(int(matrix.reference(network, tokens)[-1].argmax()))
        assert out.sequences[0].tokens == tokens[1:]
    with pytest.raises(InputError, match="context limit"):
        model.generate([text(longest + 1, 0)], recipe, max_new_tokens=new)
