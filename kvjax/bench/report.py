"""What was measured, as a table, as JSON and as a picture, with what it was measured on."""

import datetime
import errno
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.table import Table

from kvjax.cli.console import to_stdout
from kvjax.errors import InputError, say_once
from kvjax.evaluation import manifest, pictures
from kvjax.files import output
from kvjax.plotting import COLOURS, save_figure

OTHERS = ("torch", "transformers", "flashinfer-python", "orbax-checkpoint")  # packages whose versions are noted, too


class Column(NamedTuple):
    """A column of a table: how an entry of a row is shown."""

    heading: str
    key: str
    show: Callable[[Any], str] = "{:.2f}".format


LIMIT = Column("of limit", "of_limit", "{:.0%}".format)  # the machine's, as it was measured in the same run


class Section(NamedTuple):
    """Rows that belong together: dicts with a name each, of which columns show some."""

    title: str
    rows: list[dict[str, Any]]
    facts: dict[str, Any] = {}  # noqa: RUF012  (never changed)


class Report(NamedTuple):
    """What a command has measured."""

    name: str
    about: dict[str, Any]
    columns: Sequence[Column]
    drawn: Column  # what the picture shows
    sections: Iterable[Section]  # measured as they are asked for

    def plain(self) -> dict[str, Any]:
        """Everything as JSON values."""
        sections = [{"title": s.title, **s.facts, "rows": s.rows} for s in self.sections]
        about = self.about | {"versions": self.about["versions"] | _others()} if self.about else {}
        return {"bench": self.name, **about, "sections": sections}


def about(command: Sequence[str], **facts: Any) -> dict[str, Any]:
    """When, with what, on what.

    Args:
      command: module and flags.
      facts: what else to note.
    """
    found = manifest.describe(command)
    hardware = {"device": found.pop("device"), "platform": jax.default_backend(), **_memory(), **_cpu()}
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"date": date, "hardware": hardware, **found, **facts}


def _others() -> dict[str, str | None]:
    """Versions of what took part."""
    return {name: manifest.version(name) for name in OTHERS if name.partition("-")[0] in sys.modules}


def _memory() -> dict[str, int]:
    """Of the device, where it says."""
    stats = jax.devices()[0].memory_stats() or {}
    return {"device_memory": stats["bytes_limit"]} if "bytes_limit" in stats else {}


def _cpu() -> dict[str, Any]:
    """The host's processor and memory."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        model, memory = "", 0
    return {"cpu": model or platform.machine(), "cores": os.cpu_count(), "host_memory": memory}


def check(out: Path | None) -> None:
    """Raise `InputError` for a folder that cannot be written, before work is done for it."""
    if out is None:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}") from None
    if not os.access(out, os.W_OK):
        raise InputError(f"--out {out}: {os.strerror(errno.EACCES)}")
    if not _draws():
        say_once("there will be no picture: pip install matplotlib")


def _draws() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def tell(report: Report, *, as_json: bool, out: Path | None) -> None:
    """Print a report, and write it as JSON, a table and a picture where that is wanted.

    What is measured is shown and written at once: a run that is ended leaves what it had.
    """
    done: list[Section] = []
    shown = report._replace(sections=done)
    for section in report.sections:
        done.append(section)
        if not as_json:
            to_stdout().print(table(shown, section))
        _write(shown, out)
    if as_json:
        print(json.dumps(shown.plain()))
    _write(shown, out)
    if out is not None and _draws():
        save_figure(draw(shown), out / f"{report.name}.png")


def _write(report: Report, out: Path | None) -> None:
    if out is not None:
        output.write_json(out / f"{report.name}.json", report.plain())
        output.write(out / f"{report.name}.md", markdown(report).encode())


def _cells(report: Report, row: dict[str, Any]) -> list[str]:
    shown = (c.show(row[c.key]) if row.get(c.key) is not None else "" for c in report.columns)
    return [*shown] if "failed" not in row else [*[""] * (len(report.columns) - 1), row["failed"]]


def table(report: Report, section: Section) -> Table:
    """A section for the terminal."""
    made = Table(title=section.title)
    for heading in ("", *(column.heading for column in report.columns)):
        made.add_column(heading, justify="right" if heading else "left")
    for row in section.rows:
        made.add_row(row["name"], *_cells(report, row))
    return made


def markdown(report: Report) -> str:
    """A report as a page."""
    hardware, versions = report.about["hardware"], report.about["versions"] | _others()
    lines = [
        f"# {report.about['date']}: {report.name} on {hardware['device']}",
        f"`{report.about['command']}` at commit {report.about['commit']}",
        ", ".join(f"{name} {value}" for name, value in hardware.items()),
        ", ".join(f"{name} {value}" for name, value in versions.items()),
    ]
    for section in report.sections:
        lines.append(f"## {section.title}")
        heads = ["", *(column.heading for column in report.columns)]
        body = [heads, ["---", *["---:"] * len(report.columns)]]
        body += [[row["name"], *_cells(report, row)] for row in section.rows]
        lines.append("\n".join("| " + " | ".join(cells) + " |" for cells in body))
    return "\n\n".join(lines) + "\n"


def draw(report: Report) -> Any:
    """Bars of what the report is about, a panel for each section."""
    column, sections = report.drawn, list(report.sections)
    most = max((len(section.rows) for section in sections), default=1)
    longest = max((len(row["name"]) for section in sections for row in section.rows), default=1)
    size = 4.0 + 0.08 * longest, 0.9 + 0.3 * most
    title = f"{report.name}: {column.heading}, {report.about['hardware']['device']}"
    figure, panels = pictures.blank(len(sections), 3, size, 0.6, title)
    for section, axes in zip(sections, panels, strict=True):
        rows = [row for row in section.rows if row.get(column.key) is not None]
        values = [row[column.key] for row in rows]
        bars = axes.barh(range(len(rows)), values, color=[COLOURS[i % len(COLOURS)] for i in range(len(rows))])
        axes.bar_label(bars, [column.show(value) for value in values], padding=3, fontsize=8)
        axes.set_yticks(range(len(rows)), [pictures.plain(row["name"]) for row in rows], fontsize=8)
        axes.set_xlim(0, 1.2 * max(values, default=1) or 1)
        axes.set_xticks([])
        axes.invert_yaxis()
        axes.set_title(pictures.plain(section.title), fontsize=9)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    return figure
