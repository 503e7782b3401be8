"""Mutated input of every kind: refused with one line, or accepted with its right meaning; no traceback, no hang."""

import subprocess
import sys

import pytest

from tests.lib import (
    mutated_configs,
    mutated_data,
    mutated_flags,
    mutated_gguf,
    mutated_params,
    mutated_tokenizers,
    mutated_toml,
    mutated_weights,
)
from tests.lib.mutate import explore

FILES = (
    mutated_configs, mutated_weights, mutated_params, mutated_tokenizers, mutated_toml, mutated_data, mutated_flags,
    mutated_gguf,
)  # fmt: skip
KINDS = {name: kind for file in FILES for name, kind in file.KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_mutations_are_refused_or_mean_what_they_say(kind):
    explore(KINDS[kind], 20)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_mutations_are_refused_or_mean_what_they_say(kind, tmp_path):
    tried = tmp_path / "case"
    command = [sys.executable, "-W", "error", "-m", "tests.lib.mutate", kind, "400", str(tried)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-5000:] + tried.read_text()
