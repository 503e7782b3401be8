"""What a training run leaves on disk: it can be continued, belongs to one process, and holds nothing broken."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from kvjax.errors import InputError
from kvjax.files import output
from kvjax.training import runs

GIVEN = {"seed": 0}
NOISE = np.random.default_rng(0).normal(size=1000)  # Orbax keeps what compresses well in another file


class State(NamedTuple):
    weights: dict
    stage: np.ndarray


def state(value: float) -> State:
    return State({"w": jnp.asarray(value * NOISE, jnp.float32)}, np.asarray(3))


def record(run: runs.Run, *steps: int, loss: float = 1.0, value: float | None = None) -> None:
    for step in steps:
        runs.record(run, {"step": step, "loss": loss}, state(step if value is None else value), force=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of six steps with checkpoints of the fourth and the sixth."""
    with runs.begin(tmp_path / "run", GIVEN, every=2) as run:
        record(run, 2, 4, 6)
    return tmp_path / "run"


def steps(folder: Path) -> list[int]:
    return [entry["step"] for entry in runs.entries(folder / runs.LOG)]


def resumed(folder: Path) -> int:
    """The steps that a run goes on from; its weights must be theirs."""
    with runs.begin(folder, GIVEN, every=2) as run:
        found, done = runs.resume(run, state(0.0))
    np.testing.assert_array_equal(found.weights["w"], state(done).weights["w"])
    assert found.stage == 3
    return done


def test_a_run_goes_on_from_its_newest_checkpoint(folder: Path) -> None:
    with (folder / runs.LOG).open("a") as log:
        log.write('{"step": 8, "loss": 1.0}\n{"step": 9, "lo')  # the checkpoint of the eighth step was not finished
    (folder / "checkpoints" / "8.orbax-checkpoint-tmp").mkdir()
    assert resumed(folder) == 6
    assert steps(folder) == [2, 4, 6]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["4", "6"]


@pytest.mark.parametrize(("loss", "value"), [(np.nan, 1.0), (np.inf, 1.0), (1.0, np.nan), (1.0, -np.inf), (1.0, 1e30)])
def test_nothing_is_written_of_what_is_not_finite(folder: Path, loss: float, value: float) -> None:
    message = r"after 8 steps loss \(.*\) or weights are not finite.*the last checkpoint is that of step 6"
    with pytest.raises(InputError, match=message), runs.begin(folder, GIVEN, every=2) as run:
        record(run, 8, loss=loss, value=value)
    assert steps(folder) == [2, 4, 6]
    assert resumed(folder) == 6


def test_a_checkpoint_that_is_not_finite_is_not_continued(tmp_path: Path) -> None:
    with runs.begin(tmp_path, GIVEN, every=2) as run:
        with pytest.raises(InputError, match="there is no checkpoint yet"):
            record(run, 2, value=np.nan)
        args = ocp.args.StandardSave(tuple(state(np.nan)))
        run.checkpoints.save(2, args=args)
    with pytest.raises(InputError, match="after 2 steps"):
        resumed(tmp_path)


def test_two_runs_do_not_share_a_folder(folder: Path) -> None:
    pytest.importorskip("fcntl")
    with runs.begin(folder, GIVEN, every=2), pytest.raises(InputError, match="another run is writing"):
        with runs.begin(folder, GIVEN, every=2):
            pass
    assert resumed(folder) == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("[1]", "expected a JSON object"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"seed": 1}', "another seed"),
        ('{"seed": 0, "new": []}', "another new"),
    ],
)
def test_a_record_that_is_broken_is_named(folder: Path, text: str, message: str) -> None:
    (folder / "run.json").write_text(text)
    with pytest.raises(InputError, match=rf"run\.json .*{message}"):
        resumed(folder)


@pytest.mark.parametrize("line", ["garbage", '{"loss": 1}', '{"step": "4"}', "[]", '{"step": ' + "9" * 5_000 + "}"])
def test_a_line_of_the_log_that_is_broken_is_named(folder: Path, line: str) -> None:
    path = folder / runs.LOG
    before = f"{line}\n{path.read_text()}"
    path.write_text(before)
    with pytest.raises(InputError, match=r"log\.jsonl:1 "):
        resumed(folder)
    assert path.read_text() == before


@pytest.mark.parametrize("damage", ["remove", "cut"])
def test_a_checkpoint_that_is_damaged_is_named(folder: Path, damage: str) -> None:
    newest = folder / "checkpoints" / "6"
    for path in (newest / "default").rglob("ocdbt.process_*/d/*"):
        path.unlink() if damage == "remove" else path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match=r"checkpoints/6 .*: remove it to go on from the one before"):
        resumed(folder)
    shutil.rmtree(newest)
    assert resumed(folder) == 4 and steps(folder) == [2, 4]


def test_a_full_disk_is_one_line(folder: Path) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = (folder / runs.LOG).read_bytes()
    try:
        with pytest.raises(InputError, match=r"cannot write .*: make room, then start the same command again"):
            with runs.begin(folder, GIVEN, every=2) as run:
                resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 60, limits[1]))
                record(run, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert resumed(folder) == 6 and (folder / runs.LOG).read_bytes() == before


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    output.write(tmp_path / "a.json", b"before")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*a\.json: File too large"):
            output.write(tmp_path / "a.json", b"0" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "a.json").read_text() == "before" and os.listdir(tmp_path) == ["a.json"]
