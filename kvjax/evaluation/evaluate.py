"""What `kvjax.evaluate` does once its flags are read: load, draw samples, run the grid, write every batch's results."""

import argparse
import functools
import itertools
import shlex
import time
from collections.abc import Sequence
from io import FileIO
from typing import Any, NamedTuple

import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvjax import compilation
from kvjax.checkpoint.identity import fingerprint
from kvjax.cli.console import to_stdout
from kvjax.cli.flags import numbers
from kvjax.errors import InputError, say_once
from kvjax.evaluation import grid as grids
from kvjax.evaluation import manifest, runner
from kvjax.evaluation.grid import BATCH_TOKENS, Point
from kvjax.evaluation.runner import Evaluation
from kvjax.generation.generate import check_recipe
from kvjax.generation.model import Model, load_from
from kvjax.methods import read_entry
from kvjax.policies.budgets import profile
from kvjax.tasks.task import Request, Sample, Task

LENGTHS = {"short": (512, 1024), "natural": (2048, 4096)}


def run(
    args: argparse.Namespace,
    command: list[str],
    tasks: list[Task],
    grid: list[Point],
    settings: dict[str, dict[str, str]],
    text: str | None,
) -> None:
    """Run the samples of `tasks` that have no result in `--out` yet through every point of `grid`.

    Args:
      args: of the command line.
      command: the command line.
      tasks, grid, settings, text: what it asks for.
    """
    load = functools.partial(load_from, ignore_config=args.ignore_config, mesh=args.mesh)
    model, directory = load(args.model, **numbers(args))
    reference, origin = (None, None) if args.reference is None else load(args.reference, dtype=numbers(args)["dtype"])
    for point in grid:
        check_recipe(model, point.recipe)
    weights, profiles = fingerprint(directory), _profiles(model, grid, settings)
    _check_profile(model, weights, profiles)
    request, chat = build_request(args, model, text)
    samples = {task.name: task.samples(request) for task in tasks}
    batch = args.batch or max(1, BATCH_TOKENS // max(request.lengths))
    arguments: dict[str, Any] = {
        "model": model.name, "weights": weights, "stop": model.stop,
        "reference": reference and reference.name, "reference_weights": origin and fingerprint(origin),
        "tasks": list(samples),
        "methods": list(dict.fromkeys(point.method for point in grid)),
        "budgets": grids.budgets(args), "samples": args.samples, "seed": args.seed,
        "lengths": request.lengths, "form": request.form, "question": args.question, "chat": chat, "batch": batch,
        "asked": "beside" if args.question == "unseen" else None,  # of a context, not after it as in earlier versions
        "settings": settings, "data": args.data and str(args.data),
        "text": manifest.digest(request.text),
        "dtype": jnp.dtype(model.decoder.dtype).name, "bits": model.spec.weights, "ignore_config": args.ignore_config,
    }  # fmt: skip
    unseen = args.question == "unseen"
    evaluation = Evaluation(model, batch=batch, unseen=unseen, chat=chat, reference=reference)
    with runner.results(args.out) as (done, file):
        calls = manifest.earlier(args.out, arguments, profiles) if done else []
        evaluation.check(samples, done)
        manifest.write(args.out, command, arguments, calls, profiles)
        run_grid(evaluation, tasks, samples, grid, done, file)
    to_stdout().print(f"python -m kvjax.evaluate report {shlex.quote(str(args.out))}", highlight=False)


def _profiles(model: Model, grid: Sequence[Point], settings: dict[str, dict[str, str]]) -> dict[str, str]:
    """Digests of the profiles that methods use, by what their `split` says."""
    entries = (read_entry(point.method) for point in grid)
    splits = {({"split": ""} | settings.get(name, {}) | given)["split"] for name, given in entries}
    found = {split: profile.read(profile.find(split)) for split in splits if split.endswith(".json")}
    if "profile" in splits and model.spec.profile is not None:
        found["profile"] = model.spec.profile
    return {split: manifest.digest(repr((spec.levels, spec.shares))) for split, spec in found.items()}


def _check_profile(model: Model, weights: str, profiles: dict[str, str]) -> None:
    """Say where the profile that lies beside the weights is of other ones."""
    own = model.spec.profile
    if "profile" in profiles and own is not None and own.model not in ("", weights):
        say_once(f"{own.source} was measured on other weights: python -m kvjax.calibrate measures these")


def build_request(args: argparse.Namespace, model: Model, text: str | None) -> tuple[Request, bool]:
    """What tasks are told to write prompts, and whether these are wrapped in the chat template."""
    form = args.form or ("short" if args.model is None else "natural")
    chat = form == "natural" and not args.no_chat and model.tokenizer is not None and model.tokenizer.has_template
    lengths = _lengths(args.lengths, model, form)
    return runner.request(
        model, samples=args.samples, seed=args.seed, lengths=lengths, form=form, chat=chat, text=text, data=args.data
    ), chat


def _lengths(given: tuple[int, ...] | None, model: Model, form: str) -> tuple[int, ...]:
    limit = model.spec.max_position
    if given is None:
        return tuple(sorted({min(length, limit) for length in LENGTHS[form]}))
    if max(given) > limit:
        raise InputError(f"--lengths {max(given)} is more than {limit}, the model's context limit")
    return given


def run_grid(
    evaluation: Evaluation,
    tasks: list[Task],
    samples: dict[str, list[Sample]],
    grid: list[Point],
    done: runner.Done,
    file: FileIO,
) -> None:
    """Run what has no result yet, and write every batch's results as soon as they are there."""
    batches = {task.name: list(evaluation.batches(task, samples[task.name])) for task in tasks}
    left = [Work(p, t, b) for p in grid for t in tasks for b in batches[t.name] if not _keys(t, p, b) <= done.keys()]
    total, ran, start = sum(len(work.batch.samples) for work in left), 0, time.monotonic()
    console = Console(stderr=True, highlight=False)
    console.print(f"{total} samples to run, in {len(grid)} methods and budgets")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=console, disable=not console.is_terminal)
    with bars as progress, compilation.few_programs() as forget:  # a long grid would fill the memory with code
        bar = progress.add_task("", total=total)
        for _, works in itertools.groupby(left, key=lambda work: work.point):
            for name, several in itertools.groupby(works, key=Work.name):
                progress.update(bar, description=name)
                for work in several:
                    try:
                        lines = evaluation.run(work.task, work.point, work.batch)
                    except InputError as error:
                        raise InputError(f"{name}: {error}") from None
                    runner.append(file, lines, done)
                    progress.advance(bar, len(lines))
                    ran += len(lines)
                if not console.is_terminal:  # where a bar shows nothing until the end
                    minutes = (time.monotonic() - start) / 60
                    rest = minutes / ran * (total - ran)
                    console.print(f"{name}: {ran} of {total} in {minutes:.1f} min, about {rest:.1f} min left")
            forget()


class Work(NamedTuple):
    """A batch under one method and budget."""

    point: Point
    task: Task
    batch: runner.Batch

    def name(self) -> str:
        """What it is, for the screen."""
        return f"{self.task.name} {self.point.method} {self.point.budget or ''}".strip()


def _keys(task: Task, point: Point, batch: runner.Batch) -> set[runner.Key]:
    return {(task.name, s.part, s.index, s.asked, point.method, point.budget) for s in batch.samples}
