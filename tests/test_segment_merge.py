"""Running means of segments in every implementation, against loops in float64 numpy, and their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import methods
from kvjax.errors import say_once
from kvjax.retrofit import objective
from kvjax.spec import Gate, GateSpec
from pallas_kernels.segment_merge import pool, tpu
from tests.lib import oracle
from tests.lib.brute_gate import gated_model, tokens
from tests.lib.strict import STRICT

XLA = functools.partial(pool, implementation="xla")
INTERPRETED = functools.partial(pool, implementation="interpret")
TPU = functools.partial(tpu.pool, block=256, interpret=True)
kernel = pytest.mark.parametrize("run", [INTERPRETED, TPU], ids=["gpu", "tpu"])
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def vectors(t, heads, n, dtype=jnp.float32):
    """Arguments of `pool`: in each head other shares of decisions that are 0, 1, nearly so and between them."""
    rng = np.random.default_rng(t + heads + n)
    x, weight = rng.normal(size=(1, t, heads, n)) + 0.5, rng.random((1, t, heads)) + 0.1
    merge = (rng.random((1, t, heads)) < np.linspace(1, 0.3, heads)).astype(float)
    merge[..., 1::2] = (1 / (1 + np.exp(20 * rng.normal(size=merge.shape) - 10)))[..., 1::2]
    return jnp.asarray(x, dtype), jnp.asarray(merge, jnp.float32), jnp.asarray(weight, jnp.float32)


def mean(x, merge, weight, window):
    """What DMC says, one token of the window at a time."""
    x, merge, weight = (np.asarray(y, np.float64) for y in (x, merge, weight[..., None]))
    top, bottom, carried = weight * x, weight.copy(), np.ones(weight.shape)
    for by in range(1, min(window or x.shape[1], x.shape[1])):
        carried[:, by:] = carried[:, by:] * merge[:, 1 : merge.shape[1] - by + 1, :, None]
        top[:, by:] += (carried * np.roll(weight * x, by, axis=1))[:, by:]
        bottom[:, by:] += (carried * np.roll(weight, by, axis=1))[:, by:]
    return top / bottom


def results(run, window, inputs, weights):
    """The means, and the gradients of a weighted sum of them."""

    @jax.jit
    def means(*inputs):
        y, pull = jax.vjp(functools.partial(run, window=window), *inputs)
        return y, *pull(weights)

    return means(*inputs)


def agree(run, window, *args):
    """Whether means are those of loops and gradients those of the reference, relative to the largest of each."""
    inputs = vectors(*args)
    weights = jnp.asarray(np.random.default_rng(3).normal(size=inputs[0].shape), inputs[0].dtype)
    bound = 1e-5 if inputs[0].dtype == jnp.float32 else 2e-2
    got, reference = results(run, window, inputs, weights), results(XLA, window, inputs, weights)
    for y, like, want in zip(got, reference, (mean(*inputs, window), *reference[1:]), strict=True):
        want = np.asarray(want, np.float64)
        assert y.dtype == like.dtype
        np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=0, atol=bound * max(1.0, np.abs(want).max()))


@kernel
@pytest.mark.parametrize("window", [0, 12, slow(1), slow(3), slow(32)])
def test_means_are_those_of_loops_and_gradients_those_of_the_reference(run, window):
    agree(run, window, 301, 2, 16)


@kernel
@pytest.mark.parametrize("t, heads, n, dtype", [(64, 1, 96, jnp.float32), (7, 4, 128, jnp.bfloat16)])
@pytest.mark.parametrize("window", [3, slow(0), slow(12)])
def test_lengths_widths_and_dtypes(run, window, t, heads, n, dtype):
    agree(run, window, t, heads, n, dtype)


@pytest.mark.parametrize("window", [5, slow(0)])
def test_gradients_are_those_of_finite_differences(window):
    """In float64, which the interpreter has; a sum of decisions that are 0 among others."""
    with jax.enable_x64(True):
        inputs = [jnp.asarray(y, jnp.float64) for y in vectors(14, 2, 4)]
        heads = jnp.asarray(np.random.default_rng(0).normal(size=inputs[0].shape))
        value = jax.jit(lambda *inputs: jnp.sum(heads * INTERPRETED(*inputs, window=window)))
        grads = jax.jit(jax.grad(value, argnums=(0, 1, 2)))(*inputs)
        for i, (y, grad) in enumerate(zip(inputs, grads, strict=True)):
            step = jnp.asarray(np.random.default_rng(i).normal(size=y.shape)) * 1e-6
            moved = [value(*inputs[:i], y + sign * step, *inputs[i + 1 :]) for sign in (1, -1)]
            assert float(jnp.sum(grad * step)) == pytest.approx(float(moved[0] - moved[1]) / 2, rel=1e-6, abs=1e-13)


@pytest.mark.parametrize("window", [12, slow(0)])
def test_tpu_kernels_read_nothing_they_should_not(window):
    agree(functools.partial(tpu.pool, block=128, interpret=STRICT), window, 150, 1, 16)


def test_kernels_change_nothing_in_a_retrofitted_model():
    model = gated_model("dmc", 12, 2, -0.5)
    prompts, new = [tokens(1, n)[0] for n in (40, 9)], tokens(2, 3, seed=1)
    recipe = methods.dmc()
    logits, positions, _ = oracle.run(model, recipe._replace(kernels="interpret"), prompts, new)
    want, there, _ = oracle.run(model, recipe, prompts, new)
    assert positions == there
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_a_window_that_no_kernel_has_is_left_to_xla(capsys):
    x, merge, weight = vectors(40, 2, 8)
    gate, starts = Gate(10 * merge - 5, weight), jnp.zeros((1, 40), bool)
    see = lambda kernels: objective.see(GateSpec("dmc", 2.0, window=33), gate, x, x, starts, None, kernels)
    say_once.cache_clear()
    for got, want in zip(see("interpret"), see("xla"), strict=True):
        np.testing.assert_array_equal(got, want)
    said = capsys.readouterr().err
    assert said == "segment means on XLA, not in a kernel: a window of 33 tokens is more than 32\n"
