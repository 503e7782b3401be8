"""The report of an evaluation: its numbers, its files, and what its pictures show."""

import csv
import importlib.util
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy  # its parts are imported as they are used
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kvjax.errors import InputError
from kvjax.evaluation import pictures, report, results
from kvjax.evaluation.results import Row

drawing = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
RUN = {
    "arguments": {"model": "hub/demo", "form": "short", "question": "unseen", "samples": 4, "seed": 7},
    "commit": "abc1234",
    "command": "python -m kvjax.evaluate --tasks needle",
}


def sample(score: float, **changes: Any) -> dict[str, Any]:
    """A line of samples.jsonl."""
    line = {"task": "needle", "part": "512", "index": 0, "method": "snapkv", "budget": "20%", "better": "higher"}
    line |= {"metric": "score", "score": score, "facts": {"depth": 0.0, "length": 512}, "prediction": "", "answers": []}
    line |= {"prompt_tokens": 500, "new_tokens": 12, "cache_bytes": 512.0 * 10, "full_bytes": 512 * 40, "kept": 0.25}
    return line | {"timing": {"batch": 0, "decode_s": 0.5, "decoded": 20}} | changes


def forced(metric: str, tokens: list[float], **changes: Any) -> dict[str, Any]:
    """A line of a task that judges a given continuation."""
    more = {"task": metric, "metric": metric, "better": "lower", "tokens": tokens, "timing": None}
    return sample(sum(tokens) / len(tokens), **more, **changes)


def grid() -> list[dict[str, Any]]:
    """Two tasks, the full cache last, three methods, two budgets, two parts; one group is not complete."""
    lines = []
    for method, budgets, factor in (
        ("snapkv", ["10%", "20%"], 1),
        ("a/b $x$|y", ["10%", "20%"], 3),
        ("full", [None], 1),
    ):
        for rank, budget in enumerate(budgets):
            for index in range(4):
                if method == "snapkv" and budget == "20%" and index == 3:
                    continue
                length = (512, 1024)[index % 2]
                common = {"method": method, "budget": budget, "index": index, "part": str(length)}
                common["cache_bytes"] = 512 * (40.0 if budget is None else 5 * (rank + 1))
                score = 1.0 if budget is None else (index % 2 + rank) / 2
                facts = {"depth": (0.0, 0.5)[index // 2], "length": length}
                lines.append(sample(score, facts=facts, **common))
                lines.append(forced("kl", [0.0] if budget is None else [0.9 / factor / 10**rank, 0.1], **common))
    return lines


def save(directory: Path, lines: list[dict[str, Any]], tail: str = "") -> Path:
    """A run's folder."""
    (directory / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail, "utf-8")
    (directory / "run.json").write_text(json.dumps(RUN), "utf-8")
    return directory


def written(directory: Path) -> str:
    """What `report.write` prints at 80 columns."""
    report.write(directory, console := Console(width=80, file=io.StringIO()))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_runs_of_other_models_stand_beside(tmp_path: Path) -> None:
    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()
    first, second = (save(tmp_path / name, grid()) for name in ("first", "second"))
    (second / "run.json").write_text(json.dumps(RUN | {"arguments": RUN["arguments"] | {"model": "models/low"}}))
    report.write(first, console := Console(width=200, file=io.StringIO()), [second])
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert "snapkv " in printed and "snapkv (low)" in printed and "full (low)" in printed
    assert (first / "frontier.png").stat().st_size > 1000 and not (second / "report.md").exists()
    third = save(tmp_path / "third", grid())
    (third / "run.json").write_text(json.dumps(RUN | {"arguments": RUN["arguments"] | {"seed": 5}}))
    with pytest.raises(InputError, match="seed is 5"):
        report.write(first, console, [third])


def row(**changes: Any) -> Row:
    """A row of a finished group."""
    values: dict[str, Any] = {
        "task": "lines",
        "part": "all",
        "method": "snapkv",
        "budget": "20%",
        "metric": "score",
        "better": "higher",
    }
    values |= {"value": 0.5, "low": 0.4, "high": 0.7, "p99": math.nan, "bytes_per_token": 20.0, "of_full": 0.2}
    values |= {"full_bytes_per_token": 100.0, "context": math.nan, "kept": 0.2, "tokens_per_s": 9.0}
    values |= {"n": 10, "contexts": 10, "largest": 10}
    return Row(**(values | changes))


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval(case: tuple[int, int]) -> None:
    hits, n = case
    expected = scipy.stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert results.wilson(hits / n, n) == pytest.approx(tuple(expected), abs=1e-12)


@given(st.lists(st.floats(0, 10), min_size=2, max_size=20))
def test_student_interval(values: list[float]) -> None:
    mean, error = np.mean(values), scipy.stats.sem(values)
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * error
    expected = (mean, mean - half, mean + half)
    assert results.student(values, [1.0] * len(values), range(len(values))) == pytest.approx(expected, abs=1e-9)


def test_intervals_cover() -> None:
    # 95% intervals hold the truth in about 95% of experiments, also with parts of unequal size.
    rng, parts = np.random.default_rng(0), ["a"] * 12 + ["b"] * 30
    hits = {"score": 0, "kl": 0}
    for _ in range(400):
        scores = [sample(float(rng.random() < 0.6), part=part, index=i) for i, part in enumerate(parts)]
        mean, low, high = results.estimate(scores)
        assert low <= mean <= high
        hits["score"] += low <= 0.6 <= high
        drawn = [forced("kl", [rng.exponential()], part=part, index=i) for i, part in enumerate(parts)]
        _, low, high = results.estimate(drawn)
        hits["kl"] += low <= 1 <= high
    assert 0.92 <= hits["score"] / 400 <= 0.98 and 0.88 <= hits["kl"] / 400 <= 0.98


@pytest.mark.parametrize("alike", [0.0, 0.5, 1.0])
def test_questions_about_one_context_are_alike(alike: float) -> None:
    """20 contexts of 4 questions: intervals hold the truth whether questions agree or not, and show what that costs."""
    rng, hits, widths = np.random.default_rng(0), 0, []
    for _ in range(400):
        own, shared = rng.random((20, 4)) < 0.6, rng.random((20, 1)) < 0.6
        answers = np.where(rng.random((20, 4)) < alike, shared, own)
        lines = [sample(float(answers[i, j]), index=i, asked=j) for i in range(20) for j in range(4)]
        mean, low, high = results.estimate(lines)
        assert mean == pytest.approx(answers.mean())
        hits += low <= 0.6 <= high
        widths.append(high - low)
    assert 0.92 <= hits / 400 <= 0.99
    low, high = {0.0: (75, 50), 0.5: (50, 30), 1.0: (25, 20)}[alike]  # so many scores of their own tell as much
    width = lambda n: np.subtract(*results.wilson(0.6, n)[::-1])
    assert width(low) < np.mean(widths) < width(high)


def test_all_right_says_no_more_than_its_contexts() -> None:
    lines = [sample(1.0, index=i, asked=j) for i in range(5) for j in range(4)]
    assert results.estimate(lines) == (1.0, *results.wilson(1.0, 5))
    (_, row) = results.aggregate(lines)
    assert "context" not in report.columns([row])
    beside = row._replace(context=0.213)
    assert dict(zip(report.columns([beside]), report.cells(beside, context=True), strict=True))["context"] == "21.3%"
    assert (row.n, row.contexts, report.cells(row)[-1]) == (20, 5, "20 in 5")
    assert report.CLUSTERED in report.notes([row], {})


def test_what_has_not_run_is_said() -> None:
    rows = [row(method="full", budget=None), row(budget="10%"), row(), row(task="kl", method="full", budget=None)]
    grid = {"tasks": ["lines", "kl"], "methods": ["full", "snapkv", "h2o"], "budgets": ["10%", "20%"]}
    expected = ["kl snapkv 10%", "kl snapkv 20%", "lines h2o", "kl h2o"]
    assert report.missing(rows, {"arguments": grid}) == expected
    assert report.notes(rows, {"arguments": grid})[-1] == f"Not run yet: {', '.join(expected)}."
    assert (
        report.missing(rows, {})
        == report.missing(rows[:3], {"arguments": grid | {"tasks": ["lines"], "methods": ["full", "snapkv"]}})
        == []
    )


def test_parts_weigh_the_same() -> None:
    scores = [sample(1.0, part="a"), *(sample(0.0, part="b", index=i) for i in range(3))]
    mean, low, high = results.estimate(scores)
    assert mean == pytest.approx(0.5)
    assert (low, high) == pytest.approx(results.wilson(0.5, 3))  # 1 / (1/4 + 3/36): no more than three samples' worth
    even = [sample(1.0, part=part, index=i) for part in "ab" for i in range(25)]
    assert results.estimate(even) == pytest.approx((1.0, *results.wilson(1.0, 50)))


def test_perplexity_is_of_all_tokens() -> None:
    group = [forced("perplexity", [1.0, 2.0, 3.0]), forced("perplexity", [5.0], index=1)]
    mean, low, high = results.estimate(group)
    assert mean == pytest.approx(math.exp(11 / 4)) and 0 <= low < mean < high
    same = [forced("perplexity", [nll, nll], index=i) for i, nll in enumerate((1.0, 2.0, 4.0))]
    interval = scipy.stats.t.interval(0.95, 2, loc=7 / 3, scale=scipy.stats.sem([1.0, 2.0, 4.0]))
    low, high = map(math.exp, interval)
    assert low < 1  # the t interval goes below one, a perplexity does not
    assert results.estimate(same) == pytest.approx((math.exp(7 / 3), 1.0, high))


def test_divergence() -> None:
    tokens = [[0.1, 0.3], [0.5, 0.7], [0.0, 2.0]]
    (_, total) = results.aggregate([forced("kl", values, index=i) for i, values in enumerate(tokens)])
    assert total.value == pytest.approx(0.6)
    assert total.p99 == pytest.approx(np.percentile([0.1, 0.3, 0.5, 0.7, 0.0, 2.0], 99))
    assert total.low == 0.0  # the t interval goes below zero, a divergence does not
    assert total.high == pytest.approx(0.6 + 4.302652729911275 * np.std([0.2, 0.6, 1.0], ddof=1) / math.sqrt(3))
    assert math.isnan(total.tokens_per_s)
    (single, _) = results.aggregate([forced("kl", [0.25])])
    assert single.value == 0.25 and math.isnan(single.low) and math.isnan(single.high)


def test_costs() -> None:
    batch = lambda number, seconds, decoded: {"batch": number, "decode_s": seconds, "decoded": decoded}
    lines = [
        sample(1.0, timing=batch(0, 0.5, 20)),
        sample(1.0, index=1, timing=batch(0, 0.5, 20), cache_bytes=100.0, prompt_tokens=88, kept=0.75),
        sample(1.0, index=2, timing=batch(1, 1.5, 10)),
    ]
    (_, total) = results.aggregate(lines)
    assert total.bytes_per_token == pytest.approx((5120 + 100 + 5120) / (512 + 100 + 512))
    assert total.full_bytes_per_token == pytest.approx(3 * 20480 / 1124)
    assert total.of_full == pytest.approx(10340 / 61440)
    assert total.kept == pytest.approx(1.25 / 3)
    assert total.tokens_per_s == pytest.approx(30 / 2.0)  # the batch of two samples counts once


def test_order_and_completeness() -> None:
    rows = results.aggregate(grid())
    totals = [row for row in rows if row.part == "all" and row.task == "needle"]
    names = [("full", None), ("snapkv", "10%"), ("snapkv", "20%"), ("a/b $x$|y", "10%"), ("a/b $x$|y", "20%")]
    assert [(row.method, row.budget) for row in totals] == names
    assert [(row.n, row.largest) for row in totals] == [(4, 4), (4, 4), (3, 4), (4, 4), (4, 4)]
    assert [row.part for row in rows if row.method == "full" and row.task == "kl"] == ["512", "1024", "all"]
    assert [row.value for row in totals] == [1.0, 0.25, 0.75, 0.25, 0.75]  # the third: (1/2 + 1) / 2 over two parts


def test_reading(tmp_path: Path) -> None:
    lines = [sample(1.0), sample(0.0), sample(0.5, index=1), sample(0.5, index=1, budget=20), sample(0.5, budget=None)]
    path = save(tmp_path, lines, tail='{"task": "ne') / "samples.jsonl"
    found = results.read(path)
    assert [(line["index"], line["budget"], line["score"]) for line in found] == [
        (0, "20%", 1.0),
        (1, "20%", 0.5),
        (1, "20", 0.5),
        (0, None, 0.5),
    ]
    path.write_bytes(path.read_bytes()[:-12] + b'{"prediction": "\xc3')  # torn within a letter
    assert results.read(path) == found


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"task": "ne', " is not JSON"),
        ("[" * 100_000, " is nested too deeply"),
        ("9" * 5_000, " has an integer of too many digits"),
        ("[1]", ": not an object"),
        (json.dumps(sample(1.0, kept=None)), ": 'kept' is not a finite number from 0 on"),
        (json.dumps(sample(1.0, kept=True)), ": 'kept' is not"),
        (json.dumps(sample(1.0, prompt_tokens=0)), ": 'prompt_tokens' is not a finite number from 1 on"),
        (json.dumps(sample(1.0, cache_bytes=10**400)), ": 'cache_bytes' is not"),
        (json.dumps(sample(math.nan)), ": 'score' is not a finite number"),
        (json.dumps(sample(1.0, method=3)), ": 'method' is not a string"),
        (json.dumps(sample(1.0, budget=True)), ": 'budget' is neither"),
        (json.dumps({key: value for key, value in sample(1.0).items() if key != "budget"}), ": 'budget' is neither"),
        (json.dumps(sample(1.5)), ": score 1.5 is not from 0 to 1"),
        (json.dumps(sample(1.0, metric="rouge")), ": unknown metric 'rouge'"),
        (json.dumps(sample(1.0) | {"metric": "kl", "tokens": [1.0]}), ": the metric of task needle is kl, not score"),
        (json.dumps(forced("kl", [1.0]) | {"tokens": []}), ": 'tokens' is not a list of finite numbers"),
        (json.dumps(forced("kl", [1.0]) | {"tokens": [1.0, math.inf]}), ": 'tokens' is not a list"),
        (json.dumps(sample(1.0, timing=[1])), ": 'timing' is not an object whose batch, decode_s, decoded"),
        (json.dumps(sample(1.0, timing={"batch": 0, "decode_s": "1", "decoded": 2})), ": 'timing' is not"),
        (json.dumps(sample(1.0, facts={"depth": "deep", "length": 512})), ": 'facts' is not"),
    ],
)
def test_broken_lines(tmp_path: Path, bad: str, message: str) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join([json.dumps(sample(1.0)), bad, json.dumps(sample(1.0, index=1)), ""]))
    with pytest.raises(InputError) as error:
        results.read(path)
    assert str(error.value).startswith(f"{path}:2{message}")


def test_a_last_line_that_is_whole_and_wrong_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, [sample(1.0)], tail="garbage\n") / "samples.jsonl"
    with pytest.raises(InputError, match=r"samples\.jsonl:2 is not JSON"):
        results.read(path)


@pytest.mark.parametrize("end", ["\r\n", "\r", "\n\n"])
def test_other_ends_of_lines_are_read(tmp_path: Path, end: str) -> None:
    lines = [sample(1.0), sample(0.5, index=1)]
    (tmp_path / "samples.jsonl").write_bytes(end.join(map(json.dumps, lines)).encode())  # the last one has none
    assert results.read(tmp_path / "samples.jsonl") == lines


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * 100_000,
        "[1]",
        '{"arguments": 3}',
        '{"calls": [3]}',
        '{"command": ["a"]}',
        '{"versions": [1]}',
        '{"arguments": {"seed": ' + "9" * 5_000 + "}}",
    ],
)
def test_a_broken_record_of_a_run_is_named(tmp_path: Path, text: str) -> None:
    (save(tmp_path, grid()) / "run.json").write_text(text)
    with pytest.raises(InputError, match=r"run\.json "):
        written(tmp_path)


@pytest.mark.parametrize("text", [None, "", '{"torn'])
def test_no_samples(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "samples.jsonl").write_text(text)
    with pytest.raises(InputError, match=r"samples\.jsonl"):
        report.write(tmp_path, Console(file=io.StringIO()))


def test_csv_round_trip(tmp_path: Path) -> None:
    rows = results.aggregate(grid())
    report.write_csv(rows, path := tmp_path / "report.csv")
    with path.open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == list(Row._fields)
    assert len(found) == len(rows) == 2 * 5 * 3
    for got, want in zip(found, rows, strict=True):
        for key, value in want._asdict().items():
            if isinstance(value, float):
                assert np.array_equal(float(got[key]), value, equal_nan=True)
            else:
                assert got[key] == ("" if value is None else str(value))


@drawing
def test_files(tmp_path: Path) -> None:
    printed = written(save(tmp_path, grid()))
    names = {"frontier.png", "needle_full.png", "needle_snapkv.png", "needle_a%2Fb%20%24x%24%7Cy.png"}
    assert names | {"report.md", "report.csv", "samples.jsonl", "run.json"} == {
        path.name for path in tmp_path.iterdir()
    }
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "model hub/demo, form short, question unseen, samples per part 4, seed 7, commit abc1234" in text
    assert RUN["command"] in text and "](needle_a%252Fb%2520%2524x%2524%257Cy.png)" in text
    assert "| a/b $x$\\|y | 10% | 0.250 | 0.046–0.699 | 5 | 12% | 25% | 40 | 4 |" in text
    assert "| 3/4 |" in text and report.PARTIAL in text and "conservative" in text
    assert max(map(len, printed.splitlines())) <= 80
    assert "0.046–0.699" in printed and "3/4" in printed and "p99" in printed


@drawing
def test_a_long_title_stays_in_its_picture() -> None:
    figure = pictures.frontier([row()], "Quality and cache size (SmolLM2-135M-Instruct.Q4_1.gguf, question unseen)")
    figure.canvas.draw()
    (title,) = figure.texts
    box = title.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width


def test_long_names_fit_the_terminal(tmp_path: Path) -> None:
    common = {"method": "streaming_llm", "cache_bytes": 512 * 131072.0, "full_bytes": 512 * 131072}
    timing = {"batch": 0, "decode_s": 0.5, "decoded": 2000}
    lines = [forced("kl", [0.01 + i / 1e4], **common, index=i) | {"timing": timing} for i in range(99)]
    (table,) = report.tables(results.aggregate(lines)[-1:])
    console = Console(width=80, file=io.StringIO())
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    cells = "streaming_llm 20%    0.0149 0.0143–0.0155 0.0197 131,072 100%  25%  4,000 99"
    assert cells in console.file.getvalue()


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    (save(tmp_path, grid()) / "run.json").unlink()
    with pytest.raises(InputError, match=r"pip install 'kvjax\[eval\]'"):
        written(tmp_path)
    assert (tmp_path / "report.md").stat().st_size and (tmp_path / "report.csv").stat().st_size


@drawing
def test_frontier_shows_the_rows() -> None:
    full = {"method": "full", "budget": None, "bytes_per_token": 100.0}
    rows = [
        row(**full, value=0.9, low=0.8, high=0.95),
        row(budget="50%", bytes_per_token=50.0, value=0.8, low=0.6, high=0.9),
        row(),
        row(method="h2o", n=5),
        row(task="kl", metric="kl", value=2.0, low=1.5, high=2.5),
        row(task="kl", metric="kl", budget="50%", bytes_per_token=50.0, value=0.1, low=0.0, high=0.3),
        row(task="kl", metric="kl", **full, value=0.0, low=0.0, high=0.0),
    ]
    figure: Any = pictures.frontier(rows, "Title, question unseen")
    left, right = figure.axes
    snapkv, partial = (line_at(left, 20.0, index) for index in (0, 2))
    assert snapkv.get_xydata().tolist() == [[20.0, 0.5], [50.0, 0.8]]  # by bytes, not by appearance
    assert partial.get_markerfacecolor() == "white"
    bars = [segment.tolist() for bars in left.collections for segment in bars.get_segments()]
    for x, low, high in ((20.0, 0.4, 0.7), (50.0, 0.6, 0.9), (100.0, 0.8, 0.95)):
        assert any(np.allclose(bar, [[x, low], [x, high]]) for bar in bars)
    assert any(line.get_linestyle() == "--" and line.get_ydata()[0] == 0.9 for line in left.lines)
    assert line_at(left, 100.0).get_marker() == "*"
    assert (left.get_xscale(), left.get_yscale()) == ("log", "linear")
    assert right.get_yscale() == "log" and "full: 0" in [text.get_text() for text in right.texts]
    assert "higher is better" in left.get_ylabel() and "lower is better" in right.get_ylabel()
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["full cache", "snapkv", "h2o", "fewer samples than others"]
    assert figure.get_suptitle() == "Title, question unseen"


def line_at(axes: Any, x: float, index: int = 0) -> Any:
    """The index-th line with a marker that starts at x."""
    return [line for line in axes.lines if line.get_marker() in "osv*D^" and line.get_xdata()[0] == x][index]


@drawing
def test_methods_look_different() -> None:
    looks = [tuple(map(str, (s["color"], s["marker"], s["linestyle"]))) for s in map(pictures.style, range(330))]
    assert len(set(looks)) == 330
    figure = pictures.frontier([row(method=f"m{i}", bytes_per_token=20.0 + i) for i in range(12)], "")
    lines = figure.axes[0].lines[::3]  # each with two caps
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 12
    assert figure.axes[0].get_xscale() == "linear"  # less than a factor of four


@drawing
def test_needle_shows_the_cells() -> None:
    spot = lambda depth, length: {"facts": {"depth": depth, "length": length}}
    lines = [
        sample(1.0, **spot(0.0, 512)),
        sample(0.5, **spot(0.0, 512)),
        sample(0.0, **spot(1.0, 512)),
        sample(0.25, **spot(0.0, 2048)),
        sample(1.0, **spot(0.5, 512), budget="50%"),
    ]
    figure: Any = pictures.needle(lines, "Needle")
    ten, fifty, _ = figure.axes  # and the colour bar
    expected = [[0.75, 0.25], [math.nan, math.nan], [0.0, math.nan]]
    assert np.array_equal(ten.images[0].get_array().filled(math.nan), expected, equal_nan=True)
    assert ten.images[0].get_clim() == (0, 1)
    cells = [(text.get_position(), text.get_text(), text.get_color()) for text in ten.texts]
    assert cells == [((0, 0), "0.75", "black"), ((1, 0), "0.25", "white"), ((0, 2), "0.00", "white")]
    assert [text.get_text() for text in fifty.texts] == ["1.00"]
    assert [label.get_text() for label in ten.get_yticklabels()] == ["0%", "50%", "100%"]
    assert [label.get_text() for label in ten.get_xticklabels()] == ["512", "2048"]
    assert [axes.get_title() for axes in (ten, fifty)] == ["budget 20%", "budget 50%"]
    assert "of n = 1 to 2 samples" in figure.get_supxlabel()
    assert pictures.needle(lines[3:], "Needle").get_supxlabel().endswith("of n = 1 sample")


@drawing
def test_the_name_of_a_picture_can_be_read(tmp_path: Path) -> None:
    spot = {"facts": {"depth": 0.5, "length": 512}}
    lines = [sample(1.0, method=name, **spot) for name in ("snapkv+store=int4", "snapkv+store=kivi2:8:8", "snapkv%2B")]
    written(save(tmp_path, lines))
    names = {path.stem.removeprefix("needle_") for path in tmp_path.glob("needle_*.png")}
    assert names == {"snapkv+store=int4", "snapkv+store=kivi2%3A8%3A8", "snapkv%252B"}


@drawing
def test_many_depths_are_rounded() -> None:
    lines = [sample(i % 2, facts={"depth": i / 100, "length": 512}, index=i) for i in range(100)]
    (cells,) = pictures.tabulate(lines).values()
    assert sorted(depth for depth, _ in cells) == list(range(0, 101, 10))
    assert sum(map(len, cells.values())) == 100
