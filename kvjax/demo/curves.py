"""Draw how a model learned: `python -m kvjax.demo.curves DIR ...`, which writes `curves.png` into the last folder.

Accuracies and losses of the training documents, over the tokens that were read, with the stages of the course; several
folders are runs that continued one another.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvjax.corpus import data
from kvjax.demo import course
from kvjax.plotting import COLOURS, DASHES, save_figure
from kvjax.training import runs

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

SMOOTH = 5  # blocks that a point is the mean of


def draw(entries: Sequence[dict[str, Any]]) -> "matplotlib.figure.Figure":
    """A picture of the entries of a log."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    read = np.cumsum([entry["tokens"] for entry in entries]) / 1e6
    for index, (name, kind) in enumerate(data.KINDS.items()):
        axes, field = (lower, "losses") if name == "text" else (upper, "accuracy")
        found = [(x, entry[field][name]) for x, entry in zip(read, entries, strict=True) if name in entry[field]]
        if found:
            style = {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index // len(COLOURS)]}
            x, y = np.transpose(found)
            axes.plot(x, _smooth(y), label=f"{name} ({kind.share:.0%} of documents)", **style)
    _stages(upper, read, [entry["stage"] for entry in entries])
    upper.set(ylabel="tokens of answers that are exact", ylim=(0, 1.12))
    lower.set(ylabel="loss of plain text [nats]", xlabel="tokens read [millions]")
    for axes in filter(lambda axes: axes.get_legend_handles_labels()[0], (upper, lower)):
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _smooth(values: np.ndarray) -> np.ndarray:
    """The mean of each value and the few before it."""
    return np.array([values[max(0, i + 1 - SMOOTH) : i + 1].mean() for i in range(len(values))])


def _stages(axes: "matplotlib.axes.Axes", read: np.ndarray, stages: Sequence[int]) -> None:
    """Mark where documents become longer."""
    for index, stage in enumerate(stages):
        if index == 0 or stage != stages[index - 1]:
            start = 0.0 if index == 0 else float(read[index - 1])
            axes.axvline(start, color="0.8", linewidth=0.8, zorder=0)
            height = 1.03 + 0.04 * (stage % 2)  # stages may be short
            axes.text(start, height, f" {max(course.COURSE[stage].lengths)}", fontsize=8, color="0.4")


def main(argv: list[str] | None = None) -> None:
    """Draw the curves of a run, or of several that continued one another."""
    parser = argparse.ArgumentParser(prog="python -m kvjax.demo.curves", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="DIR", help="folder of a run: --out of the training")
    folders = parser.parse_args(argv).runs
    entries = [entry for folder in folders for entry in runs.entries(folder / runs.LOG)]
    save_figure(draw(entries), folders[-1] / "curves.png")


if __name__ == "__main__":
    main()
