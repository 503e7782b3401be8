"""What a training run leaves on disk so that it can be continued: its arguments, its log, its checkpoints."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from kvjax.errors import InputError

State = TypeVar("State", bound=tuple)


def check(out: Path, given: Mapping[str, Any]) -> None:
    """Write `run.json`, or refuse to continue a run that was given something else; the first process does."""
    if jax.process_index():
        return
    path = out / "run.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}") from None
    if not path.exists():
        path.write_text(json.dumps(given, indent=2) + "\n")
    elif (known := json.loads(path.read_text())) != given:
        changed = [key for key in {**known, **given} if given.get(key) != known.get(key)]
        raise InputError(f"{path} is of a run with another {', '.join(changed)}: choose another --out")


def manager(out: Path, every: int, keep: int = 2) -> ocp.CheckpointManager:
    """Checkpoints of a run: the newest few, at multiples of `every` steps."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, save_interval_steps=every)
    return ocp.CheckpointManager((out / "checkpoints").absolute(), options=options)


def resume(manager: ocp.CheckpointManager, state: State, log: Path) -> tuple[State, int]:
    """The newest checkpoint and the steps it has done; the log is cut to them."""
    done = manager.latest_step() or 0
    if done:
        found = manager.restore(done, args=ocp.args.StandardRestore(tuple(state)))
        state = type(state)(*found)  # pyright: ignore[reportCallIssue]
    if jax.process_index():
        return state, done
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    log.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= done))
    return state, done


def append(log: Path, entry: dict[str, Any]) -> None:
    """One more line of the log, by the first process."""
    if jax.process_index():
        return
    with log.open("a") as file:
        file.write(json.dumps(entry) + "\n")
