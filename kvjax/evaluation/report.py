"""The report of a run: tables in the terminal, Markdown and CSV, pictures."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvjax.errors import InputError
from kvjax.evaluation import pictures
from kvjax.evaluation.results import RUN, SAMPLES, Line, Row, aggregate, by_task, model_of, read, read_run
from kvjax.files import output
from kvjax.methods import label_of

LABELS = {"score": "score", "perplexity": "perplexity", "kl": "KL [nats]"}
NOTES = {
    "score": "Scores: mean over the parts of a task; 95% Wilson interval (conservative for scores between 0 and 1).",
    "perplexity": "Perplexity: of all tokens (lower is better); 95% Student t interval of the samples' mean.",
    "kl": "KL: from the full cache's next-token distributions, mean over parts (lower is better); 95% Student t "
    "interval of the samples' mean; p99: 99th percentile of all tokens.",
}
BYTES = "Bytes: of the cache in 16 bits: numbers that no store encodes count two bytes, here and in the full cache."
CONTEXT = "Context: what is kept of a context alone, of its full cache; questions and answers lie beside it."
CLUSTERED = "n = a in b: a questions about b contexts, and intervals that say how alike those of one context are."
NAMED = 6  # most points that are named
PARTIAL = "n = a/b: only a of b samples were run; such a row does not compare with the others."
SAME = ("samples", "seed", "lengths", "form", "question", "asked", "text", "dtype")  # what makes runs comparable


def write(directory: Path, console: Console, others: Sequence[Path] = ()) -> None:
    """Print the tables of a run and write report.md, report.csv, frontier.png and needle_<method>.png beside it.

    Args:
      directory: of the run.
      console: where tables go.
      others: runs of the same samples with other models, whose names stand beside their methods.
    """
    lines, run = read(directory / SAMPLES), read_run(directory / RUN)
    for other in others:
        lines += _other(other, run)
    rows = aggregate(lines)
    totals = [row for row in rows if row.part == "all"]
    for item in (Text(header(run)), *tables(totals), *(Text(f"\n{note}") for note in notes(totals, run))):
        console.print(item)
    write_csv(rows, directory / "report.csv")
    output.write(directory / "report.md", (text := markdown(totals, run)).encode())
    links = [f"![{path.stem}]({quote(path.name)})" for path in pictures.save(totals, lines, run, directory)]
    output.write(directory / "report.md", "\n".join([text, *links, ""]).encode())


def _other(directory: Path, run: dict[str, Any]) -> list[Line]:
    """The samples of another model's run; raises `InputError` if they are not of the same prompts."""
    lines, own = read(directory / SAMPLES), read_run(directory / RUN)
    given, expected = (each.get("arguments", {}) for each in (own, run))
    for name in SAME:
        if given.get(name) != expected.get(name):
            raise InputError(f"{directory}: {name} is {given.get(name)}, not {expected.get(name)}: no common report")
    return [line | {"method": f"{line['method']} ({model_of(own)})"} for line in lines]


def header(run: dict[str, Any]) -> str:
    """What was run, in one line."""
    given = run.get("arguments", {})
    facts = {"model": given.get("model"), "form": given.get("form"), "question": given.get("question")}
    commits = dict.fromkeys(str(call.get("commit")) for call in run.get("calls") or [run])
    facts |= {"samples per part": given.get("samples"), "seed": given.get("seed"), "commit": " and ".join(commits)}
    facts |= {"batch": given.get("batch"), "device": run.get("device"), "dtype": given.get("dtype")}
    facts |= {"settings": given.get("settings") or None} | run.get("versions", {})
    return ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None)


def notes(rows: Sequence[Row], run: dict[str, Any]) -> list[str]:
    """How the numbers of these rows are to be read, and which rows are not there yet."""
    used = [NOTES[metric] for metric in dict.fromkeys(row.metric for row in rows)]
    context = [CONTEXT] * _asked_beside(rows)
    clustered = [CLUSTERED] * any(row.contexts < row.n for row in rows)
    partial = [PARTIAL] * any(row.n < row.largest for row in rows)
    absent = missing(rows, run)
    more = f" and {len(absent) - NAMED} more" if len(absent) > NAMED else ""
    absent = [f"Not run yet: {', '.join(absent[:NAMED])}{more}."] * bool(absent)
    return [*used, BYTES, *context, *clustered, *partial, *absent]


def missing(rows: Sequence[Row], run: dict[str, Any]) -> list[str]:
    """Points of the grid that have no sample at all."""
    given = run.get("arguments", {})
    tasks, methods, budgets = (
        [each for each in given.get(name) or () if isinstance(each, str)] for name in ("tasks", "methods", "budgets")
    )
    found, names = {(row.task, row.method, row.budget) for row in rows}, []
    for method in methods:
        own = {budget for _, name, budget in found if name == method}
        expected = budgets if budgets and own - {None} else own or {None}
        absent = ((task, budget) for budget in expected for task in tasks if (task, method, budget) not in found)
        names += [f"{task} {label_of(method)} {budget or ''}".strip() for task, budget in absent]
    return names


def columns(rows: Sequence[Row]) -> list[str]:
    """Headings of a task's table."""
    metric = rows[0].metric
    p99, context = ["p99"] * (metric == "kl"), ["context"] * _asked_beside(rows)
    heads = ["method", "budget", LABELS[metric], "95% interval", *p99, "bytes/token", "of full", *context]
    return [*heads, "kept", "tokens/s", "n"]


def _asked_beside(rows: Sequence[Row]) -> bool:
    """Whether contexts have bytes of their own."""
    return not all(math.isnan(row.context) for row in rows)


def cells(row: Row, context: bool = False) -> list[str]:
    """A row of a task's table; `context`: with the bytes of the context alone."""
    show = lambda x: "–" if math.isnan(x) else f"{x:.3f}" if row.metric == "score" else f"{x:#.3g}".rstrip(".")
    known = lambda x, form: "–" if math.isnan(x) else format(x, form)
    interval = "–" if math.isnan(row.low) else f"{show(row.low)}–{show(row.high)}"
    percent = lambda x: f"{x:.1%}" if x < 0.0995 else f"{x:.0%}"
    return [
        label_of(row.method),
        row.budget or "–",
        show(row.value),
        interval,
        *([show(row.p99)] if row.metric == "kl" else []),
        f"{row.bytes_per_token:,.0f}",
        percent(row.of_full),
        *([known(row.context, ".1%")] if context else []),
        percent(row.kept),
        known(row.tokens_per_s, ",.0f" if row.tokens_per_s >= 10 else ".1f"),
        f"{row.n}" + f"/{row.largest}" * (row.n < row.largest) + f" in {row.contexts}" * (row.contexts < row.n),
    ]


def tables(rows: Sequence[Row]) -> list[Table]:
    """One table per task for the terminal: 80 columns are enough for them."""
    found = []
    for task, members in by_task(rows).items():
        title = Text(f"\n{task}", "bold")
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
        first, *rest = columns(members)
        table.add_column(first, overflow="fold")
        for name in rest:
            heading = name.replace("/", "\n/").replace(" ", "\n")
            table.add_column(heading, justify="left" if name == "budget" else "right", no_wrap=True)
        for row in members:
            table.add_row(*map(Text, cells(row, _asked_beside(members))))
        found.append(table)
    return found


def markdown(rows: Sequence[Row], run: dict[str, Any]) -> str:
    """The report: what was run, one table per task, how to read them."""
    text = ["# Quality at equal bytes", "", header(run), ""]
    if called := run.get("command"):
        text += ["```", called, "```", ""]
    line = lambda items: "| " + " | ".join(item.replace("|", "\\|") for item in items) + " |"
    for task, members in by_task(rows).items():
        names = columns(members)
        text += [f"## {task}", "", line(names), line(["---", "---"] + ["---:"] * (len(names) - 2))]
        text += [*(line(cells(row, _asked_beside(members))) for row in members), ""]
    return "\n".join([*text, *(f"- {note}" for note in notes(rows, run)), ""])


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """All rows with all digits; an empty budget is none."""
    writer = csv.writer(text := io.StringIO(), lineterminator="\n")
    writer.writerows([Row._fields, *rows])
    output.write(path, text.getvalue().encode())
