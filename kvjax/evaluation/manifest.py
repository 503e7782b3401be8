"""What a run was: `run.json`, and the guard that one folder holds one run."""

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from kvjax.errors import InputError
from kvjax.evaluation.results import RUN, read_run
from kvjax.files import output

PACKAGES = ("kvjax", "jax", "jaxlib", "flax", "numpy", "tokenizers")
MAY_CHANGE = ("tasks", "methods", "budgets", "samples")  # of a run that is continued: each result names its own


def write(
    directory: Path,
    command: Sequence[str],
    arguments: Mapping[str, object],
    calls: Sequence[Mapping[str, object]],
    profiles: Mapping[str, str],
) -> None:
    """Write `run.json` with arguments, versions, commit and device; of a run that is continued, those of every call.

    Args:
      directory: of the run.
      command: module and flags.
      arguments: JSON values that determine the results.
      calls: from `earlier`.
      profiles: digests of those that this call's methods use, by what `split` says.
    """
    call = describe(command) | ({"profiles": dict(profiles)} if profiles else {})
    found = {**call, "arguments": arguments, "calls": [*calls, call]}
    output.write_json(directory / RUN, found)


def describe(command: Sequence[str]) -> dict[str, object]:
    """A call as JSON: the command (module and flags), versions, commit and device."""
    return {
        "command": shlex.join(["python", "-m", *command]),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": commit(),
        "device": jax.devices()[0].device_kind,
    }


def version(package: str) -> str | None:
    """Of an installed package; None of one that is only on the path, or not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def digest(text: str) -> str:
    """A short name of a text's contents."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def earlier(directory: Path, arguments: Mapping[str, object], profiles: Mapping[str, str]) -> list[dict[str, object]]:
    """The calls that have made the results of a folder; `InputError` if they have had other arguments or profiles."""
    arguments = json.loads(json.dumps(arguments))  # as they were read
    path = directory / RUN
    run = read_run(path)
    if not run.keys() >= {"arguments", "calls"}:
        raise InputError(f"{path} does not describe a run: choose another --out")
    before = run["arguments"]
    for name in [name for name in arguments if name not in MAY_CHANGE and before.get(name) != arguments[name]]:
        was, now = (json.dumps(value) for value in (before.get(name), arguments[name]))
        raise InputError(f"{path.parent} holds a run with {name} {was}, not {now}: choose another --out")
    for call in run["calls"]:
        for split, found in (call.get("profiles") or {}).items():
            if profiles.get(split, found) != found:
                raise InputError(f"{path.parent} holds a run with another split={split} profile: choose another --out")
    return run["calls"]


def commit() -> str | None:
    """The commit of the running sources, with a + if they have changed since; None outside a repository."""
    git = ["git", "-C", os.path.dirname(__file__)]
    say = lambda *words: subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout.strip()
    try:
        return say("rev-parse", "--short=12", "HEAD") + ("+" if say("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
