"""Column sums and maxima of attention in every implementation, against attention matrices in float64 numpy."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.prefill_scores import column_max, column_sums, gpu, tpu
from tests.lib.strict import STRICT

T = 192


@functools.cache
def prompts(lengths, n, heads, h, dtype=jnp.float32, window=None, recent=None, cap=None, t=T):
    """Arguments of `column_sums` and what it should return; padding holds numbers that would be seen in any sum."""
    rng = np.random.default_rng(n + h + t)
    q = np.asarray(jnp.asarray(2 * rng.normal(size=(len(lengths), t, n, h)), dtype), np.float64)
    k = np.asarray(jnp.asarray(rng.normal(size=(len(lengths), t, heads, h)), dtype), np.float64)
    lse, sums = np.full((len(lengths), n, t), -1e4), np.zeros((len(lengths), n, t))
    for b, length in enumerate(lengths):
        q[b, length:], k[b, length:] = 64, 64
        for head in range(n):
            for i in range(length):
                first = 0 if window is None else max(i - window + 1, 0)
                logits = k[b, first : i + 1, head // (n // heads)] @ q[b, i, head] / np.sqrt(h)
                logits = logits if cap is None else cap * np.tanh(logits / cap)
                lse[b, head, i] = logits.max() + np.log(np.exp(logits - logits.max()).sum())
                if recent is None or i >= length - recent:
                    sums[b, head, first : i + 1] += np.exp(logits - lse[b, head, i])
    arrays = jnp.asarray(q, dtype), jnp.asarray(k, dtype), jnp.asarray(lse, jnp.float32)
    return (*arrays, jnp.asarray(lengths, jnp.int32)), sums


def agree(run, *args, rtol=1e-5, **kwargs):
    """Whether an implementation returns the sums of `prompts`, relative to the largest of them."""
    inputs, want = prompts(*args, **kwargs)
    chosen = {name: kwargs[name] for name in ("window", "recent", "cap") if name in kwargs}
    got = np.asarray(run(*inputs, scale=inputs[0].shape[-1] ** -0.5, **chosen))
    np.testing.assert_allclose(got, want, rtol=0, atol=rtol * want.max())


XLA = functools.partial(column_sums, implementation="xla", block=48)
INTERPRETED = functools.partial(column_sums, implementation="interpret", block=64)
TPU = functools.partial(tpu.column_sums, block=128, interpret=True)
every = pytest.mark.parametrize("run", [XLA, INTERPRETED, TPU], ids=["xla", "gpu", "tpu"])


@every
@pytest.mark.parametrize("window, recent", [(5, None), (40, None), (None, 1), (None, 16), (5, 16), (40, 70)])
def test_windows_and_recent_queries(run, window, recent):
    agree(run, (T, 1, 63, 65), 2, 1, 64, window=window, recent=recent)


@every
def test_capped_logits(run):
    agree(run, (T, 101), 2, 1, 64, window=40, cap=2.0)


@every
@pytest.mark.parametrize("n, heads, h", [(1, 1, 64), (6, 2, 96), (8, 1, 128), (2, 2, 256)])
def test_groups_and_widths(run, n, heads, h):
    agree(run, (T, 101), n, heads, h)


@every
def test_every_edge_of_a_block(run):
    agree(run, (1, 63, 64, 65, 127, 128, 129, T - 1, T), 1, 1, 64)


@every
@pytest.mark.parametrize("window, recent", [(None, None), (40, 70)])
def test_bfloat16(run, window, recent):
    agree(run, (T, 100), 4, 2, 128, jnp.bfloat16, window=window, recent=recent, rtol=2e-2)


@pytest.mark.parametrize("run, t", [(INTERPRETED, 100), (INTERPRETED, 320), (TPU, 64), (TPU, 320)])
@pytest.mark.parametrize("window, recent", [(None, None), (140, None), (None, 150)])
def test_blocks_need_not_divide_the_prompt(run, t, window, recent):
    run = functools.partial(run, block=128) if t == 320 else run
    agree(run, (t, t - 5, 0), 2, 1, 64, window=window, recent=recent, t=t)


@pytest.mark.parametrize("window, recent", [(None, None), (140, 130)])
def test_tpu_kernel_reads_nothing_it_should_not(window, recent):
    run = functools.partial(tpu.column_sums, block=128, interpret=STRICT)
    agree(run, (320, 129), 2, 1, 64, window=window, recent=recent, t=320)


def test_the_gpu_kernel_says_which_heads_it_cannot_read():
    inputs, _ = prompts((4,), 1, 1, 8, t=16)
    with pytest.raises(NotImplementedError, match="heads of 8 numbers"):
        gpu.column_sums(*inputs, scale=1.0)


@functools.cache
def chunks(lengths, n, heads, h, chunk, dtype=jnp.float32, cap=None, t=T):
    """Arguments of `column_max` and what it should return for tokens that are there; padding would be the largest."""
    rng, tokens = np.random.default_rng(n + h + t + chunk), -(-t // chunk) * chunk
    q = np.asarray(jnp.asarray(2 * rng.normal(size=(len(lengths), tokens, n, h)), dtype), np.float64)
    k = np.asarray(jnp.asarray(rng.normal(size=(len(lengths), t, heads, h)), dtype), np.float64)
    others, gain = rng.normal(2, 2, (len(lengths), n, tokens)), rng.normal(0, 3, (len(lengths), tokens))
    want = np.full((len(lengths), n, t), np.nan)
    for b, length in enumerate(lengths):
        q[b, length:], k[b, length:], gain[b, length:] = 64, 64, 1e3
        for head, start in ((head, start) for head in range(n) for start in range(0, length, chunk)):
            own = slice(start, min(start + chunk, length))
            logits = q[b, own, head] @ k[b, own, head // (n // heads)].T / np.sqrt(h)
            logits = logits if cap is None else cap * np.tanh(logits / cap)
            paid = np.logaddexp(others[b, head, own], np.logaddexp.reduce(logits, axis=1))
            want[b, head, own] = (gain[b, own, None] + logits - paid[:, None]).max(axis=0)
    arrays = jnp.asarray(q, dtype), jnp.asarray(k, dtype), jnp.asarray(others, jnp.float32)
    return (*arrays, jnp.asarray(gain, jnp.float32), jnp.asarray(lengths, jnp.int32)), want


def agree_on_chunks(run, *args, atol=2e-5, **kwargs):
    """Whether an implementation returns the logarithms of `chunks`."""
    inputs, want = chunks(*args, **kwargs)
    got = np.asarray(run(*inputs, chunk=args[4], scale=inputs[0].shape[-1] ** -0.5, cap=kwargs.get("cap")))
    there = ~np.isnan(want)
    np.testing.assert_allclose(got[there], want[there], rtol=0, atol=atol)


CHUNKS_XLA = functools.partial(column_max, implementation="xla", block=4096)
CHUNKS_INTERPRETED = functools.partial(column_max, implementation="interpret", block=64)
CHUNKS_TPU = functools.partial(tpu.column_max, block=128, interpret=True)
every_max = pytest.mark.parametrize("run", [CHUNKS_XLA, CHUNKS_INTERPRETED, CHUNKS_TPU], ids=["xla", "gpu", "tpu"])


@every_max
@pytest.mark.parametrize("chunk", [4, 20, 64, 96, 128, T])
def test_chunks_of_any_size(run, chunk):
    """Parts of a block, blocks, and what is cut by them."""
    agree_on_chunks(run, (T, 1, 63, 65, 0), 2, 1, 64, chunk)


@every_max
@pytest.mark.parametrize("n, heads, h", [(1, 1, 64), (6, 2, 96), (8, 1, 128)])
def test_groups_and_widths_of_chunks(run, n, heads, h):
    agree_on_chunks(run, (T, 101), n, heads, h, 96)


@every_max
def test_capped_logits_of_chunks(run):
    agree_on_chunks(run, (T, 101), 2, 1, 64, 64, cap=2.0)


@every_max
def test_chunks_in_bfloat16(run):
    agree_on_chunks(run, (T, 100), 4, 2, 128, 64, jnp.bfloat16, atol=2e-2)


@pytest.mark.parametrize("run", [CHUNKS_INTERPRETED, CHUNKS_TPU], ids=["gpu", "tpu"])
@pytest.mark.parametrize("chunk, t", [(64, 100), (256, 320), (192, 320), (20, 390), (260, 390)])
def test_blocks_need_not_divide_chunks(run, chunk, t):
    agree_on_chunks(run, (t, t - 5, 0), 2, 1, 64, chunk, t=t)


@pytest.mark.parametrize("chunk", [64, 192, 256])
def test_tpu_kernel_reads_nothing_it_should_not_of_chunks(chunk):
    agree_on_chunks(functools.partial(tpu.column_max, block=128, interpret=STRICT), (320, 129), 2, 1, 64, chunk, t=320)
