"""Pictures of a run: quality over cache bytes, and whether the needle was found by depth and length.

Methods differ in colour (Okabe and Ito's, for colour-blind readers), marker and line style: they can be told apart in
grey and when there are many. matplotlib is imported when a picture is drawn.
"""

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from kvjax.errors import InputError
from kvjax.evaluation.results import Line, Row, by_task, model_of
from kvjax.methods import label_of
from kvjax.plotting import COLOURS, DASHES, save_figure

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

MARKERS = ("o", "s", "^", "D", "v", "<", "X", "P", ">", "h", "p")
FULL = {"color": "black", "marker": "*", "markersize": 13, "linestyle": "none", "markeredgecolor": "white"}
PARTIAL = {"markerfacecolor": "white", "markeredgecolor": "auto", "linestyle": "none"}
BARS = {"elinewidth": 1.0, "capsize": 2, "markeredgewidth": 0.7}
AXES = {
    "score": "score (higher is better)",
    "perplexity": "perplexity (lower is better)",
    "kl": "KL from the full cache [nats]\n(lower is better)",
}
SAFE = "+=,()"  # what names of files show as it is, beside letters and digits
DEPTHS = 11  # most rows of a needle picture; more depths than that are rounded to tenths


def save(rows: Sequence[Row], lines: Iterable[Line], run: dict[str, Any], directory: Path) -> list[Path]:
    """Draw all pictures of a run.

    Args:
      rows: of whole tasks.
      lines: all samples.
      run: what was run.
      directory: for the files.

    Returns:
      The files, frontier.png first.
    """
    given = run.get("arguments", {})
    what = ", ".join(filter(None, (model_of(run), f"question {given['question']}" if given.get("question") else "")))
    title = lambda head: f"{head} ({what})" if what else head
    figures = {"frontier": frontier(rows, title("Quality and cache size"))}
    needles: dict[str, list[Line]] = {}
    for line in lines:
        if line["task"] == "needle" and {"depth", "length"} <= set(line.get("facts") or {}):
            needles.setdefault(line["method"], []).append(line)
    for method, found in needles.items():
        figures[f"needle_{quote(method, safe=SAFE)}"] = needle(found, title(f"Needle in a haystack, {method}"))
    return [save_figure(figure, directory / f"{name}.png") for name, figure in figures.items()]


def frontier(rows: Sequence[Row], title: str) -> "matplotlib.figure.Figure":
    """Quality over cache bytes per token: a panel per task, a line per method through its budgets."""
    tasks, methods = by_task(rows), dict.fromkeys(row.method for row in rows if row.method != "full")
    styles = {method: style(index) for index, method in enumerate(methods)}
    width = min(len(tasks), 3)
    longest = max((len(label_of(method)) for method in methods), default=0)
    fitting = int(max(6, 3.4 * width) / (0.8 + 0.08 * longest))  # inches of an entry of the legend: mark and letters
    columns = max(1, min(2 * width, fitting))
    figure, panels = blank(len(tasks), width, (3.4, 2.8), 1.1 + 0.4 * len(methods) / columns, title)
    for (task, members), axes in zip(tasks.items(), panels, strict=True):
        axes.set_title(plain(task), fontsize=11)
        panel(axes, members, styles)
    looks = {"full cache": FULL} if any(row.method == "full" for row in rows) else {}
    looks |= {plain(label_of(method)): look for method, look in styles.items()}
    if any(row.n < row.largest for row in rows):
        looks["fewer samples than others"] = {"color": "0.4", "marker": "o", **PARTIAL}
    legend(figure, looks, columns)
    return figure


def style(index: int) -> dict[str, Any]:
    """How a method's line looks: the same again only after 330 methods."""
    pick = lambda cycle: cycle[index % len(cycle)]
    return {"color": pick(COLOURS), "marker": pick(MARKERS), "linestyle": pick(DASHES), "markersize": 6.5}


def panel(axes: "matplotlib.axes.Axes", rows: Sequence[Row], styles: dict[str, dict[str, Any]]) -> None:
    """One task."""
    scale_x(axes, [row.bytes_per_token for row in rows])
    scale_y(axes, rows)
    for method, look in styles.items():
        points = sorted((row for row in rows if row.method == method), key=lambda row: row.bytes_per_token)
        draw(axes, points, {"linewidth": 1.4, "markeredgecolor": "white", **look})
        if partial := [row for row in points if row.n < row.largest]:
            axes.plot(*place(partial), **{**look, **PARTIAL, "zorder": 4})
    for row in rows:
        if row.method == "full":
            star(axes, row)
    axes.set_xlabel("cache bytes per token (16 bits)")
    axes.set_ylabel(AXES[rows[0].metric])
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw(axes: "matplotlib.axes.Axes", points: Sequence[Row], look: dict[str, Any]) -> None:
    """Points with their intervals."""
    ends = [[row.value - row.low for row in points], [row.high - row.value for row in points]]
    drawn = axes.errorbar(*place(points), np.maximum(ends, 0), **look, **BARS)
    for bars in (*drawn.lines[1], *drawn.lines[2]):  # behind all lines
        bars.set(alpha=0.6, zorder=1.8)


def place(points: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Where points lie: x and y."""
    return [row.bytes_per_token for row in points], [row.value for row in points]


def star(axes: "matplotlib.axes.Axes", row: Row) -> None:
    """The full cache: a star and a dashed line across; or an arrow to where it lies below a logarithmic axis."""
    if row.value >= axes.get_ylim()[0] or axes.get_yscale() != "log":
        axes.axhline(row.value, color="black", linestyle=(0, (6, 4)), linewidth=0.9, zorder=1.5)
        draw(axes, [row], {**FULL, "zorder": 5})
        return
    x, across = row.bytes_per_token, axes.get_xaxis_transform()
    axes.plot([x], [0.16], **FULL, transform=across)
    axes.annotate("", (x, 0), (x, 0.15), across, arrowprops={"arrowstyle": "->"})
    axes.text(x, 0.22, f"full: {row.value:.1g}", transform=across, ha="center", fontsize=8)


def scale_x(axes: "matplotlib.axes.Axes", values: Sequence[float]) -> None:
    """Bytes: logarithmic if they span more than a factor of 4."""
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter("B"))
    if min(values) > 0 and max(values) / min(values) > 4:
        logarithmic(axes, "x", EngFormatter("B"))
        axes.set_xlim(min(values) / 1.25, 1.25 * max(values))
    else:
        axes.set_xlim(0, 1.08 * max(values))


def scale_y(axes: "matplotlib.axes.Axes", rows: Sequence[Row]) -> None:
    """Scores from 0 to 1; divergences logarithmic if they are positive and span more than a factor of 10."""
    methods = [row for row in rows if row.method != "full"]
    values = [row.value for row in methods]
    if rows[0].metric == "score":
        axes.set_ylim(-0.04, 1.04)
    elif rows[0].metric == "kl" and values and min(values) > 0 and max(values) / min(values) > 10:
        logarithmic(axes, "y", lambda value, _: f"{value:g}")
        axes.set_ylim(min(values) / 3, 1.3 * max([*values, *(row.high for row in methods if math.isfinite(row.high))]))


def logarithmic(axes: "matplotlib.axes.Axes", axis: str, form: Callable) -> None:
    """A logarithmic axis with ticks at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set(**{f"{axis}scale": "log"})
    target = {"x": axes.xaxis, "y": axes.yaxis}[axis]
    target.set_major_locator(LogLocator(subs=(1, 2, 5)))
    target.set_major_formatter(form)
    target.set_minor_locator(NullLocator())


def legend(figure: "matplotlib.figure.Figure", looks: dict[str, dict[str, Any]], columns: int) -> None:
    """One legend for the figure, below the panels."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **{"linewidth": 1.4, "markeredgecolor": "white", **look}) for look in looks.values()]
    figure.legend(
        handles,
        list(looks),
        loc="outside lower center",
        ncols=columns,
        title="bars: 95% intervals",
        fontsize=9,
        title_fontsize=9,
        frameon=False,
        handlelength=3.5,
    )


def needle(lines: Sequence[Line], title: str) -> "matplotlib.figure.Figure":
    """One method's scores: a panel per budget, rows by depth of the needle, columns by length of the prompt."""
    grids = tabulate(lines)
    depths, lengths = (sorted({spot[axis] for cells in grids.values() for spot in cells}) for axis in (0, 1))
    size = (max(1.5, 0.4 + 0.65 * len(lengths)), 0.5 + 0.36 * len(depths))
    figure, panels = blank(len(grids), 4, size, 1.2, title)
    for (budget, cells), axes in zip(grids.items(), panels, strict=True):
        grid = np.array([[mean(cells.get((depth, length), [])) for length in lengths] for depth in depths])
        heatmap(axes, grid)
        axes.set_title(plain(f"budget {budget}" if budget else "no budget"), fontsize=10)
        axes.set_xticks(range(len(lengths)), [f"{length}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth}%" for depth in depths])
    counts = {len(scores) for cells in grids.values() for scores in cells.values()}
    n = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    figure.supxlabel(f"length [tokens]\ncells: mean score of n = {n} sample{'s' * (counts != {1})}", fontsize=9)
    figure.supylabel("depth of the needle", fontsize=9)
    figure.colorbar(panels[0].images[0], ax=panels, label="mean score", pad=0.02, aspect=24 * -(-len(panels) // 4))
    return figure


def tabulate(lines: Sequence[Line]) -> dict[str | None, dict[tuple[int, int], list[float]]]:
    """Scores of each budget by (depth [percent], length [tokens])."""
    percent = [round(100 * line["facts"]["depth"]) for line in lines]
    if len(set(percent)) > DEPTHS:
        percent = [10 * round(depth / 10) for depth in percent]
    grids: dict[str | None, dict[tuple[int, int], list[float]]] = {}
    for line, depth in zip(lines, percent, strict=True):
        cells = grids.setdefault(line["budget"], {})
        cells.setdefault((depth, line["facts"]["length"]), []).append(float(line["score"]))
    return grids


def heatmap(axes: "matplotlib.axes.Axes", grid: np.ndarray) -> None:
    """Coloured cells with their numbers; cells without samples are grey and empty."""
    from matplotlib import colormaps

    colours = colormaps["cividis"].with_extremes(bad="0.9")
    axes.imshow(grid, cmap=colours, vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(grid):
        if not math.isnan(value):
            light = np.dot(colours(value)[:3], (0.2126, 0.7152, 0.0722)) > 0.5
            look = {"ha": "center", "va": "center", "fontsize": 9, "color": "black" if light else "white"}
            axes.text(column, row, f"{value:.2f}", **look)
    axes.tick_params(length=0, labelsize=9)


def blank(
    count: int, columns: int, size: tuple[float, float], margin: float, title: str
) -> "tuple[matplotlib.figure.Figure, list[matplotlib.axes.Axes]]":
    """An empty figure with a title and a grid of panels.

    Args:
      count: panels.
      columns: most panels in a row.
      size: of a panel with its labels [inches].
      margin: height for titles and legend [inches].
      title: of the figure.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("pictures need matplotlib: pip install 'kvjax[eval]'") from None
    columns = min(columns, count)
    rows = -(-count // columns)
    width = max(6, 0.8 + columns * size[0])
    figure = Figure((width, margin + rows * size[1]), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(plain("\n".join(textwrap.wrap(title, int(10 * width)))), fontsize=12)  # 0.1 inches a letter
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in panels[count:]:
        spare.remove()
    return figure, panels[:count]


def mean(values: Sequence[float]) -> float:
    """nan for no values."""
    return sum(values) / len(values) if values else math.nan


def plain(text: str) -> str:
    """A text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")
