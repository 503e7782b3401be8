"""Budgets by a profile: what rows get, and how profiles are made."""

import dataclasses
import json
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import kvjax
from kvjax import calibrate, evaluate, methods
from kvjax.cache.layout import layer_groups
from kvjax.checkpoint import identity, shipped
from kvjax.checkpoint.identity import fingerprint
from kvjax.errors import InputError
from kvjax.evaluation.runner import Evaluation
from kvjax.generation.model import Model
from kvjax.plan import dry_run
from kvjax.policies.budgets import profile
from kvjax.spec import LatentSpec, ProfileSpec
from tests.lib import oracle
from tests.lib.matrix import text

UNEVEN = ProfileSpec((0.1, 0.3), (((0.3, 0.0), (0.06, 0.04)), ((0.9, 0.1), (0.1, 0.1))), "uneven.json")


def rows(keep, lengths, given=UNEVEN, **fields) -> np.ndarray:
    """Slots `[L B K]` of a model of two layers and two rows."""
    spec = dataclasses.replace(oracle.random_model(1, num_layers=2, **fields).spec, profile=given)
    budget = profile.from_profile(None)
    assert budget.rows is not None
    found = [budget.rows(keep, spec, group, np.asarray(lengths, np.int32)) for group in layer_groups(spec)]
    return np.concatenate(found)


def test_slots_are_the_profile_s_and_linear_between_its_levels():
    np.testing.assert_array_equal(rows(Fraction(3, 10), [1000])[:, 0], [[900, 100], [100, 100]])
    between = rows(Fraction(2, 10), [1000])[:, 0]
    np.testing.assert_allclose(between, [[600, 50], [80, 70]], atol=1)
    np.testing.assert_array_equal(rows(100, [1000])[:, 0], rows(Fraction(1, 10), [1000])[:, 0])
    below, above = rows(Fraction(1, 20), [1000])[:, 0], rows(Fraction(65, 100), [1000])[:, 0]
    np.testing.assert_allclose(below, [[150, 1], [30, 20]], atol=1)  # no row without a slot
    np.testing.assert_allclose(above, [[950, 550], [550, 550]], atol=1)


@pytest.mark.parametrize("keep", [1, 7, 40, Fraction(1, 20), Fraction(1, 7), Fraction(9, 10)])
def test_slots_add_up_exactly(keep):
    lengths = np.asarray([1, 2, 9, 41, 141, 1000, 50_001])
    mean = np.maximum(1, [keep if isinstance(keep, int) else int(n * keep) for n in lengths])
    found = rows(keep, lengths)
    assert (found.sum(axis=(0, 2)) == 4 * mean).all() and found.min() >= 1
    assert (found <= np.maximum(mean, lengths)[:, None]).all()  # as many as there are tokens, or room for all


def test_layers_of_each_pool_have_their_mean():
    found = rows(Fraction(3, 10), [1000], windows=(None, 32))
    assert found[0].sum() == found[1].sum() == 600


def test_other_budgets_and_lengths_compile_nothing():
    compiled = profile._hand_out._cache_size
    rows(40, [141])
    before = compiled()
    rows(Fraction(1, 5), [50_001])
    assert compiled() == before > 0


@pytest.mark.parametrize("method", ["snapkv", "h2o", "tova", "expected"])
def test_an_even_profile_is_no_profile(method):
    decoder = oracle.random_model(5, num_layers=2)
    decoder.spec = dataclasses.replace(decoder.spec, profile=ProfileSpec((0.5,), (((0.5, 0.5), (0.5, 0.5)),)))
    model, prompts = Model(decoder, None, (), "random"), [text(60, 0), text(41, 0)]
    plain, by_profile = (model.generate(prompts, f"{method}+split={split}", 12) for split in ("row", "profile"))
    assert by_profile.slots == plain.slots
    np.testing.assert_array_equal(by_profile.logits, plain.logits)


def test_what_a_text_says_of_itself_is_one_threshold(tmp_path: Path):
    """A profile of one text gives it the rows that the threshold gave, and nothing waits for them."""
    model, tokens = Model(oracle.random_model(5, num_layers=3), None, (), "random"), text(240, 0)
    found = model.calibrate("keydiff", [tokens])
    np.testing.assert_allclose(np.mean(found.shares, axis=(1, 2)), found.levels, atol=1 / 240)
    profile.write(tmp_path / "one.json", found, "", "keydiff")
    recipe = methods.keydiff("20%", split=str(tmp_path / "one.json"))
    assert recipe.budget is not None and recipe.budget.allocate is None
    kept = lambda recipe: oracle.kept_positions(model.decoder, oracle.start(model.decoder, recipe, [tokens], 4)[1])
    assert kept(recipe) == kept(methods.keydiff("20%"))
    assert len({len(row) for layer in kept(recipe)[0] for row in layer}) > 1


def test_the_command_writes_what_is_found_beside_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = Path(shipped.directory())
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(source / name)
    (tmp_path / "text").write_text("A word, and what it says of another one. " * 8)
    out = tmp_path / profile.BESIDE
    calibrate.main([str(tmp_path), str(out), "--text", str(tmp_path / "text")])
    assert "shares of 6 layers at 5 levels" in capsys.readouterr().out
    assert json.loads(out.read_text())["model"] == fingerprint(tmp_path)
    model = kvjax.load(tmp_path)
    planned = dry_run.plan_cache(dry_run.abstract_model(str(tmp_path)), methods.h2o(20, split="profile"), 100, 8)
    read = model.generate([text(100, 0)], "h2o+split=profile", 20, max_new_tokens=8)
    assert model.spec.profile is not None and np.mean(read.slots[0]) == 20
    assert read.bytes.total == planned.bytes["total"]


def test_profiles_that_come_with_the_library():
    demo = profile.read(profile.beside(Path(shipped.directory())))
    small = profile.read(profile.find("smollm2-135m-instruct.json"))
    for found, shape in ((demo, (6, 2)), (small, (30, 3))):
        assert np.shape(found.shares)[1:] == shape
        np.testing.assert_allclose(np.mean(found.shares, axis=(1, 2)), found.levels, atol=1e-3)
        assert np.max(found.shares[1]) > 3 * found.levels[1]  # rows differ
    assert methods.snapkv(split="smollm2-135m-instruct.json").budget is not None
    assert kvjax.load().spec.profile == demo


def test_what_is_wrong_with_a_profile_is_one_line(tmp_path: Path):
    decoder = oracle.random_model(5, num_layers=3)
    model, path = Model(decoder, None, (), "random"), tmp_path / "other.json"
    with pytest.raises(InputError, match=r"no profile lies beside the model.*come smollm2-135m-instruct\.json"):
        model.generate([[1, 2, 3]], "snapkv+split=profile")
    with pytest.raises(InputError, match="split='heads' is not row, layer, global, profile or a profile's file"):
        methods.snapkv(split="heads")
    with pytest.raises(InputError, match="cannot read"):
        methods.snapkv(split=str(path))
    profile.write(path, UNEVEN, "", "keydiff")
    with pytest.raises(InputError, match=r"other\.json: a profile of 2 layers of 2 rows, and the model has 3 of 2"):
        model.generate([[1, 2, 3]], f"snapkv+split={path}")
    for wrong in ({"levels": [0.3, 0.1]}, {"shares": [[[0.5]]]}, {"shares": [[[2.0]], [[1.0]]]}, {"levels": "no"}):
        path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
        with pytest.raises(InputError, match="expected rising levels"):
            profile.read(path)
        profile.write(path, UNEVEN, "", "keydiff")
    with pytest.raises(InputError, match="snapkv does not compare rows of different layers"):
        model.calibrate("snapkv", [[1, 2, 3]])
    latent = oracle.random_model(5, num_layers=3, latent=LatentSpec(2, ((8, 8),) * 3))
    assert np.shape(Model(latent, None, (), "").calibrate("keydiff", [text(60, 0)]).shares) == (5, 3, 1)


def test_a_profile_makes_no_other_model(tmp_path):
    """KL is compared with a model that has another one, or none, and contexts are read by it."""
    shutil.copytree(shipped.directory(), tmp_path / "bare", ignore=shutil.ignore_patterns(profile.BESIDE))
    bare, demo = kvjax.load(tmp_path / "bare"), kvjax.load()
    assert bare.spec.profile is None and demo.spec.profile is not None
    Evaluation(bare, batch=1, unseen=False, chat=False, reference=demo)
    assert identity.of_model(bare.decoder) == identity.of_model(demo.decoder)


def test_a_run_names_its_profiles(tmp_path, capsys):
    """And goes on with these only; one that was measured on other weights is used, and said to be."""
    shutil.copytree(shipped.directory(), tmp_path / "model")
    own, other = tmp_path / "model" / profile.BESIDE, tmp_path / "other.json"
    shutil.copy(own, other)
    flags = ("--model", str(tmp_path / "model"), "--form", "short", "--tasks", "lines", "--lengths", "128")
    flags = (*flags, "--samples", "1", "--out", str(tmp_path / "out"))

    def run(methods: str) -> dict[str, str]:
        evaluate.main([*flags, "--methods", methods, "--budgets", "20%"])
        return json.loads((tmp_path / "out" / "run.json").read_text())["calls"][-1].get("profiles", {})

    found = run(f"snapkv+split=profile,snapkv+split={other}")
    assert found.keys() == {"profile", str(other)} and len(set(found.values())) == 1
    assert run("snapkv") == {} and "other weights" not in capsys.readouterr().err
    changed = json.loads(own.read_text())
    own.write_text(json.dumps(changed | {"model": "another"}))
    assert run("snapkv+split=profile")["profile"] == found["profile"]  # the same shares
    assert "was measured on other weights" in capsys.readouterr().err
    own.write_text(json.dumps(changed | {"shares": changed["shares"][::-1]}))
    with pytest.raises(InputError, match="another split=profile profile"):
        run("snapkv+split=profile")
