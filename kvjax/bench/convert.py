"""Conversion: bytes per second and peak memory, of a checkpoint with random weights that is written first."""

import argparse
import json
import multiprocessing
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from kvjax.bench import report, turns
from kvjax.bench.report import Column, Report, Section
from kvjax.bench.shapes import SHAPES
from kvjax.bench.turns import Contestant
from kvjax.checkpoint import hf, names
from kvjax.models.hf_config import to_config
from kvjax.spec import ModelSpec


def write_random(spec: ModelSpec, path: Path) -> int:
    """Write a Hugging Face checkpoint with random weights in bfloat16, a file for each part; returns its bytes."""
    path.mkdir()
    rng, listed, total = np.random.default_rng(0), {}, 0
    for name, tensors in _tensors(spec):
        file = f"{name}.safetensors"
        arrays = {}
        for tensor, shape in tensors.items():
            drawn = rng.random(shape, np.float32) if len(shape) > 1 else np.ones(shape, np.float32)
            arrays[tensor] = (drawn * 0.04 - 0.02 if len(shape) > 1 else drawn).astype(ml_dtypes.bfloat16)
        save_file(arrays, path / file)
        listed |= dict.fromkeys(tensors, file)
        total += sum(array.nbytes for array in arrays.values())
    index = {"metadata": {"total_size": total}, "weight_map": listed}
    for file, content in ((hf.INDEX, index), ("config.json", to_config(spec))):
        (path / file).write_text(json.dumps(content), encoding="utf-8")
    return total


def _tensors(spec: ModelSpec) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """The checkpoint's tensors by part: their names and shapes."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, leaf in hf.abstract(spec, np.float32)[0].items():
        found.setdefault(names.part(path), {}).update(hf.stored_as(path, leaf.shape, spec))
    yield from found.items()


def measured_conversion(source: str, dst: str, dtype: str) -> tuple[float, int, int]:
    """Convert in this process: seconds, and bytes that it held before and at most."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    from kvjax.checkpoint.convert import convert

    before = _status("VmRSS")
    seconds = turns.timed(lambda: convert(source, Path(dst), dtype))
    return seconds, before, _status("VmHWM")


def _status(name: str) -> int:
    """A figure of this process's memory [bytes]; 0 where the system does not say."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(rf"{name}:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else 0


def conversion(source: Path, dst: Path, dtype: str, size: int) -> Contestant:
    """A conversion in a process of its own; `facts` holds the most memory of all turns."""
    facts: dict[str, Any] = {"peak_bytes": 0, "held_bytes": 0}

    def turn() -> float:
        shutil.rmtree(dst, ignore_errors=True)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            seconds, before, peak = pool.submit(measured_conversion, str(source), str(dst), dtype).result()
        facts["peak_bytes"] = max(facts["peak_bytes"], peak)
        facts["held_bytes"] = max(facts["held_bytes"], peak - before)
        return seconds

    return Contestant(f"convert to {dtype}", turn, size, facts=facts)


def copying(source: Path, dst: Path, size: int) -> Contestant:
    """A copy of the files."""

    def turn() -> float:
        shutil.rmtree(dst, ignore_errors=True)
        return turns.timed(lambda: shutil.copytree(source, dst))

    return Contestant("copy of the files", turn, size)


def run(args: argparse.Namespace, command_line: list[str]) -> Report:
    """What the command line asks for."""
    with tempfile.TemporaryDirectory(dir=args.folder, ignore_cleanup_errors=True) as folder:
        source = Path(folder) / "source"
        size = write_random(SHAPES[args.model], source)
        found = [copying(source, Path(folder) / "copy", size)]
        found += [conversion(source, Path(folder) / dtype, dtype, size) for dtype in args.dtypes]
        for each in found:
            each.turn()
        measured = turns.measure(found, args.rounds)
    rows = turns.rows(found, measured, [found[0].name])
    columns = (
        Column("MB/s", "per_s", lambda n: f"{n / 1e6:,.1f}"),
        Column("s", "seconds"),
        Column("x copy", f"x {found[0].name}"),
        Column("MB", "work", lambda n: f"{n / 1e6:,.1f}"),
        Column("peak MB", "peak_bytes", lambda n: f"{n / 1e6:,.0f}"),
        Column("above idle MB", "held_bytes", lambda n: f"{n / 1e6:,.0f}"),
    )
    about = report.about(command_line, model=args.model)
    return Report("convert", about, columns, columns[0], [Section(f"random {args.model}, bfloat16", rows)])
