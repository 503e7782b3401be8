"""Converted checkpoints that are damaged, incomplete or being written: one line, and never a wrong model."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import golden
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

import kvjax.convert
from kvjax.checkpoint import hf, orbax
from kvjax.checkpoint.convert import convert
from kvjax.checkpoint.quiet import quiet
from kvjax.checkpoint.stage import staged
from kvjax.errors import InputError

ROOT = Path(kvjax.convert.__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
CONVERT = [sys.executable, "-m", "kvjax.convert"]


@pytest.fixture
def source(tmp_path):
    return golden.write_checkpoint("llama_gqa", tmp_path / "source")


@pytest.fixture
def dst(tmp_path, source):
    convert(str(source), tmp_path / "dst")
    return tmp_path / "dst"


def edit_json(path, **fields):
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def without_checksums(path):
    """As a kvjax has written it that knew none."""
    edit_json(path / "kvjax.json", checksums=None, tie_embeddings=None)
    return path


def weights_of(path):
    return {name: np.asarray(leaf) for name, leaf in hf.by_path(orbax.load(path))[0].items()}


def put(path, part, **arrays):
    """Write a part over, with other arrays; `__` in a name is a dot, None removes one."""
    folder = path / "params" / part
    now = {name: np.asarray(a) for name, a in ocp.load(str(folder), ocp.metadata(str(folder)).metadata).items()}
    now |= {name.replace("__", "."): array for name, array in arrays.items()}
    shutil.rmtree(folder)
    ocp.save(str(folder), {name: array for name, array in now.items() if array is not None})


def refused(path, *words):
    """Loading and copying a checkpoint say the same line."""
    for use in (orbax.load, lambda path: convert(str(path), path.parent / "copy", "bfloat16")):
        with pytest.raises(InputError) as error:
            use(path)
        assert "\n" not in str(error.value)
        for word in (str(path), *words):
            assert word in str(error.value)
    assert not (path.parent / "copy").exists()


def damages():
    def cut(file):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    def flip(file):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    return {"cut": cut, "flip": flip, "empty": lambda file: file.write_bytes(b""), "remove": lambda file: file.unlink()}


@pytest.mark.parametrize("kind", damages())
@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt", "the largest"])
def test_any_damage_is_seen_by_the_checksum(dst, name, kind):
    files = [file for file in (dst / "params").rglob("*") if file.is_file()]
    of_name = [file for file in files if file.name == name] or files
    damages()[kind](max(of_name, key=lambda file: file.stat().st_size))
    refused(dst, "params cannot be read, convert the source again")


@pytest.mark.parametrize("checksums", [True, False])
def test_damage_is_one_line_of_the_command(dst, tmp_path, checksums):
    if not checksums:
        without_checksums(dst)
    largest = max(
        (file for file in (dst / "params").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size
    )
    largest.write_bytes(largest.read_bytes()[:1000])
    done = subprocess.run(
        [*CONVERT, dst, tmp_path / "copy", "--dtype", "bfloat16"], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith(f"kvjax.convert: error: {dst}: params cannot be read")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "source"]


def test_checkpoints_without_checksums_load(dst):
    before = weights_of(dst)
    after = weights_of(without_checksums(dst))
    assert all((before[name] == after[name]).all() for name in before | after)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(dst, source, value):
    weight = np.ones((48, 32), np.float32).T
    weight[3, 4] = value
    put(without_checksums(dst), "embedding", layers__0__mlp__up__kernel=weight)
    refused(dst, "layers.0.mlp.up.kernel", "NaN or infinite")


def test_weights_that_a_dtype_cannot_hold_are_not_written(dst, tmp_path):
    put(without_checksums(dst), "embedding", norm__scale=np.full(32, 3.4e38, np.float32))
    orbax.load(dst)
    with pytest.raises(InputError, match=r"norm\.scale would have NaN or infinite weights in bfloat16"):
        convert(str(dst), tmp_path / "copy", "bfloat16")
    with pytest.raises(InputError, match=r"norm\.scale has NaN or infinite weights in bfloat16"):
        orbax.load(dst, jnp.bfloat16)


def test_parts_are_those_that_were_written(dst):
    shutil.copytree(dst / "params" / "embedding", dst / "params" / "aaa")
    refused(dst, "aaa is missing, or was not there")
    without_checksums(dst)
    refused(dst, "is there twice")
    shutil.rmtree(dst / "params" / "aaa")
    put(dst, "embedding", extra=np.ones(3, np.float32))
    refused(dst, "the shape of extra is [3], config.json gives none")
    put(dst, "embedding", extra=None, norm__scale=None)
    refused(dst, "the shape of norm.scale is absent, config.json gives [32]")
    put(dst, "embedding", norm__scale=np.ones(32, np.float32))
    assert (weights_of(dst)["norm.scale"] == 1).all()


@pytest.mark.parametrize("checksums", [True, False])
def test_a_pipe_among_the_files(dst, checksums):
    if not checksums:
        without_checksums(dst)
    os.mkfifo(dst / "params" / "embedding" / "pipe")
    refused(dst, "embedding/pipe is not a regular file")


@pytest.mark.parametrize("layers", [1, 3, 10**3, 10**4])
def test_no_tree_is_built_of_layers_that_are_not_there(dst, source, layers, monkeypatch):
    for path in (dst, source):
        edit_json(path / "config.json", num_hidden_layers=layers)
    monkeypatch.setattr(hf, "by_path", lambda module: pytest.fail("built a tree"))
    refused(dst, f"has weights of 2 layers, config.json gives {layers}")
    for use in (lambda: hf.load(source, jnp.float32), lambda: convert(str(source), dst.parent / "copy")):
        with pytest.raises(InputError, match=f"source: has weights of 2 layers, config.json gives {layers}"):
            use()


@pytest.mark.parametrize("name", ["internlm2", "falcon_7b", "phi3_window"])
def test_sizes_that_are_not_there_take_no_memory(tmp_path, name):
    path = golden.write_checkpoint(name, tmp_path / "source")
    heads = "num_attention_heads"
    fields = {heads: 2**20, "head_dim": 2**20} if name == "internlm2" else {"hidden_size": 2**30, heads: 2**10}
    edit_json(path / "config.json", **fields)
    with pytest.raises(InputError, match="has shape"):
        hf.load(path, jnp.float32)


# --- conversions ---


def test_names_that_are_too_long(tmp_path, source, capsys):
    long = "x" * 300
    for arguments in ([long, tmp_path / "dst"], [source, tmp_path / long], [source, tmp_path / long / "dst"]):
        with pytest.raises(SystemExit) as status:
            kvjax.convert.main([str(argument) for argument in arguments])
        said = capsys.readouterr().err.splitlines()
        assert status.value.code == 2 and said[-1].startswith("kvjax.convert: error: ") and long in said[-1]
    assert os.listdir(tmp_path) == ["source"]


def test_one_process_at_a_time(tmp_path):
    dst = tmp_path / "dst"
    with staged(dst) as stage:
        (stage / "file").touch()
        with pytest.raises(InputError, match="another process is writing it"), staged(dst):
            pass
        assert (stage / "file").exists()
    assert os.listdir(tmp_path) == ["dst"] and os.listdir(dst) == ["file"]
    with pytest.raises(InputError, match="exists already"), staged(dst):
        pass
    shutil.rmtree(dst)
    with pytest.raises(InputError, match="exists already"), staged(dst):
        dst.mkdir()  # by a program that asks nobody
    assert os.listdir(tmp_path) == ["dst"]


@pytest.mark.parametrize("locks", [True, False])
def test_what_a_killed_process_left_is_cleared(tmp_path, monkeypatch, locks):
    left = tmp_path / ".dst.partial" / "stage"
    left.mkdir(parents=True)
    (left / "half").touch()
    if locks:
        with staged(tmp_path / "dst") as stage:
            assert stage == left and not os.listdir(stage)
        assert os.listdir(tmp_path) == ["dst"]
        return
    monkeypatch.setitem(sys.modules, "fcntl", None)  # without locks nobody knows whether it was killed
    with pytest.raises(InputError, match=re.escape(f"{left.parent} is there")), staged(tmp_path / "dst"):
        pass
    assert left.exists()
    shutil.rmtree(left.parent)
    with staged(tmp_path / "dst"):
        pass
    assert os.listdir(tmp_path) == ["dst"]


PAIR = """
import sys
import kvjax.convert
for line in sys.stdin:
    try:
        kvjax.convert.main(line.split())
        print(0, flush=True)
    except SystemExit as status:
        print(status.code, flush=True)
"""


def test_of_two_conversions_at_once_one_is_complete_and_the_other_says_so(tmp_path, source):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    both = [subprocess.Popen([sys.executable, "-c", PAIR], env=ENVIRONMENT, text=True, **pipes) for _ in range(2)]
    convert(str(source), tmp_path / "alone")
    expected = weights_of(tmp_path / "alone")
    for number in range(10):
        for process in both:
            process.stdin.write(f"{source} {tmp_path / f'dst{number}'}\n")
            process.stdin.flush()
        assert sorted(int(process.stdout.readline()) for process in both) == [0, 2]
        found = weights_of(tmp_path / f"dst{number}")
        assert found.keys() == expected.keys() and all((found[name] == expected[name]).all() for name in found)
    said = [line for process in both for line in process.communicate()[1].splitlines() if "error" in line]
    assert len(said) == 10 and any("another process is writing it" in line for line in said)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_full_disk_is_one_line(tmp_path, source):
    """No file may have more than 20 blocks."""
    done = subprocess.run(
        ["sh", "-c", 'ulimit -f 20; exec "$@"', "sh", *CONVERT, source, tmp_path / "dst"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stderr.splitlines() if not line.startswith("converting")]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert lines[0].startswith(f"kvjax.convert: error: {tmp_path / 'dst'}: cannot be written")
    assert os.listdir(tmp_path) == ["source"]


def test_only_what_orbax_says_is_dropped(caplog):
    asyncio, absl = logging.getLogger("asyncio"), logging.getLogger("absl")
    with quiet():
        asyncio.error("a task of orbax/checkpoint has failed")
        absl.warning("of others")
    asyncio.error("of orbax/checkpoint, when all went well")
    with pytest.raises(ValueError), quiet():
        raise ValueError
    asyncio.error("a task of tensorstore has failed later")
    with quiet():
        pass
    said = [record.getMessage() for record in caplog.records]
    assert said == ["of others", "of orbax/checkpoint, when all went well"]
