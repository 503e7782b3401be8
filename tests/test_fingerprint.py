"""A checkpoint's fingerprint: equal for equal models, another for any other weight or field."""

import json
import os
import shutil

import golden
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kvjax.checkpoint.convert import convert
from kvjax.checkpoint.identity import fingerprint
from kvjax.errors import InputError


@pytest.fixture
def source(tmp_path):
    return golden.write_checkpoint("llama_gqa", tmp_path / "source")


def rewrite(path, change):
    """Change the weights of a safetensors file under the same name, size and times."""
    before = path.stat()
    save_file({name: change(name, array) for name, array in load_file(path).items()}, path, metadata={"format": "pt"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def one_bit(name, array):
    if name == "model.layers.1.mlp.up_proj.weight":
        array.view(np.uint32)[-1, -1] ^= 1
    return array


def edit_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_it_is_that_of_the_model_and_not_of_its_place(tmp_path, source):
    found = fingerprint(source)
    assert len(found) == 32 and int(found, 16) >= 0
    assert fingerprint(shutil.copytree(source, tmp_path / "copy")) == found
    (source / "tokenizer_config.json").write_text("{}")
    (source / "README.md").write_text("a model")
    (source / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text())))
    assert fingerprint(source) == found


@pytest.mark.parametrize("shards", [1, 3])
def test_every_weight_and_field_counts(tmp_path, shards):
    source = golden.write_checkpoint("llama_gqa", tmp_path / "source", shards=shards)
    found = {fingerprint(source)}
    changes = (one_bit, lambda name, array: np.zeros_like(array), lambda name, array: array + 1)
    for change in changes:
        for file in source.glob("*.safetensors"):
            rewrite(file, change)
        found.add(fingerprint(source))
    edit_json(source / "config.json", rope_theta=123.0)
    found.add(fingerprint(source))
    assert len(found) == len(changes) + 2


def test_a_converted_model_has_one_too(tmp_path, source):
    convert(str(source), tmp_path / "first")
    convert(str(source), tmp_path / "again")  # Orbax draws new names for its files
    found = fingerprint(tmp_path / "first")
    assert fingerprint(tmp_path / "again") == found
    convert(str(source), tmp_path / "half", "bfloat16")
    rewrite(source / "model.safetensors", one_bit)
    convert(str(source), tmp_path / "other")
    edit_json(tmp_path / "again" / "kvjax.json", latent={"heads": 2, "ranks": [[3, 4], [5, 6]]})
    assert len({found, *(fingerprint(tmp_path / name) for name in ("half", "other", "again"))}) == 4


def test_what_is_no_checkpoint_has_none(tmp_path):
    with pytest.raises(InputError, match="has neither"):
        fingerprint(tmp_path)
