"""What `kvjax.retrofit` does once its flags are read: train with a progress bar, draw what was learned."""

import sys
from contextlib import ExitStack
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from kvjax.retrofit import curves
from kvjax.retrofit.options import Options
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
