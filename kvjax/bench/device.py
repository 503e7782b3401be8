"""All that decides on an accelerator in one call: other bench commands, each in a process of its own."""

import argparse
import datetime
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from kvjax.errors import InputError
from kvjax.evaluation import manifest
from kvjax.files import output

PROBE = """import json, jax
device = jax.devices()[0]
memory = (device.memory_stats() or {}).get("bytes_limit", 0)
print(json.dumps({"platform": jax.default_backend(), "device": device.device_kind, "memory": memory}))
"""
PATIENCE = 120  # seconds until a machine has said what it is
LARGE = 40e9  # bytes that a device has for a model of eight billion parameters in 16 bits, and its caches


class Stage(NamedTuple):
    """A command that is a part of the whole.

    Attributes:
      name: of its folder and its chapter.
      share: of the time that is left, against those of the later ones.
      argv: what is run; `--out` and a folder are added.
    """

    name: str
    share: float
    argv: list[str]


def stages(sizes: str, memory: float) -> list[Stage]:
    """What is measured, the most important first, at the sizes of a CPU (`tiny`) or of an accelerator.

    Args:
      sizes: tiny or full.
      memory: of the device [bytes].
    """
    tiny = sizes == "tiny"
    model = "llama-tiny" if tiny else "llama-3-8b" if memory >= LARGE else "llama-3.2-1b"
    shapes = lambda small, *large: ",".join(f"{model}:{each}" for each in ([small] if tiny else large))
    auto = lambda *methods: ",".join(f"{method}+kernels=auto" for method in methods)
    rounds, steps = ("--rounds 1", "--rounds 1 --steps 2") if tiny else ("--rounds 5", "--rounds 5")
    how, checked = ("auto,interpret", "llama-88m:64:1") if tiny else ("auto", f"{model}:4096:2")
    decode = f"decode --model {model} --contexts {256 if tiny else 16384} --prefill cheap {steps}"
    kept = auto("full", "full+store=int8", "full+store=int4", "snapkv:20%", "h2o:20%")
    batch, equal = (2, "4MB") if tiny else (8, "40GB" if memory >= LARGE else "12GB")
    attention = shapes("256:2", "32768:16", "131072:4", "4096:16")
    prompts = "topk_retain,segment_merge,column_sums,column_max,window_sums,prefill_attention"
    contexts, few = "256" if tiny else "8192,32768", auto("full", "snapkv:20%", "h2o:20%")
    found = {
        "correctness": (2, f"kernels --check --implementations {how} --shapes {checked}"),
        "decode-attention": (4, f"kernels --kernels decode_attention --shapes {attention} --against none {rounds}"),
        "step": (3, f"{decode} --methods full+kernels=auto,full+kernels=xla --batch {batch}"),
        "step-methods": (4, f"{decode} --methods {kept} --batch {batch}"),
        "throughput": (4, f"{decode} --methods {kept} --batch max --memory {equal}"),
        "prompt-kernels": (2, f"kernels --kernels {prompts} --shapes {shapes('256', '8192', '32768')} {rounds}"),
        "prefill": (2, f"prefill --model {model} --contexts {contexts} --methods {few} {rounds}"),
    }
    return [Stage(name, share, ["-m", "kvjax.bench", *line.split()]) for name, (share, line) in found.items()]


def limit(left: float, todo: Sequence[Stage]) -> float:
    """Seconds that the first of the stages may take: its share of what is left; what it does not need is the others'.

    >>> limit(60, [Stage("a", 2, []), Stage("b", 1, [])]), limit(50, [Stage("b", 1, [])])
    (40.0, 50.0)
    """
    return left * todo[0].share / sum(stage.share for stage in todo)


def measure(stage: Stage, folder: Path, seconds: float) -> dict[str, Any]:
    """Run a stage; whatever becomes of it, what it had written by then is there.

    Args:
      stage: what to run.
      folder: for its results, and what it says (`log`).
      seconds: after which it is ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    argv = [sys.executable, *stage.argv, "--out", str(folder)]
    start, log = time.monotonic(), folder / "log"
    with log.open("wb") as said:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said)
        try:
            status = process.wait(max(seconds, 0.0))
            ended = "finished" if status == 0 else f"failed with status {status}: {_last(log)}"
        except subprocess.TimeoutExpired:
            ended = f"cut after {seconds:.0f} s"
        finally:
            process.kill()
            process.wait()
    report = next((json.loads(path.read_text()) for path in folder.glob("*.json")), None)
    command, took = shlex.join(["python", *stage.argv]), time.monotonic() - start
    return {
        "name": stage.name,
        "command": command,
        "ended": ended,
        "seconds": took,
        "limit_s": seconds,
        "report": report,
    }


def _last(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def every(todo: Sequence[Stage], out: Path, seconds: float) -> Iterator[dict[str, Any]]:
    """Run all stages in so many seconds."""
    until = time.monotonic() + seconds
    for i, stage in enumerate(todo):
        yield measure(stage, out / "stages" / stage.name, limit(until - time.monotonic(), todo[i:]))


def machine() -> dict[str, Any]:
    """Platform, name and memory of the device, asked in a process of its own: none here holds its memory."""
    try:
        asked = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise InputError(f"JAX has not found its device in {PATIENCE} s") from None
    if asked.returncode:
        raise InputError(f"JAX finds no device: {asked.stderr.strip().splitlines()[-1]}")
    return json.loads(asked.stdout.splitlines()[-1])


def page(found: dict[str, Any], out: Path) -> str:
    """What was measured, as Markdown."""
    reports = [stage["report"] for stage in found["stages"] if stage["report"]]
    versions = ", ".join(f"{name} {each}" for name, each in (reports[0]["versions"] if reports else {}).items())
    lines = [
        f"# {found['date'][:10]}: {found['hardware']['device']}",
        f"`{found['command']}` at commit {found['commit']}",
        ", ".join(f"{name} {value}" for name, value in (reports[0] if reports else found)["hardware"].items()),
        versions,
        "\n".join(
            ["| stage | s | of | ended |", "| --- | ---: | ---: | --- |"]
            + [f"| {s['name']} | {s['seconds']:.0f} | {s['limit_s']:.0f} | {s['ended']} |" for s in found["stages"]]
        ),
    ]
    for stage in found["stages"]:
        lines += [f"## {stage['name']}", f"`{stage['command']}`: {stage['ended']}."]
        for table in sorted((out / "stages" / stage["name"]).glob("*.md")):
            chapters = re.split(r"^## ", table.read_text(), flags=re.MULTILINE)[1:]
            lines += [f"### {chapter.strip()}" for chapter in chapters]
    return "\n\n".join(filter(None, lines)) + "\n"


def run(args: argparse.Namespace, command_line: list[str]) -> None:
    """What the command line asks for."""
    until = time.monotonic() + 60 * args.minutes
    device = machine()
    sizes = args.sizes or ("tiny" if device["platform"] == "cpu" else "full")
    found: dict[str, Any] = {
        "bench": "device", "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", *command_line]), "commit": manifest.commit(), "hardware": device,
        "sizes": sizes, "minutes": args.minutes, "stages": [],
    }  # fmt: skip
    todo = [stage for stage in stages(sizes, device["memory"]) if stage.name in args.stages]
    say = Console(stderr=True)
    for done in every(todo, args.out, until - time.monotonic()):
        found["stages"].append(done)
        say.print(f"{done['name']}: {done['ended']}, {done['seconds']:.0f} s", highlight=False, markup=False)
        output.write_json(args.out / "device.json", found)
        output.write(args.out / "device.md", page(found, args.out).encode())
    print(json.dumps(found) if args.json else page(found, args.out))
