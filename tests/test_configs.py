"""The configs: every method has one, and the demo model answers with each what it says."""

import shlex
from pathlib import Path

import pytest

import kvjax
from kvjax import METHODS, evaluate, generate
from kvjax.retrofit import __main__ as retrofit
from tests.lib import configs
from tests.lib.configs import Config

CONFIGS = configs.every()
every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.path.stem)
every_measured = pytest.mark.parametrize(
    "config", [config for config in CONFIGS if not config.retrofits], ids=lambda config: config.path.stem
)
SHORT = "--cr 1.5 --length 64 --batch 2 --micro-batch 1 --ramp-steps 4 --final-steps 2 --log-every 2 --save-every 2"


def test_every_method_has_a_config():
    assert {config.method for config in CONFIGS} == set(METHODS)


@every_config
def test_a_config_says_what_it_is_and_how_it_is_run(config: Config):
    programs = [command[0] for command in config.commands]
    assert config.about.endswith(".") and "|" not in config.about
    assert ("kvjax.retrofit" if config.retrofits else "kvjax.generate") in programs
    assert config.retrofits or (programs[-1] == "kvjax.evaluate" and configs.ANSWERS.search(config.path.read_text()))
    flag = ["--config", f"configs/{config.path.name}"]
    parsers = {"kvjax.generate": generate.parser, "kvjax.evaluate": evaluate.parser, "kvjax.retrofit": retrofit.parser}
    for program, *flags in config.commands:
        if program in parsers:
            parsers[program]().parse_args(flags)  # exits if it does not know one
            assert " ".join(flag) in " ".join(flags) or (config.retrofits and program != "kvjax.retrofit")


@every_config
def test_every_config_is_accepted(config: Config):
    flags = ["--config", str(config.path), "--model", "unused"]
    if config.retrofits:
        with pytest.raises(kvjax.InputError, match="unused: no such directory"):
            retrofit.main([*flags, "--out", "unused", "--data", "unused"])
    else:
        with pytest.raises(kvjax.InputError, match="give a prompt"):
            generate.main(flags)


@pytest.mark.slow
@every_measured
def test_the_demo_model_answers_what_a_config_says(config: Config, tmp_path: Path):
    """The commands in its head, as they stand there."""
    right, size = configs.measure(config, tmp_path)
    assert 0 <= right <= 100 and 0 < size < 110
    if config.answers is not None:
        assert right == pytest.approx(config.answers[0], abs=5)  # one answer: sums differ between processors
        assert size == pytest.approx(config.answers[1], abs=0.6)


@pytest.mark.slow
@pytest.mark.parametrize("config", [c for c in CONFIGS if c.retrofits], ids=lambda config: config.path.stem)
def test_the_demo_model_is_retrofitted_as_a_config_says(config: Config, tmp_path: Path):
    """In a few short steps, with the options of the config that are no lengths."""
    (tmp_path / "text.txt").write_text("a sentence, and another one. " * 200)
    flags = [*shlex.split(SHORT), "--window", "8", "--out", str(tmp_path / "out"), "--data", str(tmp_path / "text.txt")]
    flags += ["--export", "1.2"] + ([] if config.options.get("adapter") else ["--fade-steps", "2"])
    retrofit.main(["--config", str(config.path), *flags])
    model = kvjax.load(tmp_path / "out")
    out = model.generate(["a sentence, and another one. " * 8], max_new_tokens=4)
    assert out.recipe.name == config.method and len(out.sequences[0].tokens) <= 4
