"""The kernel of prompt attention for CPUs against the reference: every option, and numbers that are none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels.prefill_attention import cpu, reference


@pytest.fixture(scope="module", autouse=True)
def library():
    try:
        cpu.register()
    except NotImplementedError as error:
        pytest.skip(str(error))


def case(tokens=64, queries=None, heads=2, group=3, width=64, lengths=(64, 37, 1), dtype=jnp.float32, size=1.0):
    """Queries, keys, values, lengths."""
    rng, b = np.random.default_rng(0), len(lengths)
    draw = lambda n, t: jnp.asarray(size * rng.normal(size=(b, t, n, width)), dtype)
    q, k, v = draw(heads * group, queries or tokens), draw(heads, tokens), draw(heads, tokens)
    return q, k, v, jnp.asarray(lengths, jnp.int32)


def exact(args, scale=None, cap=None, window=None, visible_until=None, behind=None):
    """Outputs `[B Q N H]` and log-sum-exps `[B N Q]` in float64."""
    q, k, v, length = (np.asarray(x.astype(jnp.float32), np.float64) for x in args)
    group, keys = q.shape[2] // k.shape[2], np.arange(k.shape[1])
    pos = (0 if behind is None else length[:, None]) + np.arange(q.shape[1]) + np.zeros((len(length), 1))
    seen = (keys <= pos[..., None]) & (keys < length[:, None, None])
    seen = (seen if window is None else seen & (pos[..., None] - keys < window))[:, None]
    if visible_until is not None:
        seen = seen & (pos[:, None, :, None] <= np.repeat(np.asarray(visible_until), group, axis=1)[:, :, None])
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    s = np.einsum("bqnh,bsnh->bnqs", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    s = np.where(seen, s if cap is None else cap * np.tanh(s / cap), -np.inf)
    with np.errstate(all="ignore"):  # queries of padding see nothing
        most = s.max(axis=-1, keepdims=True)
        p = np.exp(s - most)
        total = p.sum(axis=-1)
        return np.einsum("bnqs,bsnh->bqnh", p / total[..., None], v), most[..., 0] + np.log(total)


def check(args, slack=3e-6, **options):
    """Real queries are at most three times as far from exact ones as the float32 reference; padded ones give zeros."""
    plain = [x.astype(jnp.float32) for x in args[:3]]
    (got, lse), (want, of) = (
        jax.jit(lambda *a, run=run: run(*a, **options))(*given)
        for run, given in ((cpu.attention, args), (reference.attention, (*plain, args[3])))
    )
    assert got.dtype == args[2].dtype and lse.dtype == jnp.float32
    count = np.asarray(args[3] if options.get("behind") is None else options["behind"])
    real = np.arange(got.shape[1]) < count[:, None]
    right, of_right = exact(args, **options)
    for ours, theirs, truth in ((got, want, right), (*(np.moveaxis(x, 1, 2) for x in (lse, of, of_right)),)):
        off, plain_off = (np.abs(np.asarray(x.astype(jnp.float32))[real] - truth[real]).max() for x in (ours, theirs))
        assert off <= 3 * plain_off + slack, (off, plain_off)
        assert not np.asarray(ours)[~real].any()


@pytest.mark.parametrize("group", [1, 3, 8, 200])
def test_every_number_of_heads(group):
    check(case(group=group, heads=1 if group == 200 else 2))


@pytest.mark.parametrize("width", [1, 20, 80, 128, 256])
def test_every_width(width):
    check(case(width=width))


@pytest.mark.parametrize("tokens", [1, 15, 65, 777])
def test_every_length(tokens):
    check(case(tokens, lengths=(tokens, max(1, tokens // 3), 1)))


@pytest.mark.parametrize("window", [1, 64, 300, 2000])
@pytest.mark.parametrize("cap", [None, 50.0])
def test_windows_caps_and_scales(window, cap):
    check(case(600, lengths=(600, 313)), window=window, cap=cap, scale=0.7)


@pytest.mark.parametrize("window", [None, 40])
def test_keys_that_are_seen_for_a_while(window):
    args = case(300, lengths=(300, 130))
    rng = np.random.default_rng(1)
    until = np.arange(300) + rng.integers(0, 90, (2, 2, 300))  # nobody but a key's own query must see it
    check(args, window=window, visible_until=jnp.asarray(until))


@pytest.mark.parametrize(("behind", "window"), [((70, 16, 0), None), ((1, 70, 70), None), ((70, 30, 1), 100)])
def test_queries_behind_a_prompt(behind, window):
    args = case(600, queries=70, lengths=(600, 80, 301))
    check(args, behind=jnp.asarray(behind), window=window)


def test_queries_that_see_nothing_are_finite():
    q, k, v, length = case(600, queries=70, lengths=(600,))
    o, lse = cpu.attention(q, k, v, length, behind=jnp.asarray([70]), window=8)
    assert np.isfinite(o).all() and np.isfinite(lse).all()
    assert not np.asarray(o)[:, 8:].any() and (np.asarray(lse)[:, :, 8:] < -1e29).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_numbers_of_16_bits(dtype):
    check(case(200, lengths=(200, 90), dtype=dtype), slack=2e-2)


def test_large_logits():
    check(case(300, lengths=(300,), size=8.0))


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_is_seen_by_those_that_see_it(name, number):
    at, place = 40, "qkv".index(name)
    args = list(case(64, lengths=(64,), heads=1, group=1))
    args[place] = args[place].at[0, at, 0, 3].set(number)
    (got, lse), (want, of) = (run(*args) for run in (cpu.attention, reference.attention))
    seeing = np.arange(64) == at if name == "q" else np.arange(64) >= at
    np.testing.assert_array_equal(np.isnan(got[0, seeing]), np.isnan(want[0, seeing]))
    np.testing.assert_array_equal(np.isnan(lse), np.isnan(of))
    assert np.isnan(number) <= np.isnan(got[0, at]).any()
    if name != "v":  # a weight of 0 times what is no number is none either
        assert np.isfinite(got[0, np.arange(64) < at]).all()


def test_padding_may_be_anything():
    q, k, v, length = case(300, lengths=(290, 70))
    padded = np.arange(300) >= np.asarray(length)[:, None]
    broken = [jnp.where(padded[..., None, None], np.nan, x) for x in (q, k, v)]
    for got, want in zip(cpu.attention(*broken, length), cpu.attention(q, k, v, length), strict=True):
        np.testing.assert_array_equal(got, want)


def test_results_do_not_depend_on_threads():
    args = case(2000, lengths=(2000, 700))
    for got, want in zip(cpu.attention(*args), cpu.attention(*args), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_change_of_what_sources_share_makes_another_library(monkeypatch, tmp_path):
    source, shared = tmp_path / "one.cc", tmp_path / "native.h"
    source.write_text('#include "native.h"\nextern "C" int number() { return NUMBER; }')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "SHARED", shared)
    monkeypatch.setattr(native.jax.ffi, "register_ffi_target", lambda *_, **__: None)
    for number in (1, 2):
        native._registered.cache_clear()
        shared.write_text(f"#define NUMBER {number}")
        native.register("one", source, "number")
    made = (tmp_path / "kvjax" / "kernels").iterdir()
    assert sorted(native.ctypes.CDLL(str(each)).number() for each in made) == [1, 2]
    native._registered.cache_clear()
