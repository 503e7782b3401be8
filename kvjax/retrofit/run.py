"""What `kvjax.retrofit` does once its flags are read: train with a progress bar, draw what was learned."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from kvjax.retrofit import curves
from kvjax.retrofit.keep import Learned, train
from kvjax.retrofit.options import KeepOptions, Options
from kvjax.retrofit.train import RUN, Progress, retrofit


def run(chosen: Options, out: Path) -> None:
    """Retrofit a model; `out` becomes its checkpoint."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[about]}"), TimeRemainingColumn())
    bar = Bar(*columns, console=Console(stderr=True))
    task = bar.add_task("retrofitting", total=chosen.schedule.steps, about="")
    with ExitStack() as shown:

        def show(progress: Progress, steps: int) -> None:
            if not bar.live.is_started:  # not before: an error that comes first is one line
                shown.enter_context(bar)
            block = (progress.step - 1) % chosen.log_every + 1
            speed = block * chosen.rows * chosen.length / max(progress.seconds, 1e-9)
            about = f"loss {progress.text:.3f}  CR {progress.rate:.2f} of {progress.target:.2f}  {speed:,.0f} tokens/s"
            bar.update(task, completed=progress.step, description=progress.stage, about=about)

        complete = retrofit(chosen, out, show)
    if jax.process_index():
        return
    try:
        curves.save(out / RUN)
        if complete:
            curves.save_rates(out, out / RUN / "rates.png")
    except ModuleNotFoundError:
        print("no picture: pip install 'kvjax[eval]' for matplotlib", file=sys.stderr)
    again = "" if complete else " so far; start the same command again to go on"
    print(f"{out}: {curves.describe(out / RUN)}{again}")


def keep(chosen: KeepOptions, out: Path) -> None:
    """Train the gates that tell which tokens a model should keep; `out` becomes their file."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[about]}"), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True)) as bar:
        reading, task = (
            bar.add_task(name, total=n, about="") for name, n in (("reading", 1), ("training", chosen.steps))
        )

        def read(texts: np.ndarray) -> Iterator[np.ndarray]:
            for index, text in enumerate(texts):
                bar.update(reading, total=len(texts), completed=index)
                yield text
            bar.update(reading, completed=len(texts))

        def show(learned: Learned) -> None:
            about = f"loss {learned.loss:.4f}  {learned.agreement:.0%} of the best"
            bar.update(task, completed=learned.step, about=about)

        last = train(chosen, out, show, read)
    print(f"{out}: of what texts need most, {last.agreement:.1%} is named; loss {last.loss:.4f}, {last.step} steps")
