"""Mutated results, texts to train on and files of tasks: what is accepted is what an independent reader finds."""

import functools
import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

import kvjax
from kvjax.evaluation import results, runner
from kvjax.retrofit import data
from kvjax.tasks.gsm8k import gsm8k
from kvjax.tasks.longbench import longbench
from tests import test_file_tasks, test_report
from tests.lib.mutate import DEEP, REFUSED, Kind, dump, edited, mangled, reading, refused

# Results


def lines_of(*records: Any) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


@st.composite
def sample_cases(draw: st.DrawFn) -> bytes:
    """Mutated `samples.jsonl`."""
    records = [test_report.sample(1.0), test_report.sample(0.0, index=1), test_report.forced("kl", [0.5, 1.5])]
    if draw(st.booleans()):
        return draw(mangled(lines_of(*records)))
    at = draw(st.integers(0, 2))
    records[at] = draw(edited(records[at]))
    return b"".join(dump(record).replace(b"\n", b"") + b"\n" for record in records)


def samples_holds(text: bytes, folder: Path) -> None:
    """Accepted results are the file's lines, each key once; who resumes sees what who reports sees, and loses none."""
    file = folder / results.SAMPLES
    file.write_bytes(text)
    found = refused(lambda: results.read(file))
    if found is not REFUSED:
        whole = [reading(json.loads, line) for line in text.splitlines() if line.strip()]
        if whole[-1] is REFUSED:
            whole.pop()
        expected = {results.key(line): line for line in reversed(whole)}
        assert {results.key(line) for line in found} == {(*key[:5], key[5] and str(key[5])) for key in expected}
        assert all(line["score"] in {one["score"] for one in whole} for line in found)
        refused(lambda: results.aggregate(found))

    def resume() -> set:
        with runner.results(folder) as (done, _):
            return set(done)

    done = refused(resume)
    if found is not REFUSED:
        assert done == {results.key(line) for line in found}
        assert [line for line in file.read_bytes().splitlines() if line.strip()] == [
            line for line in text.splitlines() if line.strip()
        ][: len(whole)]


# Data


DOCUMENTS = [{"text": "The lazy dog. " * 8}, {"tokens": list(range(5, 90))}]


@functools.cache
def model() -> kvjax.Model:
    return kvjax.load()


@st.composite
def document_cases(draw: st.DrawFn) -> bytes:
    """Mutated data to train on."""
    if draw(st.booleans()):
        return draw(mangled(lines_of(*DOCUMENTS)))
    return b"".join(dump(record).replace(b"\n", b"") + b"\n" for record in draw(edited(DOCUMENTS)))


def documents_holds(text: bytes, folder: Path) -> None:
    """Accepted documents are the file's, one after the other."""
    file = folder / "d.jsonl"
    file.write_bytes(text)
    found = refused(lambda: data.read([file], model(), 16))
    if found is REFUSED:
        return
    tokenizer, pieces = model().tokenizer, []
    assert tokenizer is not None
    for line in text.split(b"\n"):
        if line.strip():
            record = json.loads(line)
            ids = tokenizer.encode(record["text"]) if record.get("text") else record["tokens"]
            pieces.append(ids if record.get("text") is None else [*ids, *model().stop[:1]])
    assert found.tokens.tolist() == [i for piece in pieces for i in piece]
    assert found.starts.sum() == len(pieces)


@st.composite
def task_cases(draw: st.DrawFn) -> tuple[str, bytes]:
    """Mutated official files of a task."""
    name, record = draw(st.sampled_from([("longbench", test_file_tasks.LINE), ("gsm8k", test_file_tasks.GSM8K)]))
    if draw(st.booleans()):
        return name, draw(mangled(lines_of(record, record)))
    return name, dump(draw(edited(record))).replace(b"\n", b"") + b"\n" + lines_of(record)


def tasks_holds(case: tuple[str, bytes], folder: Path) -> None:
    """Accepted samples ask what the file asks, and expect what it answers."""
    name, text = case
    files = ["narrativeqa.jsonl"] if name == "longbench" else ["test.jsonl", "train.jsonl"]
    for file in files:
        (folder / file).write_bytes(text)
    task = longbench("narrativeqa") if name == "longbench" else gsm8k(shots=1)
    found = refused(lambda: task.samples(test_file_tasks.request(folder, samples=2, length=10**6)))
    if found is REFUSED:
        return
    lines = [line for line in text.split(b"\n") if line.strip()][:2]  # more is not asked for
    for sample, record in zip(found, map(json.loads, lines), strict=True):
        if name == "longbench":
            assert record["context"] in sample.context and record["input"] in sample.question
            assert list(sample.answers) == record["answers"] != []
        else:
            assert record["question"] in sample.question
            assert sample.answers[0] in record["answer"].rpartition("####")[2].replace(",", "").replace("$", "")


LONG = b'{"text": 1' + b"0" * 5000 + b"}\n"
LINES = lines_of(test_report.sample(1.0), test_report.sample(0.0, index=1))
UNANSWERED = dump(test_file_tasks.LINE | {"answers": []}).replace(b"\n", b"")
KINDS = {
    "samples.jsonl": Kind(
        sample_cases(), samples_holds,
        [LINES.replace(b"\n", b"\r\n"), LINES + b"garbage", LINES + b"garbage\n", LINES + b"\xff\n", LONG, *DEEP],
    ),
    "documents": Kind(document_cases(), documents_holds, [LONG, *DEEP]),
    "task files": Kind(
        task_cases(), tasks_holds, [("longbench", UNANSWERED), ("gsm8k", LONG), *(("gsm8k", deep) for deep in DEEP)]
    ),
}  # fmt: skip
