"""Top-k retention in every implementation, against a stable sort in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_kernels.topk_retain import gpu, topk_retain, tpu, tpu_copy
from tests.lib.strict import STRICT

B, K, R, W = 3, 3, 24, 16  # more rows than a TPU's program reads
KINDS = ("spread", "ties", "equal", "protected", "tiny", "strange")
# Tokens and slots: three programs, the last not full; a row that is kept whole; one token.
SHAPES = [(300, 40), (130, 130), (1, 1)]


@functools.cache
def run(name, n):
    """An implementation, compiled once for each shape; with blocks so small that rows have several."""
    if name == "xla":
        return jax.jit(functools.partial(topk_retain, n=n, implementation="xla"))
    if name == "gpu":
        return jax.jit(functools.partial(gpu.topk_retain, n=n, chunk=128, block=16, interpret=True))
    return jax.jit(functools.partial(tpu.topk_retain, n=n, chunk=128, interpret=STRICT if name == "strict" else True))


def draw(kind, t, rng):
    """Priorities `[B K T]`."""
    if kind == "ties":
        return rng.integers(-2, 3, (B, K, t)).astype(np.float32)
    if kind == "equal":
        return np.full((B, K, t), -np.inf if t % 2 else 7, np.float32)
    x = rng.normal(size=(B, K, t)).astype(np.float32)
    if kind == "tiny":
        x *= np.float32(2.0**-120)
    if kind == "protected":
        x[rng.random(x.shape) < 0.2] = np.inf
        x[..., t // 2 + 1 :] = -np.inf
    if kind == "strange":
        some = np.array([0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf, 3e38, -3e38], np.float32)
        x = rng.choice(some, x.shape)
    return x


def payload(t, dtype, rng):
    """Keys, values, positions and scores of as many tokens."""
    k, v = (jnp.asarray(rng.normal(size=(B, K, t, width)), dtype) for width in (R, W))
    pos = rng.permuted(np.broadcast_to(np.arange(t, dtype=np.int32), (B, K, t)), axis=-1)
    return k, v, pos, rng.normal(size=(B, K, t)).astype(np.float32)


def assert_kept(name, t, n, dtype, kind, seed, count):
    rng = np.random.default_rng(seed)
    priority, tokens = draw(kind, t, rng), payload(t, dtype, rng)
    kept = run(name, n)(jnp.asarray(priority), jnp.asarray(count, jnp.int32), *map(jnp.asarray, tokens))
    got = [np.asarray(x) for x in kept]
    for b in range(B):
        for head in range(K):
            rank = np.where(np.isnan(priority[b, head]), -np.inf, priority[b, head]).astype(np.float64)
            rank[np.abs(rank) < 2.0**-126] = 0  # subnormal
            best = np.argsort(-rank, kind="stable")[: min(count[b][head], n)]
            index = np.broadcast_to(np.arange(t), (B, K, t))
            for found, source, empty in zip(got, (index, *tokens), (t, 0, 0, -1, 0), strict=True):
                assert (found[b, head, : len(best)] == np.asarray(source)[b, head, best]).all()
                assert (found[b, head, len(best) :] == empty).all()


@pytest.mark.parametrize("name", ["xla", "gpu", "tpu"])
@pytest.mark.parametrize(("t", "n"), SHAPES)
@settings(max_examples=20)
@given(st.sampled_from(KINDS), st.integers(0, 10**6), st.lists(st.integers(0, 400), min_size=B * K, max_size=B * K))
@example("strange", 0, [0, 1, 39, 400, 40, 2, 3, 4, 5])
@example("tiny", 0, [0, 1, 39, 400, 40, 2, 3, 4, 5])
@example("equal", 0, [0, 1, 39, 400, 40, 2, 3, 4, 5])
@example("protected", 0, [40, 130, 130, 1, 0, 40, 40, 7, 40])
def test_the_best_are_kept_in_order(name, t, n, kind, seed, counts):
    count = np.minimum(np.reshape(counts, (B, K)), t)
    assert_kept(name, t, n, jnp.float32, kind, seed, count)


@pytest.mark.parametrize("name", ["xla", "gpu", "tpu"])
def test_bfloat16(name):
    assert_kept(name, 300, 40, jnp.bfloat16, "ties", 0, np.array([[40, 7, 1], [0, 300, 39], [2, 3, 40]]))


@pytest.mark.parametrize("kind", ["ties", "protected"])
def test_on_tpus_no_memory_is_read_beyond_its_bounds_or_before_it_is_written(kind):
    assert_kept("strict", 300, 40, jnp.float32, kind, 0, np.array([[40, 7, 1], [0, 300, 39], [2, 3, 40]]))


def test_more_slots_than_tokens_are_refused():
    tokens = payload(3, jnp.float32, np.random.default_rng(0))
    with pytest.raises(ValueError, match="n=4 slots for rows of 3 tokens"):
        topk_retain(jnp.zeros((B, K, 3)), jnp.ones((B, K), jnp.int32), *map(jnp.asarray, tokens), n=4)


@pytest.mark.parametrize(("t", "n"), [(1, 1), (100, 37), (700, 600)])  # the last in two programs
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.uint8])
def test_tpus_copy_vectors_of_any_format(dtype, t, n):
    rng = np.random.default_rng(n)
    source, index = jnp.asarray(rng.integers(0, 200, (2, t, 48)), dtype), rng.integers(0, t, (2, n)).astype(np.int32)
    count = np.array([n, n - n // 3])
    found = tpu_copy.copy(source, jnp.asarray(index), jnp.asarray(count, jnp.int32), True)
    want = np.take_along_axis(np.asarray(source), index[..., None], axis=1)
    np.testing.assert_array_equal(found, np.where((np.arange(n) < count[:, None])[..., None], want, 0))
