"""`bench device`: time is shared, and no stage that hangs, is killed or fails ends the others."""

import json
import sys

import pytest

from kvjax.bench import __main__ as bench
from kvjax.bench import device
from kvjax.bench.device import Stage
from kvjax.bench.shapes import STAGES

PARTIAL = """
import json, os, pathlib, signal, sys, time
pathlib.Path(sys.argv[-1], "decode.json").write_text(json.dumps({"sections": [1]}))
"""
WAYS = {
    "hangs": (PARTIAL + "time.sleep(600)", "cut after 1 s"),
    "killed": (PARTIAL + "os.kill(os.getpid(), signal.SIGKILL)", "failed with status -9"),
    "fails": (PARTIAL + "raise MemoryError('no room')", "failed with status 1: MemoryError: no room"),
    "works": (PARTIAL, "finished"),
}


def test_what_a_stage_had_measured_stays_and_the_next_one_runs(tmp_path):
    todo = [Stage(name, 1.0, ["-c", code]) for name, (code, _) in WAYS.items()]
    found = [device.measure(stage, tmp_path / stage.name, 1.0 if stage.name == "hangs" else 60.0) for stage in todo]
    for done, (_, ended) in zip(found, WAYS.values(), strict=True):
        assert done["ended"].startswith(ended) and done["report"] == {"sections": [1]}


def test_time_is_shared_and_what_is_left_goes_on(tmp_path):
    todo = [Stage("a", 3.0, ["-c", "import time; time.sleep(60)"]), Stage("b", 1.0, ["-c", ""])]
    slow, quick = device.every(todo, tmp_path, 8.0)
    assert slow["limit_s"] == pytest.approx(6.0, abs=0.1) and slow["ended"] == "cut after 6 s"
    assert quick["limit_s"] == pytest.approx(2.0, abs=0.5) and quick["report"] is None


@pytest.mark.parametrize(("sizes", "memory"), [("tiny", 0.0), ("full", 141e9), ("full", 16e9)])
def test_stages_are_commands_of_bench_that_read_their_flags(sizes, memory, monkeypatch):
    todo = device.stages(sizes, memory)
    assert tuple(stage.name for stage in todo) == STAGES
    for stage in todo:
        name, *flags = stage.argv[2:]
        args = bench.parser(name).parse_args(flags)
        bench.settings_of(name)(args)


@pytest.mark.slow
def test_from_start_to_end_on_a_cpu(tmp_path):
    bench.main(["device", "--sizes", "tiny", "--minutes", "30", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "device.json").read_text())
    assert [(s["name"], s["ended"]) for s in found["stages"]] == [(name, "finished") for name in STAGES]
    rows = [row for stage in found["stages"] for section in stage["report"]["sections"] for row in section["rows"]]
    assert all("wrong" not in row.get("failed", "") for row in rows)
    checked = [row for section in found["stages"][0]["report"]["sections"] for row in section["rows"] if "off" in row]
    assert len(checked) > 12 and max(row["off"] for row in checked) < 1e-4
    page = (tmp_path / "device.md").read_text()
    assert all(f"\n## {name}\n" in page for name in STAGES) and sys.version.split()[0] in page
