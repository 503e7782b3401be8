"""What a training run leaves on disk so that it can be continued: its arguments, its log, its checkpoints."""

import contextlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from kvjax.errors import InputError
from kvjax.files import journal, output
from kvjax.files.text import read_json
from kvjax.parallel import mesh
from kvjax.spec import PyTree

if TYPE_CHECKING:
    import orbax.checkpoint

LOG = "log.jsonl"
State = TypeVar("State", bound=tuple)


class Run(NamedTuple):
    """An open folder of a run."""

    folder: Path
    checkpoints: "orbax.checkpoint.CheckpointManager"


@contextlib.contextmanager
def begin(folder: Path, given: Mapping[str, Any], every: int, keep: int = 2) -> Iterator[Run]:
    """Open the folder of a run, or refuse to continue one that was given something else; one run at a time.

    Args:
      folder: is made if it is not there.
      given: what `run.json` says, as JSON has it; the first process writes it.
      every: steps between checkpoints.
      keep: checkpoints that stay, the newest ones.
    """
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=keep, save_interval_steps=every, cleanup_tmp_directories=True)
    with _alone(folder), _quiet(logging.getLogger("absl")):
        _check(folder / "run.json", given)
        manager = ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options)
        try:
            yield Run(folder, manager)
        finally:
            with _reported(f"cannot write a checkpoint into {folder}", journal.AGAIN):
                manager.close()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other runs out of the folder; the first process does."""
    if jax.process_index():
        yield
        return
    with journal.open_lines(folder / "lock") as file:
        journal.lock(file, folder)
        yield


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Keep what is raised as well from being told by every thread of Orbax."""
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _reported(what: str, then: str) -> Iterator[None]:
    """Orbax raises whatever it meets, from `OSError` to `Exception`."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(" [tensorstore_spec")[0]
        raise InputError(f"{what} ({reason}): {then}") from error


def _check(path: Path, given: Mapping[str, Any]) -> None:
    if jax.process_index():
        return
    if not path.exists():
        output.write_json(path, given)
    elif (known := read_json(path)) != given:
        changed = [key for key in {**known, **given} if given.get(key) != known.get(key)]
        raise InputError(f"{path} is of a run with another {', '.join(changed)}: choose another --out")


def resume(run: Run, state: State) -> tuple[State, int]:
    """The newest checkpoint and the steps it has done; the log is cut to them."""
    import orbax.checkpoint as ocp

    done = run.checkpoints.latest_step() or 0
    if done:
        where = f"{run.folder / 'checkpoints'}/{done}"
        with _reported(f"cannot read {where}", "remove it to go on from the one before"):
            found = run.checkpoints.restore(done, args=ocp.args.StandardRestore(tuple(state)))
        state = type(state)(*found)  # pyright: ignore[reportCallIssue]
        check_finite(run, done, 0.0, state)
    if not jax.process_index():
        log = run.folder / LOG
        kept = [entry for entry in entries(log) if entry["step"] <= done] if log.exists() else []
        output.write(log, "".join(json.dumps(entry) + "\n" for entry in kept).encode())
    return state, done


def record(run: Run, entry: dict[str, Any], state: tuple, *, force: bool) -> None:
    """One more line of the log, and a checkpoint when its time has come; of what is finite.

    Args:
      run: where.
      entry: with the `step` and its `loss`; the first process writes it.
      state: after it.
      force: write a checkpoint anyway.
    """
    import orbax.checkpoint as ocp

    check_finite(run, entry["step"], entry["loss"], state)
    if not jax.process_index():
        with journal.open_lines(run.folder / LOG) as file:
            journal.append(file, [entry])
    with _reported(f"cannot write a checkpoint into {run.folder}", journal.AGAIN):
        run.checkpoints.save(entry["step"], args=ocp.args.StandardSave(tuple(state)), force=force)


def check_finite(run: Run, step: int, loss: float, weights: PyTree) -> None:
    """Raise `InputError` for what must never be written: a loss or weights that are not finite after some steps."""
    if math.isfinite(loss) and bool(mesh.read(_have_norms(weights))):
        return
    last = run.checkpoints.latest_step()
    there = "there is no checkpoint yet" if last is None else f"the last checkpoint is that of step {last}"
    raise InputError(
        f"{run.folder}: after {step} steps loss ({loss:g}) or weights are not finite, nothing is written of them:"
        f" {there}; choose another --out, and a smaller --learning-rate"
    )


@jax.jit
def _have_norms(tree: PyTree) -> jax.Array:
    """Whether the squares of all arrays have finite sums: numbers beyond are of no use to the next step either."""
    numbers = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(jnp.square(leaf).sum()) for leaf in numbers]).all()


def entries(log: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    try:
        raw = log.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {log}: {error.strerror}") from None
    found = []
    for number, entry, _ in journal.lines(raw, log):
        if not isinstance(entry, dict) or type(entry.get("step")) is not int:
            raise InputError(f"{log}:{number} has no step: it is not a line of a run's log")
        found.append(entry)
    return found
