"""LoRC's factors and ranks against numpy's singular values, whitening by Cholesky, and the formulas in plain floats."""

import json
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvjax.checkpoint.lorc.lorc import low_rank
from kvjax.checkpoint.lorc.lorc import ranks as rules
from kvjax.checkpoint.lorc.ranks import RankRequest
from kvjax.errors import InputError

RULES = ("lorc", "uniform", "energy")


def kernel_of(singular: np.ndarray, inputs: int = 48, seed: int = 0) -> np.ndarray:
    """A matrix with these singular values, float32."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(n, len(singular))))[0] for n in (inputs, len(singular)))
    return ((left * singular) @ right.T).astype(np.float32)


def kernel(inputs: int = 48, outputs: int = 32, seed: int = 0) -> np.ndarray:
    return kernel_of(np.geomspace(3.0, 0.02, outputs), inputs, seed)


def groups_of(kernel: np.ndarray, width: int) -> list[np.ndarray]:
    return [kernel[:, i : i + width].astype(np.float64) for i in range(0, kernel.shape[1], width)]


def inputs_of(samples: int, width: int, seed: int = 1) -> np.ndarray:
    """Inputs that are far from white."""
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(samples, width))
        * np.geomspace(5, 0.05, width)
        @ np.linalg.qr(rng.normal(size=(width,) * 2))[0]
    )


def rebuild(down: np.ndarray, up: np.ndarray) -> np.ndarray:
    return np.einsum("dcr,crn->dcn", down.astype(np.float64), up.astype(np.float64)).reshape(len(down), -1)


def tail(singular: np.ndarray, rank: int) -> float:
    """The least error of that rank: Eckart and Young."""
    return math.sqrt((singular[rank:] ** 2).sum())


def spectra_of(layers: int, groups: int, n: int, seed: int = 0) -> np.ndarray:
    """Singular values of some model; those of later layers fall more slowly."""
    rng = np.random.default_rng(seed)
    steep = rng.uniform(0.5, 6, (layers, 2, groups, 1))
    return np.exp(rng.normal(size=steep.shape) - steep * np.linspace(0, 1, n))


# Factors


@pytest.mark.parametrize("width", [32, 16, 8])
def test_the_spectrum_is_that_of_the_groups(width):
    given = kernel()
    found = low_rank.spectrum(low_rank.gram(given, width))
    wanted = [np.linalg.svd(group, compute_uv=False) for group in groups_of(given, width)]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


@pytest.mark.parametrize("width", [32, 16, 8])
@pytest.mark.parametrize("rank", [1, 4, 7, 8])
@pytest.mark.parametrize("hadamard", [False, True])
def test_plain_factors_are_the_best_of_their_rank(width, rank, hadamard):
    given = kernel()
    down, up = low_rank.factors(given, low_rank.gram(given, width), rank, hadamard)
    assert down.shape == (48, 32 // width, rank) and up.shape == (32 // width, rank, width)
    assert down.dtype == up.dtype == np.float32
    built = rebuild(down, up)
    for group, part in zip(groups_of(given, width), groups_of(built, width), strict=True):
        singular = np.linalg.svd(group, compute_uv=False)
        assert np.linalg.norm(group - part) == pytest.approx(tail(singular, rank), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("width", [32, 8])
@pytest.mark.parametrize("hadamard", [False, True])
def test_full_rank_gives_the_kernel_back(width, hadamard):
    given = kernel()
    down, up = low_rank.factors(given, low_rank.gram(given, width), width, hadamard)
    np.testing.assert_allclose(rebuild(down, up), given, atol=3e-6)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_every_platform_solves_in_64_bits(platform, monkeypatch):
    """On the device where it can; a condition number of 1e6, the ramp's floor, is found on all."""
    given, solved = kernel_of(np.geomspace(3.0, 3e-6, 32)), []
    moments, best = low_rank.gram(given, 16), [np.linalg.svd(group, compute_uv=False) for group in groups_of(given, 16)]
    for name in ("eigh", "eigvalsh"):
        solver = getattr(jnp.linalg, name)
        monkeypatch.setattr(jnp.linalg, name, lambda x, solver=solver: solved.append(x.dtype) or solver(x))
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    np.testing.assert_allclose(low_rank.spectrum(moments), best, rtol=1e-3)
    built = rebuild(*low_rank.factors(given, moments, 6, hadamard=True))
    for group, part, singular in zip(groups_of(given, 16), groups_of(built, 16), best, strict=True):
        assert np.linalg.norm(group - part) == pytest.approx(tail(singular, 6), rel=1e-4)
    assert solved == ([np.float64] * 2 if platform == "gpu" else [])
    assert jnp.zeros(()).dtype == np.float32  # 64 bits end here


@pytest.mark.parametrize("rank", [4, 12, 24])
def test_whitened_factors_are_the_best_for_the_outputs(rank):
    given, x = kernel(outputs=32), inputs_of(400, 48)
    outputs = x @ given
    down, up = low_rank.factors(given, (outputs.T @ outputs)[None], rank)
    found = np.linalg.norm(x @ (given - rebuild(down, up)))

    root = np.linalg.cholesky(x.T @ x).T  # as SVD-LLM: the root of the inputs' moments, an SVD, and the root undone
    left, singular, right = np.linalg.svd(root @ given, full_matrices=False)
    whitened = np.linalg.solve(root, (left[:, :rank] * singular[:rank]) @ right[:rank])
    assert found == pytest.approx(np.linalg.norm(x @ (given - whitened)), rel=1e-4)
    assert found == pytest.approx(tail(singular, rank), rel=1e-4)


@given(st.integers(0, 100), st.sampled_from([32, 16, 8]), st.integers(1, 7))
def test_whitening_is_never_worse_where_it_was_calibrated(seed, width, rank):
    given, x = kernel(seed=seed), inputs_of(64, 48, seed + 1)
    outputs = groups_of(x @ given, width)
    moments = np.stack([y.T @ y for y in outputs])
    plain = rebuild(*low_rank.factors(given, low_rank.gram(given, width), rank))
    white = rebuild(*low_rank.factors(given, moments, rank))
    assert np.linalg.norm(x @ (given - white)) <= np.linalg.norm(x @ (given - plain)) * (1 + 1e-5)


@pytest.mark.parametrize("rank", [8, 12, 6, 5, 7, 31])
def test_hadamard_turns_the_latent_and_leaves_the_projection(rank):
    given = kernel()
    moments = low_rank.gram(given, 32)
    (down, up), (mixed, mixed_up) = (low_rank.factors(given, moments, rank, h) for h in (False, True))
    np.testing.assert_allclose(rebuild(mixed, mixed_up), rebuild(down, up), atol=2e-6)
    np.testing.assert_allclose(mixed_up[0] @ mixed_up[0].T, np.eye(rank), atol=1e-6)
    energy, mixed_energy = ((d[:, 0] ** 2).sum(axis=0) for d in (down, mixed))
    # Every channel has a part of all: evenly at a power of two, at most twice the mean at any rank.
    assert mixed_energy.sum() == pytest.approx(energy.sum(), rel=1e-5)
    assert mixed_energy.max() <= 1.001 * (1 if rank == 8 else 2) * energy.mean()
    assert mixed_energy.max() < 0.9 * energy.max()


def test_a_kernel_in_bfloat16_is_factored_as_what_it_is():
    given = kernel().astype(ml_dtypes.bfloat16)
    wide = given.astype(np.float32)
    np.testing.assert_array_equal(low_rank.gram(given, 16), low_rank.gram(wide, 16))
    moments = low_rank.gram(given, 16)
    for a, b in zip(low_rank.factors(given, moments, 8), low_rank.factors(wide, moments, 8), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_kernel_of_less_rank_needs_no_more():
    singular = np.where(np.arange(32) < 6, 1.0, 0.0)
    given = kernel_of(singular)
    moments = low_rank.gram(given, 32)
    np.testing.assert_allclose(low_rank.spectrum(moments), [singular], atol=1e-6)
    np.testing.assert_allclose(rebuild(*low_rank.factors(given, moments, 6)), given, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_scale_of_a_kernel_does_not_matter(scale):
    given = (kernel() * scale).astype(np.float32)
    moments = low_rank.gram(given, 32)
    singular = np.linalg.svd(given.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(low_rank.spectrum(moments), [singular], rtol=1e-9)
    np.testing.assert_allclose(rebuild(*low_rank.factors(given, moments, 32)), given, atol=3e-6 * scale)


def test_a_kernel_of_zeros():
    given = np.zeros((8, 8), np.float32)
    moments = low_rank.gram(given, 4)
    assert not low_rank.spectrum(moments).any()
    down, up = low_rank.factors(given, moments, 2, hadamard=True)
    assert not down.any() and np.isfinite(up).all()


def test_what_cannot_be_factored_is_refused():
    given = kernel()
    moments = low_rank.gram(given, 32)
    with pytest.raises(InputError, match="NaN or infinity"):
        low_rank.spectrum(np.where(np.eye(32), np.nan, moments))
    for rank in (0, 33):
        with pytest.raises(InputError, match=f"rank {rank} is not from 1 to 32"):
            low_rank.factors(given, moments, rank)


# Ranks


def with_kappas(kappas: np.ndarray, n: int = 64) -> np.ndarray:
    """Spectra of one group with these condition numbers [L 2]."""
    return np.exp(-np.log(kappas)[..., None, None] * np.linspace(0, 1, n))


@pytest.mark.parametrize("high, low", [(64.0, 16.0), (48.0, 48.0), (60.0, 4.0)])
def test_the_ramp_is_the_papers(high, low):
    kappas = np.random.default_rng(0).uniform(1.5, 900, (7, 2))
    cumulative = [math.prod(float(k * v) for k, v in kappas[layer:]) for layer in range(7)]
    logs = [math.log(product) for product in cumulative]
    wanted = [
        high * (1 - (max(logs) - log) / (max(logs) - min(logs)) * (1 - low / high))
        for log in logs  # the first layer has the largest product
    ]
    found = rules.ramp(with_kappas(kappas), high, low)
    np.testing.assert_allclose(found, wanted, rtol=1e-9)
    assert found[0] == pytest.approx(high) and found[-1] == pytest.approx(low)
    assert (np.diff(found) <= 0).all()


def test_the_ramp_of_a_deep_model_does_not_overflow():
    found = rules.ramp(with_kappas(np.full((80, 2), 1e6)), 1024.0, 256.0)
    np.testing.assert_allclose(found, np.linspace(1024, 256, 80))  # products would reach 1e960


def test_the_ramp_does_not_follow_vanishing_singular_values():
    kappas = np.full((4, 2), 1e6)
    kappas[1] = 1e60
    spectra = with_kappas(kappas)
    np.testing.assert_allclose(rules.ramp(spectra, 64.0, 16.0), np.linspace(64, 16, 4))
    spectra[2, 0, 0, -1] = 0
    np.testing.assert_allclose(rules.ramp(spectra, 64.0, 16.0), np.linspace(64, 16, 4))


def test_groups_enter_the_ramp_by_their_mean_logarithm():
    kappas = np.array([[2.0, 8.0], [4.0, 4.0], [9.0, 4.0]])
    grouped = np.concatenate([with_kappas(kappas), with_kappas(kappas**3)], axis=2)
    np.testing.assert_allclose(rules.ramp(grouped, 64.0, 16.0), rules.ramp(with_kappas(kappas**2), 64.0, 16.0))


@pytest.mark.parametrize(
    "spectra",
    [
        with_kappas(np.full((1, 2), 9.0)),
        np.zeros((5, 2, 1, 64)),
        np.ones((5, 2, 1, 64)),
        1 + 1e-12 * np.linspace(1, 0, 64) * np.arange(10).reshape(5, 2, 1, 1),  # orthogonal, but for rounding
    ],
)
def test_equal_layers_all_get_the_first_ones_rank(spectra):
    assert (rules.ramp(spectra, 40.0, 8.0) == 40).all()
    for rule in RULES:
        ranks = rules.allot(RankRequest(Fraction(1, 2), rule=rule), spectra)
        assert sum(map(sum, ranks)) == len(ranks) * 64
    assert rules.allot(RankRequest(bounds=(40, 8)), spectra) == ((40, 40),) * len(spectra)


SHAPES = st.tuples(
    st.integers(1, 40),
    st.sampled_from([(1, 1024), (8, 128), (4, 256), (1, 64), (2, 32), (1, 512), (3, 80), (8, 64), (8, 100)]),
)


@given(SHAPES, st.integers(1, 100), st.sampled_from(RULES), st.integers(0, 9))
def test_ranks_meet_the_share_of_bytes_from_below(shape, percent, rule, seed):
    layers, (groups, n) = shape
    keep, unit = Fraction(percent, 100), rules.unit_of(groups * n, n)
    request, spectra = RankRequest(keep, rule=rule), spectra_of(layers, groups, n, seed)
    if keep * n < unit:
        with pytest.raises(InputError, match=f"keep={percent}% is less than"):
            rules.allot(request, spectra)
        return
    ranks = np.array(rules.allot(request, spectra))
    assert ranks.shape == (layers, 2)
    if keep == 1:
        assert (ranks == n).all()
        return
    assert (ranks % unit == 0).all() and (ranks >= unit).all() and (ranks <= n).all()
    step = unit * (1 if rule == "energy" else 2)  # one more would be too much
    target = min(keep * 2 * layers * n, 2 * layers * (n - n % unit))
    assert 0 <= target - int(ranks.sum()) < step
    if step <= target / 100:
        assert ranks.sum() >= 0.99 * float(target)
    if rule != "energy":
        assert (ranks[:, 0] == ranks[:, 1]).all() and (np.diff(ranks[:, 0]) <= 0).all()
    if rule == "uniform":
        assert np.ptp(ranks) in (0, unit)


@given(st.integers(2, 40), st.integers(7, 95), st.integers(0, 99))
def test_the_ramp_for_a_share_has_its_mean_and_ends(layers, percent, seed):
    spectra, keep, n = spectra_of(layers, 2, 64, seed), percent / 100, 64
    found = rules.ramp_to(spectra, Fraction(percent, 100))
    assert found.mean() == pytest.approx(keep * n)
    assert 4 - 1e-9 <= found[-1] <= found[0] <= n + 1e-9 and (np.diff(found) <= 1e-9).all()
    if found[-1] > 4 + 1e-9:
        assert found[0] == pytest.approx(min(n, 4 / 3 * keep * n))
    low, high = 4.0, found[0]  # bisect the last rank: the closed form's slow twin
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rules.ramp(spectra, found[0], middle).mean() < keep * n else (low, middle)
    np.testing.assert_allclose(rules.ramp(spectra, found[0], low), found, atol=1e-6)


def test_a_ramp_that_would_end_below_the_least_rank_starts_lower():
    kappas = np.ones((8, 2))
    kappas[-2:] = 1e5  # all layers but the last stand at the top
    found = rules.ramp_to(with_kappas(kappas), Fraction(1, 2))
    np.testing.assert_allclose(found, [36] * 7 + [4])


def test_units_go_where_they_capture_most():
    n, unit, layers = 32, 4, 5
    spectra = spectra_of(layers, 2, n, seed=3)
    spectra[2, 1] *= 100  # the scale of a matrix does not matter
    units = {(layer, part): 1 for layer in range(layers) for part in (0, 1)}
    for _ in range(layers * 2 * n // 2 // unit - len(units)):
        gain = {}
        for (layer, part), have in units.items():
            squares = spectra[layer, part] ** 2
            gain[layer, part] = squares[:, have * unit : (have + 1) * unit].sum() / squares.sum()
        units[max(gain, key=gain.__getitem__)] += 1
    wanted = tuple((units[layer, 0] * unit, units[layer, 1] * unit) for layer in range(layers))
    assert rules.allot(RankRequest(Fraction(1, 2), rule="energy"), spectra) == wanted


def test_every_matrix_keeps_a_unit_and_none_exceeds_its_width():
    spectra = np.zeros((3, 2, 1, 64))  # no energy at all, all of it in one channel, all of it everywhere
    spectra[1, :, :, 0] = 1
    spectra[2] = 1
    for percent in (7, 50, 99, 100):
        ranks = np.array(rules.allot(RankRequest(Fraction(percent, 100), rule="energy"), spectra))
        assert ranks.min() >= 4 and ranks.max() <= 64
    assert (ranks == 64).all()


@pytest.mark.parametrize(
    "keep, n, groups, wanted",
    [
        (Fraction(6, 10), 1024, 1, [624] * 2 + [608] * 3),  # 614.4 is 38.4 units of 16
        (Fraction(1, 2), 128, 8, [64] * 5),
        (Fraction(6, 10), 64, 2, [40] * 3 + [36] * 2),  # 9.6 units of 4
        (Fraction(1), 100, 8, [100] * 5),  # all of it, though 100 is no multiple of 16
        (Fraction(99, 100), 100, 8, [96] * 5),
    ],
)
def test_uniform_ranks_raise_the_earliest(keep, n, groups, wanted):
    ranks = rules.allot(RankRequest(keep, rule="uniform"), spectra_of(5, groups, n))
    assert ranks == tuple((rank, rank) for rank in wanted)


@pytest.mark.parametrize("rule", RULES)
def test_what_a_full_layer_cannot_take_goes_to_others(rule):
    kappas = np.where(np.arange(9)[:, None] == 4, [9.0, 9.0], 1.0)  # the first five layers are to get the most
    spectra = with_kappas(kappas, 100).repeat(8, axis=2)
    for percent in range(60, 100):  # 6.25 units of 16 are 100 channels
        ranks = np.array(rules.allot(RankRequest(Fraction(percent, 100), rule), spectra))
        assert ranks.max() <= 96
        assert ranks.sum() > min(percent * 18, 96 * 18) - (16 if rule == "energy" else 32)


def test_units():
    assert rules.unit_of(1024, 1024) == rules.unit_of(512, 64) == 16
    assert rules.unit_of(511, 511) == rules.unit_of(128, 32) == 4
    assert rules.unit_of(64, 2) == 2


@pytest.mark.parametrize(
    "bounds, ends",
    [((512, 256), (512, 256)), ((Fraction(8, 10), Fraction(4, 10)), (816, 416)), ((1024, 1), (1024, 16))],
)
def test_given_ends_are_rounded_to_the_nearest_multiple(bounds, ends):
    spectra = spectra_of(9, 1, 1024)
    ranks = rules.allot(RankRequest(bounds=bounds), spectra)
    assert (ranks[0], ranks[-1]) == tuple((rank, rank) for rank in ends)
    high, low = (float(1024 * b) if isinstance(b, Fraction) else float(b) for b in bounds)
    wanted = rules.ramp(spectra, high, low)
    assert all(k == v and k % 16 == 0 and abs(k - w) <= max(8, 16 - w) for (k, v), w in zip(ranks, wanted, strict=True))


@pytest.mark.parametrize(
    "request_, message",
    [
        (RankRequest(Fraction(1, 20)), "keep=5% is less than .* at least 6.25%"),
        (RankRequest(bounds=(128, 16)), "d_max=128 is more than the 64 channels"),
        (RankRequest(bounds=(16, 32)), "d_min=32 is more than d_max=16"),
        (RankRequest(bounds=(16, Fraction(1, 2))), "d_min=50% is more than d_max=16"),
    ],
)
def test_requests_that_do_not_fit_the_model(request_, message):
    with pytest.raises(InputError, match=message):
        rules.check(request_, 64, 64)
    with pytest.raises(InputError, match=message):
        rules.allot(request_, np.ones((2, 2, 1, 64)))


# What users write


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("keep=60%", RankRequest(Fraction(3, 5))),
        ("keep=0.6", RankRequest(Fraction(3, 5))),
        ("keep=.6", RankRequest(Fraction(3, 5))),
        ("keep=1", RankRequest(Fraction(1))),
        ("keep=12.5%,rule=energy", RankRequest(Fraction(1, 8), rule="energy")),
        ("rule=uniform, keep=100%", RankRequest(Fraction(1), rule="uniform")),
        ("d_max=512,d_min=256", RankRequest(bounds=(512, 256))),
        ("d_min=40%,d_max=80%", RankRequest(bounds=(Fraction(4, 5), Fraction(2, 5)))),
        ("d_max=1.0,d_min=128", RankRequest(bounds=(Fraction(1), 128))),
    ],
)
def test_requests_are_read(text, wanted):
    assert rules.parse(text) == wanted


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "expected keep=60%"),
        ("60%", "expected keep=60%"),
        ("keep", "expected keep=60%"),
        ("keep=", "expected keep=60%"),
        ("keep=60%,", "expected keep=60%"),
        ("keep=60%,keep=50%", "expected keep=60%"),
        ("keep=60%,d_max=512", "expected keep=60%"),
        ("d_max=512", "expected keep=60%"),
        ("rule=lorc", "expected keep=60%"),
        ("d_max=512,d_min=256,rule=lorc", "expected keep=60%"),
        ("keep=60%,rank=3", "expected keep=60%"),
        ("keep=60%,rule=fisher", "rule=fisher is not one of lorc, uniform, energy"),
        ("keep=x", "keep=x is not a share"),
        ("keep=-1%", "keep=-1% is not a share"),
        ("keep=1e-1", "keep=1e-1 is not a share"),
        ("keep=nan", "keep=nan is not a share"),
        ("keep=0%", "keep=0% keeps nothing"),
        ("keep=0", "keep=0 keeps nothing"),
        ("keep=512", "keep=512 is more than everything"),
        ("keep=120%", "keep=120% is more than everything"),
        ("keep=1.5", "keep=1.5 is more than everything"),
        ("d_max=120%,d_min=1", "d_max=120% is more than everything"),
        ("d_max=512,d_min=0", "d_min=0 keeps nothing"),
        ("d_max=512.5,d_min=1", "d_max=512.5 is more than everything"),
    ],
)
def test_wrong_requests(text, message):
    with pytest.raises(InputError, match=message) as error:
        rules.parse(text)
    assert str(error.value).startswith("--lorc ") and "\n" not in str(error.value)


def test_given_ranks_are_read(tmp_path):
    path = tmp_path / "ranks.json"
    for content, wanted in [
        ([[8, 16], [4, 4]], (None, ((8, 16), (4, 4)))),
        ({"heads": 2, "ranks": [[8, 16]]}, (2, ((8, 16),))),
        ({"ranks": [[8, 16]]}, (None, ((8, 16),))),
    ]:
        path.write_text(json.dumps(content))
        assert rules.read_ranks(path) == wanted


@pytest.mark.parametrize(
    "content, message",
    [
        (b"[[8, 16]", "is not JSON"),
        (b"\xff", "is not UTF-8 text"),
        (b"3", "holds no list of ranks"),
        (b"[]", "holds no list of ranks"),
        (b"[[8]]", r"layer 0 has \[8\]"),
        (b"[[8, 8], 8]", "layer 1 has 8"),
        (b"[[8, 0]]", r"layer 0 has \[8, 0\]"),
        (b"[[8, true]]", r"layer 0 has \[8, True\]"),
        (b"[[8, 8.0]]", r"layer 0 has \[8, 8.0\]"),
        (b'{"heads": 2}', "holds no list of ranks"),
        (b'{"heads": 0, "ranks": [[8, 8]]}', "heads = 0"),
        (b'{"heads": "2", "ranks": [[8, 8]]}', "heads = '2'"),
        (b'{"head": 2, "ranks": [[8, 8]]}', "unknown field head"),
    ],
)
def test_wrong_files_of_ranks(tmp_path, content, message):
    path = tmp_path / "ranks.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        rules.read_ranks(path)
    assert str(error.value).startswith(str(path))


def test_no_file_of_ranks(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        rules.read_ranks(tmp_path / "none.json")
