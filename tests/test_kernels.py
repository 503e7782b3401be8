"""The kernels' references against dense attention in numpy, at every block size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention import PagedKV, decode_attention, merge, probabilities
from pallas_kernels.prefill_attention import attention, gpu, tpu
from pallas_kernels.prefill_scores import column_sums
from tests.lib import strict

B, K, G, H, PAGE, M = 2, 3, 2, 8, 8, 5


@pytest.fixture(scope="module")
def paged():
    """Rows of different lengths, one of them empty, in shuffled pages; entries behind a row's end point nowhere."""
    rng = np.random.default_rng(0)
    size = B * K * M
    k, v = (rng.normal(size=(size, PAGE, H)).astype(np.float32) for _ in range(2))
    table = rng.permutation(size).reshape(B, K, M).astype(np.int32)
    length = np.array([[40, 17, 8], [1, 0, 33]], np.int32)
    table = np.where(np.arange(M) * PAGE < length[..., None], table, size)
    pos = rng.integers(0, 100, (size, PAGE)).astype(np.int32)
    q = rng.normal(size=(B, K, G, H)).astype(np.float32)
    return q, k, v, table, length, pos


def dense(paged, after=None):
    """Unnormalised output, sum and logits of every row, one slot at a time."""
    q, k, v, table, length, pos = paged
    weights, values = np.zeros((B, K, G, M * PAGE)), np.zeros((B, K, M * PAGE, H))
    for b in range(B):
        for h in range(K):
            for s in range(length[b, h]):
                page, offset = table[b, h, s // PAGE], s % PAGE
                if after is None or pos[page, offset] > after[b]:
                    weights[b, h, :, s] = np.exp(q[b, h] @ k[page, offset] * H**-0.5)
                    values[b, h, s] = v[page, offset]
    return np.einsum("bkgs,bksh->bkgh", weights, values), weights.sum(-1), weights


@pytest.mark.parametrize("block", [8, 16, 24, 512])
@pytest.mark.parametrize("after", [None, np.array([40, 10], np.int32)])
def test_decode_attention_is_dense_attention(paged, block, after):
    o, total, weights = dense(paged, after)
    part = decode_attention(
        [PagedKV(*map(jnp.asarray, paged))], implementation="xla", scale=H**-0.5, block=block, with_logits=True,
        after=None if after is None else jnp.broadcast_to(jnp.asarray(after)[:, None], (B, K)),
    )  # fmt: skip
    back = np.exp(np.asarray(part.m, np.float64))
    np.testing.assert_allclose(part.o * back[..., None], o, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(part.l * back, total, rtol=1e-4, atol=1e-6)
    assert [x.shape for x in part.logits] == [weights.shape]
    some = total > 0
    want = weights / np.where(some, total, 1)[..., None]
    got = np.where(some[..., None], probabilities(part)[0], 0)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_partials_over_disjoint_slots_merge_exactly(paged):
    q, k, v, table, length, _ = map(jnp.asarray, paged)
    run = lambda table, length: decode_attention([PagedKV(q, k, v, table, length)], scale=H**-0.5)
    whole = run(table, length)
    first = jnp.minimum(length, 2 * PAGE)
    halves = merge([run(table, first), run(table[..., 2:], length - first)])
    parts = [PagedKV(q, k, v, table, first), PagedKV(q, k, v, table[..., 2:], length - first)]
    for a, b in zip(jax.tree.leaves(decode_attention(parts, scale=H**-0.5)), jax.tree.leaves(halves), strict=True):
        np.testing.assert_array_equal(a, b)
    some = np.asarray(length) > 0
    for a, b in ((whole.o / whole.l[..., None], halves.o / halves.l[..., None]), (whole.m, halves.m)):
        np.testing.assert_allclose(np.asarray(a)[some], np.asarray(b)[some], rtol=1e-5, atol=1e-6)


def causal(q, k, length, window, scale, cap):
    """Attention matrices `[B N T T]`, padded queries and keys empty."""
    t, n = q.shape[1], q.shape[2]
    k = np.repeat(k, n // k.shape[2], axis=2)
    s = np.einsum("btnh,bsnh->bnts", q, k).astype(np.float64) * scale
    s = s if cap is None else cap * np.tanh(s / cap)
    distance = np.arange(t)[:, None] - np.arange(t)
    seen = (distance >= 0) & (distance < (window or t)) & (np.arange(t) < length[:, None, None])
    p = np.exp(np.where(seen[:, None], s, -np.inf))
    real = (np.arange(t) < length[:, None])[:, None, :, None]
    return np.where(real, p / np.maximum(p.sum(-1, keepdims=True), 1e-300), 0), p.sum(-1)


XLA = functools.partial(attention, implementation="xla")
PREFILL = {
    "blocks of 16": functools.partial(XLA, block=16),
    "blocks of 64": functools.partial(XLA, block=64),
    "tpu": functools.partial(attention, implementation="interpret"),
    "tpu, blocks of 128": functools.partial(tpu.attention, block=128, interpret=True),
    "gpu": functools.partial(gpu.attention, implementation="xla"),  # what cuDNN is asked for
}


@pytest.mark.parametrize("window, scale, cap", [(None, None, None), (5, None, None), (40, 0.7, 1.5)])
@pytest.mark.parametrize("run", PREFILL)
def test_prefill_attention_and_column_sums_are_dense_attention(window, scale, cap, run):
    rng, t, n, heads = np.random.default_rng(1), 64 if run != "tpu, blocks of 128" else 300, 4, 2
    length = np.array([t, 37, 1], np.int32)
    q = rng.normal(size=(3, t, n, H)).astype(np.float32)
    k, v = (rng.normal(size=(3, t, heads, H)).astype(np.float32) for _ in range(2))
    prob, total = causal(q, k, length, window, scale or H**-0.5, cap)
    args = [jnp.asarray(x) for x in (q, k, v, length)]
    if run == "gpu" and cap is not None:
        pytest.skip("cuDNN has no soft cap")
    o, lse = PREFILL[run](*args, scale=scale, cap=cap, window=window)
    want = np.einsum("bnts,bsnh->btnh", prob, np.repeat(v, n // heads, axis=2))
    real = np.arange(t) < length[:, None]
    np.testing.assert_allclose(np.asarray(o)[real], want[real], atol=1e-5)
    np.testing.assert_allclose(
        np.moveaxis(np.asarray(lse), 1, 2)[real], np.log(np.moveaxis(total, 1, 2)[real]), atol=1e-5
    )
    assert np.isfinite(np.asarray(o)).all()
    sums = column_sums(args[0], args[1], lse, args[3], scale=scale or H**-0.5, cap=cap, window=window, block=16)
    np.testing.assert_allclose(sums, prob.reshape(3, -1, t, t).sum(2), atol=1e-5)


def test_prefill_attention_in_kernels_is_that_of_xla_in_bfloat16():
    rng = np.random.default_rng(2)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 200, n, 128)), jnp.bfloat16) for n in (4, 2, 2))
    runs = (XLA, PREFILL["tpu"], PREFILL["gpu"])
    (want, lse), *others = (run(q, k, v, jnp.asarray([200])) for run in runs)
    for o, found in others:
        assert o.dtype == jnp.bfloat16 and found.dtype == jnp.float32
        np.testing.assert_allclose(np.asarray(o, np.float32), np.asarray(want, np.float32), atol=2e-2)
        np.testing.assert_allclose(found, lse, rtol=1e-2)


@pytest.mark.parametrize(
    ("dtype", "width", "options", "message"),
    [
        (jnp.float32, 64, {}, "16 bits, these are float32"),
        (jnp.bfloat16, 512, {}, "these have 512"),
        (jnp.bfloat16, 64, {"cap": 30.0}, "no soft cap"),
        (jnp.bfloat16, 64, {"visible_until": jnp.zeros((1, 1, 8), jnp.int32)}, "for a while only are for xla"),
        (jnp.bfloat16, 64, {"behind": jnp.asarray([8])}, "behind a prompt are for xla"),
    ],
)
def test_the_gpu_kernel_says_which_prompts_it_cannot_read(dtype, width, options, message):
    x = jnp.zeros((1, 8, 1, width), dtype)
    with pytest.raises(NotImplementedError, match=message):
        attention(x, x, x, jnp.asarray([8]), implementation="gpu", **options)


@pytest.mark.parametrize("waits", [True, False])
def test_the_strict_interpreter_finds_what_nobody_waited_for(waits):
    def double(x_ref, y_ref, held_ref, done):
        copy = pltpu.make_async_copy(x_ref, held_ref, done)
        copy.start()
        if waits:
            copy.wait()
        y_ref[...] = 2 * held_ref[...]
        if not waits:
            copy.wait()

    x = jnp.ones((8, 128))
    run = pl.pallas_call(
        double,
        out_shape=x,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
        interpret=strict.STRICT,
    )
    jax.block_until_ready(run(x))
    assert strict.races_found() is not waits
