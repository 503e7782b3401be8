"""The kernel of decode attention for CPUs against the reference, how it is compiled, and what is said without it."""

import concurrent.futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.errors import say_once
from pallas_kernels import native
from pallas_kernels.decode_attention import PagedKV, cpu, reference
from pallas_kernels.rotation import Rotation
from tests.test_decode_attention import alike, case, compiled

STORES = (
    "dense", "fp8", "int8", "int4", "int3", "int2", "int8/int4", "int4:32", "int4:48", "int3:96:symmetric",
    "int4:symmetric", "int2:16:symmetric", "kivi2:16:32", "kivi4:8:32",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def library():
    try:
        native.register(cpu.NAME, cpu.SOURCE, cpu.SYMBOL)
    except NotImplementedError as error:
        pytest.skip(str(error))


def check(parts: list[PagedKV], options: dict) -> None:
    """float32 of pages of any dtype: the reference in float32 of the same numbers."""
    got = compiled(cpu.decode_attention, parts, **options)
    plain = [part._replace(q=part.q.astype(jnp.float32)) for part in parts]
    alike(got, compiled(reference.decode_attention, plain, **options))


@pytest.mark.parametrize("width", [64, 128, 48])
@pytest.mark.parametrize("store", STORES)
def test_every_store(store, width):
    if store.split(":")[0] in ("int3", "kivi2", "int2") and width == 48:
        pytest.skip("not a width of the store")
    check(*case(store, h=width, page=32, m=10, g=3, with_logits=True))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("width", [64, 20])
def test_dense_of_16_bits(dtype, width):
    check(*case("dense", dtype=dtype, h=width, page=16, m=40, with_logits=True))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8, 11])
def test_every_number_of_heads(group):
    check(*case("dense", "int4", g=group, lengths=(64, 17, 1, 0), with_logits=True))


@pytest.mark.parametrize("store", ["dense", "int4"])
@pytest.mark.parametrize("width", [8, 24, 80, 256])
def test_odd_widths(store, width):
    check(*case(store, h=width, page=8, m=70, with_logits=True))


@pytest.mark.parametrize("logits", [False, True])
def test_windows_caps_and_places(logits):
    parts, options = case("dense", "int8", window=True, cap=5.0, m=20, with_logits=logits)
    check(parts, options)
    check([part._replace(pos=None) for part in parts[:1]], options)
    check(parts, options | {"place": lambda pos: 2 * pos + 1})
    everything = options | {"after": jnp.full((2, 2), 10_000)}
    check(parts, everything)


def test_numbers_too_small_for_their_exponent():
    """XLA's threads take such float32 numbers for zero, codes of others are none."""
    parts, options = case("dense", dtype=jnp.float16, m=10)
    halves = [
        part._replace(v=jax.tree.map(lambda x: jnp.asarray(np.asarray(x) * np.float16(1e-5)), part.v)) for part in parts
    ]
    parts, _ = case("fp8", m=10)
    eighths = [
        part._replace(v=part.v | {"codes": jnp.asarray(np.full_like(np.asarray(part.v["codes"]), 4))}) for part in parts
    ]
    for given in (halves, eighths):
        plain = [part._replace(q=part.q.astype(jnp.float32)) for part in given]
        got, want = (
            compiled(cpu.decode_attention, given, **options),
            compiled(reference.decode_attention, plain, **options),
        )
        assert np.abs(want.o).max() > 0
        np.testing.assert_allclose(got.o, want.o, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_what_is_not_a_number_is_seen(dtype, number):
    parts, options = case("dense", dtype=dtype, m=10)
    for name in ("k", "v"):
        broken = [
            part._replace(**{name: jax.tree.map(lambda x: x.at[..., 0].set(number), getattr(part, name))})
            for part in parts
        ]
        plain = [part._replace(q=part.q.astype(jnp.float32)) for part in broken]
        got, want = (
            compiled(cpu.decode_attention, broken, **options),
            compiled(reference.decode_attention, plain, **options),
        )
        rows = np.asarray(parts[0].length) > 0  # in others nothing is seen
        assert not np.isfinite(want.o[rows]).all()
        np.testing.assert_array_equal(np.isfinite(got.o[rows]), np.isfinite(want.o[rows]))


def test_shapes_that_do_not_fit():
    parts, options = case("dense", m=10)
    with pytest.raises(ValueError, match="queries have 32 numbers, and keys 64"):
        cpu.decode_attention([part._replace(q=part.q[..., :32]) for part in parts], **options)


def test_a_choice_of_slots():
    parts, options = case("dense", m=20, with_logits=True)
    slots = jnp.asarray(np.random.default_rng(1).integers(0, 2, (2, 2, 320)), bool)
    check([parts[0]._replace(slots=slots)], options)


def test_many_pages_of_few_slots_and_long_rows():
    check(*case("dense", page=8, m=200, lengths=(1600, 3), with_logits=True))
    check(*case("int8", page=128, m=20, lengths=(2560, 257), with_logits=True))


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("still", [0, 16])
def test_keys_that_are_rotated_at_read(window, still):
    parts, options = case("dense", "int4", m=20, window=window, with_logits=True)
    angle = np.arange(128)[:, None] * 0.9 ** np.arange((64 - still) // 2)
    table = tuple(jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))
    rotation = Rotation(jnp.ones((1, 1, table[0].shape[1])), table=table, still=still)
    check(parts, options | {"expand": reference.KeyExpansion(rotation), "place": lambda pos: pos + 3})


def test_the_decode_loop_is_the_same(capsys, shallow_demo):
    """Greedy tokens of methods that read all that the kernel knows."""
    model, prompts = kvjax.load(), ["river: 217 130\nstone: 25 8\n! river:"]
    say_once.cache_clear()
    for method in ("full+store=int4", "h2o", "streaming_llm", "mikv", "oracle"):
        ours, plain = (model.generate(prompts, f"{method}+kernels={k}", max_new_tokens=8) for k in ("cpu", "xla"))
        assert [x.tokens for x in ours.sequences] == [x.tokens for x in plain.sequences], method
    assert "on XLA" not in capsys.readouterr().err


def _fresh(monkeypatch, tmp_path, **environment):
    """Nothing has been compiled yet."""
    native._registered.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_without_a_compiler_xla_takes_over_and_says_so_once(monkeypatch, tmp_path, capsys):
    _fresh(monkeypatch, tmp_path, PATH=str(tmp_path), CXX="")
    say_once.cache_clear()
    jax.clear_caches()
    for _ in range(2):
        kvjax.load().generate(["river: 217 130\n! river:"], "full", max_new_tokens=2)
    want = "decode attention on XLA, not in a kernel: there is no C++ compiler: install g++ or clang++\n"
    assert capsys.readouterr().err == want
    native._registered.cache_clear()


def test_what_does_not_compile_is_a_reason(monkeypatch, tmp_path):
    _fresh(monkeypatch, tmp_path)
    source = tmp_path / "broken.cc"
    source.write_text("int main( {")
    with pytest.raises(NotImplementedError, match=r"cannot compile broken.cc: .*error"):
        native.register("broken", source, "main")
    source.write_text('extern "C" int symbol() { return 0; }')
    assert not list((tmp_path / "kvjax" / "kernels").iterdir())


def test_processes_may_compile_at_once(monkeypatch, tmp_path):
    source, path = tmp_path / "some.cc", tmp_path / "made" / "some.so"
    source.write_text('extern "C" int number() { return 42; }')
    compiler = next(filter(None, map(native.shutil.which, native.COMPILERS)))
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: native._compile(compiler, source, path), range(3)))
    assert [each.name for each in path.parent.iterdir()] == ["some.so"]
    assert native.ctypes.CDLL(str(path)).number() == 42
