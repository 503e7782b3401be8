"""Many devices: what one of them does, split over eight on the host, and over two processes.

A process has its devices from the start, so everything here runs in processes of its own: `tests/lib/on_mesh.py`
compares generations, and the laws are tried again with their models on a mesh.
"""

import functools
import json
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

import kvjax
from kvjax import METHODS, InputError
from kvjax.checkpoint import shipped
from kvjax.generate import main
from kvjax.parallel import mesh
from tests.lib.matrix import slow

CPU = {**os.environ, "JAX_PLATFORMS": "cpu"}
MESHES = ("data=1,model=8", "data=2,model=4", "data=8,model=1")


def devices(count: int, **more: str) -> dict[str, str]:
    """The environment of a process with so many devices."""
    flags = CPU.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={count}"
    return CPU | {"XLA_FLAGS": " ".join(flags)} | more


def compare(*entries: str) -> tuple[dict[str, dict], str]:
    """What `tests/lib/on_mesh.py` says of each method, and its stderr."""
    line = [sys.executable, "-m", "tests.lib.on_mesh", *entries]
    done = subprocess.run(line, env=devices(8), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return {found["method"]: found for found in map(json.loads, done.stdout.splitlines())}, done.stderr


COUNTED = ("full", "h2o", "tova", "snapkv")


@functools.cache
def quickly() -> tuple[dict[str, dict], str]:
    """What most tests ask, of one process."""
    return compare(
        "data=2,model=4", "h2o", "mikv", "h2o@stacked", "data=1,model=8", "h2o@demo", *map("count:{}".format, COUNTED)
    )


@pytest.mark.parametrize("size", slow(MESHES, ("data=1,model=8", "data=8,model=1")))
def test_a_mesh_generates_what_one_device_does(size):
    everything, _ = quickly() if size == "data=2,model=4" else compare(size, *METHODS)
    # Prompts of 61 to 90 tokens, one on each device: pools are for the longest.
    slack = 1.15 if size == "data=8,model=1" else 1.05
    for name in ("h2o", "mikv") if size == "data=2,model=4" else METHODS:
        found = everything[name]
        assert found["tokens"] == found["expected"], name
        assert found["slots"] == found["expected_slots"], name
        # Where heads differ, pools are for the device that holds most, and for no more.
        part = found["fullest"] if name in ("adakv", "expected", "dmc", "dms") else slack / 8
        assert found["device_bytes"] <= part * found["bytes"], name
        assert found["arrays"] == [found["device_bytes"]] * 8, name  # on every device


@pytest.mark.slow
def test_every_method_on_two_by_four():
    for name, found in compare("data=2,model=4", *METHODS)[0].items():
        assert (found["tokens"], found["slots"]) == (found["expected"], found["expected_slots"]), name


@pytest.mark.slow
def test_teacher_forcing_on_a_mesh():
    found, _ = compare("data=2,model=4", "judge:h2o", "judge:d2o")  # three prompts on two times four devices
    for name, judged in found.items():
        assert judged["many"] == pytest.approx(judged["one"], rel=1e-3, abs=1e-4), name


def test_more_devices_than_heads_hold_copies():
    everything, said = quickly()
    found = everything["h2o@demo"]
    assert found["tokens"] == found["expected"]
    assert found["device_bytes"] == pytest.approx(found["bytes"] / 2, rel=0.05)  # two heads, of which each has one
    assert "mesh model=8: 2 devices split the key/value heads, 4 have the same" in said


SOME = "gqa-dynamickv and not bf16 and not int8"


@pytest.mark.parametrize("chosen", slow((SOME, ""), ("",)))
def test_the_laws_hold_on_a_mesh(chosen):
    line = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "tests/test_laws.py"]
    done = subprocess.run(
        [*line, "-k", chosen], env=devices(4, KVJAX_TEST_MESH="data=2,model=2"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_heads_talk_only_where_a_method_needs_all_of_them():
    counts = {name: quickly()[0][f"count:{name}"]["collectives"] for name in COUNTED}
    layers = 2
    # A step: the embedding, attention's and the feed-forward network's sum in each layer; the logits are gathered.
    assert counts["full"] == counts["h2o"] == counts["snapkv"] == {"all-reduce": 1 + 2 * layers, "all-gather": 1}
    assert counts["tova"] == {"all-reduce": 1 + 3 * layers, "all-gather": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [("data=2", None), ("model=0", "data=2,model=4"), ("heads=2", "data=2,model=4"), ("data=2,data=2", "data=2,model")],
)
def test_a_mesh_is_written_so(text, message):
    if message is None:
        assert mesh.parse(text) == mesh.Size(2, 1)
        return
    with pytest.raises(InputError, match=message):
        mesh.parse(text)


@pytest.mark.parametrize(
    ("flags", "words"), [("--mesh data=3", "needs 3 devices, there are 1"), ("--distributed x", "HOST:PORT")]
)
def test_the_command_line_says_what_is_wrong(flags, words):
    with pytest.raises(InputError, match=words):
        main(["--prompt", "a", *flags.split()])


def together(*line: str, count: int = 2, each: int = 2) -> list[subprocess.Popen]:
    """The same command in so many processes, with so many devices each."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    start = lambda i: subprocess.Popen(
        [sys.executable, "-m", *line, "--distributed", f"127.0.0.1:{port},{count},{i}"],
        env=devices(each), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    return [start(i) for i in range(count)]


def test_two_processes_generate_what_one_does(capsys):
    ids = ",".join(map(str, np.random.default_rng(0).integers(2, 4000, 80).tolist()))
    line = ["--prompt-tokens", ids, "--prompt-tokens", ids[:99].rsplit(",", 1)[0], "--json"]
    line += ["--method", "dynamickv", "--budget", "24", "--max-new-tokens", "12"]
    first, second = together("kvjax.generate", *line, "--mesh", "data=2,model=2")
    main(line)
    alone = json.loads(capsys.readouterr().out)
    out, error = first.communicate(timeout=600)
    said, _ = second.communicate()
    assert (first.returncode, second.returncode) == (0, 0), error[-2000:]
    assert said == ""
    assert json.loads(out)["sequences"] == alone["sequences"]


def test_a_process_that_dies_ends_the_others():
    line = ["kvjax.generate", "--prompt-tokens", "1,2,3", "--max-new-tokens", "4000", "--mesh", "data=1,model=4"]
    first, second = together(*line)
    assert first.stdout is not None
    first.stdout.read(1)  # it has begun to write
    error = left_alone(first, second)
    assert "another process" in error or "distributed service" in error


def left_alone(first: subprocess.Popen, second: subprocess.Popen) -> str:
    """Kill the second process; what the first one says when it ends, within a minute."""
    second.kill()
    since = time.monotonic()
    second.communicate()
    _, error = first.communicate(timeout=300)
    assert first.returncode not in (0, None) and time.monotonic() - since < 60, error[-2000:]
    return error


STEPS = "--cr 2 --fade-steps 2 --ramp-steps 4 --final-steps 2 --length 64 --batch 4 --micro-batch 4"


@pytest.fixture
def training(tmp_path) -> list[str]:
    """The command of a retrofit, without its result's place."""
    documents, rng = tmp_path / "documents.jsonl", np.random.default_rng(0)
    lines = ({"tokens": rng.integers(2, 4000, 80).tolist()} for _ in range(60))
    documents.write_text("".join(json.dumps(line) + "\n" for line in lines))
    often = ["--log-every", "1", "--save-every", "1"]
    return ["kvjax.retrofit", "--model", str(tmp_path / "source"), "--data", str(documents), *STEPS.split(), *often]


def finish(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        _, error = process.communicate(timeout=900)
        assert process.returncode == 0, error[-2000:]


def losses(out) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "run" / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_convert_and_retrofit(tmp_path, training):
    """The losses are those of one process, also when a process has died on the way; one process reads the model."""
    finish(together("kvjax.convert", str(shipped.directory()), str(tmp_path / "source"), "--dtype", "float32"))
    alone = [*training, "--out", str(tmp_path / "alone")]
    subprocess.run([sys.executable, "-m", *alone], env=CPU, capture_output=True, check=True)
    assert len(losses(tmp_path / "alone")) == 8
    both = [*training, "--mesh", "data=2,model=2"]
    finish(together(*both, "--out", str(tmp_path / "both")))

    log = tmp_path / "again" / "run" / "log.jsonl"
    first, second = together(*both, "--out", str(tmp_path / "again"))
    while not (log.exists() and log.read_text().count("\n") >= 4):
        assert first.poll() is None and second.poll() is None, first.communicate()[1][-2000:]
        time.sleep(0.01)
    left_alone(first, second)
    assert not (tmp_path / "again" / "kvjax.json").exists()
    finish(together(*both, "--out", str(tmp_path / "again")))

    for name in ("both", "again"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "alone"), rel=1e-3), name
        gate = kvjax.load(tmp_path / name).spec.gate
        assert gate is not None and gate.objective == "dmc"
