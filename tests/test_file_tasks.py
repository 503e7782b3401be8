"""Tasks that read official files: their format, their prompts, what does not fit, and what is wrong with a file."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.errors import InputError
from kvjax.tasks import longbench as module
from kvjax.tasks.gsm8k import gsm8k
from kvjax.tasks.longbench import SETS, longbench
from kvjax.tasks.squad import squad
from kvjax.tasks.task import Request

TOKENIZERS: dict[str, Callable[[str], list]] = {
    "characters": list,
    "words": str.split,
    "pairs": lambda text: [text[at : at + 2] for at in range(0, len(text), 2)],
}
LINE = {
    "input": "Who wrote it?",
    "context": "A story.",
    "answers": ["Ann", "Ann Lee"],
    "length": 2,
    "dataset": "narrativeqa",
    "language": "en",
    "all_classes": None,
    "_id": "0a1b",
}
GSM8K = {
    "question": "Tom has 2 bags of 600 nuts. How many nuts?",
    "answer": "2 * 600 = <<2*600=1200>>1200 nuts.\n#### 1,200",
}


def request(data: Path | None, samples: int = 2, length: int = 10_000, tokenizer: str = "characters") -> Request:
    return Request(samples, 0, (8, length), "natural", TOKENIZERS[tokenizer], frame=5, text="", data=data)


def write(path: Path, *records: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(map(json.dumps, records)) + "\n", "utf-8")


@pytest.mark.parametrize("folder", [".", "longbench"])
def test_longbench_reads_official_lines(tmp_path: Path, folder: str) -> None:
    write(tmp_path / folder / "narrativeqa.jsonl", LINE, LINE | {"input": "When?", "answers": ["1 May"]}, LINE)
    first, second = longbench("narrativeqa").samples(request(tmp_path))
    official = SETS["narrativeqa"]["prompt"].format(**LINE)
    assert first.context + first.question == official
    assert first.context.endswith("Story: A story.")
    assert first.question.startswith("\n\nNow, answer") and first.question.endswith(
        "Question: Who wrote it?\n\nAnswer:"
    )
    assert (first.part, first.index, first.answers, first.new) == ("narrativeqa", 0, ("Ann", "Ann Lee"), 128)
    assert (second.index, second.answers, second.facts) == (1, ("1 May",), {"cut": 0})
    assert "When?" in second.question


def test_longbench_all_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "score", lambda text, sample: 0.0)  # needs optional packages
    for name in SETS:
        write(tmp_path / f"{name}.jsonl", LINE | {"input": "{context}", "all_classes": ["City", "Other number"]})
    samples = longbench().samples(request(tmp_path))
    assert [sample.part for sample in samples] == list(SETS) == list(module.METRICS)
    assert len(SETS) == 16
    for sample in samples:
        prompt = SETS[sample.part]["prompt"].format(**LINE | {"input": "{context}"})
        assert (sample.context + sample.question, sample.new) == (prompt, SETS[sample.part]["new"])
    assert {sample.part for sample in samples if not sample.chat} == {
        "trec",
        "triviaqa",
        "samsum",
        "lcc",
        "repobench-p",
    }
    assert [sample.facts["classes"] for sample in samples if sample.part == "trec"] == ["City\nOther number"]


@pytest.mark.parametrize("separator", ["+", ","])
def test_longbench_choice_of_sets(tmp_path: Path, separator: str) -> None:
    for name in ("qasper", "hotpotqa", "trec"):
        write(tmp_path / f"{name}.jsonl", LINE | {"all_classes": ["City"]})
    task = longbench(f"trec{separator}qasper{separator}trec")
    assert [sample.part for sample in task.samples(request(tmp_path))] == ["trec", "qasper"]
    assert task.metric("City", task.samples(request(tmp_path))[0]) == 0.0
    assert task.metric("\nAnn Lee", task.samples(request(tmp_path))[1]) == 1.0


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@given(words=st.integers(0, 400), length=st.integers(200, 2500), asked=st.integers(0, 20))
@settings(max_examples=40)
def test_long_prompts_lose_their_middle(tmp_path_factory, tokenizer: str, words: int, length: int, asked: int) -> None:
    data = tmp_path_factory.mktemp("cut")
    context = "begin" + "".join(f" w{number}" for number in range(words)) + " end"
    write(data / "qasper.jsonl", LINE | {"context": context, "input": "why " * asked})
    whole = longbench("qasper").samples(request(data, length=100_000, tokenizer=tokenizer))[0]
    ask = request(data, length=length, tokenizer=tokenizer)
    if ask.tokens(whole._replace(context="")) > length:
        with pytest.raises(InputError, match=rf"longbench, set qasper, does not fit into {length} tokens"):
            longbench("qasper").samples(ask)
        return
    sample = longbench("qasper").samples(ask)[0]
    assert ask.tokens(sample) <= length
    assert sample.question == whole.question
    left, cut = len(sample.context), sample.facts["cut"]
    assert isinstance(cut, int) and left + cut == len(whole.context)
    if ask.tokens(whole) <= length:
        assert sample == whole
        return
    first = min(left, (left + len(whole.question)) // 2)  # characters before the cut
    assert sample.context == whole.context[:first] + whole.context[first + cut :]
    assert abs(first - (left - first + len(whole.question))) <= 1 or first == left  # equal halves, where there are two
    assert tokenizer != "characters" or ask.tokens(sample) == length  # nothing is wasted


def test_longbench_asks_for_packages_before_generating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)  # importing it raises ImportError
    write(tmp_path / "gov_report.jsonl", LINE)
    with pytest.raises(InputError, match=r"needs the package rouge-score"):
        longbench("gov_report").samples(request(tmp_path))


def test_gsm8k_prompt(tmp_path: Path) -> None:
    solved = [GSM8K | {"question": f"Example {number}?"} for number in range(3)]
    write(tmp_path / "gsm8k" / "train.jsonl", *solved)
    write(tmp_path / "gsm8k" / "test.jsonl", GSM8K, GSM8K, GSM8K)
    task = gsm8k(shots=2)
    first, second = task.samples(request(tmp_path))
    assert first.context == (
        "Question: Example 0?\nAnswer: 2 * 600 = 1200 nuts.\n#### 1,200\n\n"
        "Question: Example 1?\nAnswer: 2 * 600 = 1200 nuts.\n#### 1,200\n\n"
    )
    assert first.question == "Question: Tom has 2 bags of 600 nuts. How many nuts?\nAnswer:"
    assert (first.part, first.index, second.index, first.answers, first.new) == ("test", 0, 1, ("1200",), 256)
    assert not first.chat
    assert callable(task.metric) and task.metric(" It is $1,200.\n\nQuestion: 3", first) == 1.0


def test_gsm8k_without_examples_needs_no_train_file(tmp_path: Path) -> None:
    write(tmp_path / "test-first.jsonl", GSM8K)
    assert [sample.context for sample in gsm8k(shots=0).samples(request(tmp_path))] == [""]


def asked(question: str, *answers: str) -> dict:
    return {"question": question, "id": "x", "answers": [{"text": text, "answer_start": 0} for text in answers]}


def squad_file(folder: Path, *paragraphs: tuple[str, list[dict]]) -> None:
    """Two articles, the first with one paragraph."""
    written = [{"context": context, "qas": questions} for context, questions in paragraphs]
    articles = [{"title": "A", "paragraphs": written[:1]}, {"title": "B", "paragraphs": written[1:]}]
    write(folder / "dev-v2.0.json", {"version": "v2.0", "data": articles})


def test_squad_asks_all_questions_of_a_paragraph(tmp_path: Path) -> None:
    first = " It was built in 1893 by Ann Lee. ", [asked("When?", "1893", "in 1893", "1893"), asked("Who?", "Ann Lee")]
    impossible, long = ("None.", [asked("Why?")]), ("long " * 500, [asked("What?", "long")])
    squad_file(tmp_path, first, impossible, long, ("Red.", [asked("Which?", "Red")]), ("Blue.", [asked("?", "Blue")]))
    task = squad()
    samples = task.samples(request(tmp_path, samples=2, length=1000))
    assert [(s.part, s.index, s.asked, s.answers) for s in samples] == [
        ("dev", 0, 0, ("1893", "in 1893")),
        ("dev", 0, 1, ("Ann Lee",)),
        ("dev", 3, 0, ("Red",)),  # neither the one without an answer nor the one that does not fit
    ]
    assert samples[0].context == samples[1].context == "It was built in 1893 by Ann Lee.\n"
    assert samples[1].question.endswith("Who?") and all(sample.chat for sample in samples)
    assert callable(task.metric)
    texts = {" It was ANN LEE.": 1, "the Ann, Lee": 1, "Ann B. Lee": 0, "Lee": 0, "Joann Lee": 0, "": 0}
    assert {text: task.metric(text, samples[1]) for text in texts} == texts
    assert [s.asked for s in squad(questions=1).samples(request(tmp_path, length=1000))] == [0, 0]
    with pytest.raises(InputError, match=r"no paragraph of .* fits into 20 tokens"):
        task.samples(request(tmp_path, length=20))


@pytest.mark.parametrize(
    "content",
    [{"data": 1}, {"data": [{}]}, {"data": [{"paragraphs": [{"context": 1, "qas": [asked("?", "a")]}]}]}, {}],
)
def test_what_is_no_squad_file(tmp_path: Path, content: dict) -> None:
    write(tmp_path / "dev-v1.1.json", content)
    with pytest.raises(InputError, match=r"dev-v1\.1\.json is not a file of SQuAD"):
        squad().samples(request(tmp_path))


def test_official_names_come_first(tmp_path: Path) -> None:
    write(tmp_path / "test-other.jsonl", GSM8K | {"question": "other"})
    write(tmp_path / "test.jsonl", GSM8K)
    assert "Tom" in gsm8k(shots=0).samples(request(tmp_path))[0].question


def test_gsm8k_that_does_not_fit(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", GSM8K, GSM8K | {"question": "long " * 100})
    with pytest.raises(InputError, match=r"takes up to 779 tokens, not 300: ask for fewer shots or a greater length$"):
        gsm8k(shots=0).samples(request(tmp_path, length=300))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: longbench("qasper,nothing"),
            r"longbench has no set 'nothing': choose from all, narrativeqa, .*, repo",
        ),
        (lambda: longbench(""), r"longbench has no set '': choose from all"),
        (lambda: gsm8k(shots=-1), r"shots=-1 is negative"),
        (lambda: squad(questions=-1), r"questions=-1 is negative"),
    ],
)
def test_wrong_arguments(make: Callable, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("task", "address"),
    [
        (longbench("lcc"), "github.com/THUDM/LongBench"),
        (gsm8k(), "github.com/openai/grade-school-math"),
        (squad(), "rajpurkar.github.io/SQuAD-explorer"),
    ],
)
def test_missing_data(tmp_path: Path, task, address: str) -> None:
    with pytest.raises(InputError, match=rf"download them from https://{address}, then give --data DIR$"):
        task.samples(request(None))
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError) as error:
            task.samples(request(folder))
        assert str(folder / task.name) in str(error.value) and address in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"input": ', r"qasper\.jsonl, line 2 is not JSON: Expecting value"),
        (b"\xff\xfe{", r"qasper\.jsonl, line 2 is not UTF-8 text"),
        ("[" * 100_000, r"qasper\.jsonl, line 2 is nested too deeply"),
        (json.dumps(LINE | {"answers": []}), r"line 2: 'answers' is not a list of texts, at least one"),
        (json.dumps(LINE | {"answers": [None]}), r"line 2: 'answers' is not a list of texts, at least one"),
        ("[]", r"line 2 has no field 'context' that is a str"),
        (json.dumps(LINE | {"answers": "Ann"}), r"line 2 has no field 'answers' that is a list"),
    ],
)
def test_broken_lines(tmp_path: Path, line: str | bytes, message: str) -> None:
    line = line.encode() if isinstance(line, str) else line
    (tmp_path / "qasper.jsonl").write_bytes(json.dumps(LINE).encode() + b"\n" + line + b"\n")
    with pytest.raises(InputError, match=message):
        longbench("qasper").samples(request(tmp_path))
    assert len(longbench("qasper").samples(request(tmp_path, samples=1))) == 1  # the rest is not read


def test_blank_lines_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "qasper.jsonl").write_text(f"\n{json.dumps(LINE)}\n\n", "utf-8")
    assert [sample.index for sample in longbench("qasper").samples(request(tmp_path))] == [1]


@pytest.mark.parametrize(
    ("test", "train", "message"),
    [
        ([], [GSM8K] * 2, r"test\.jsonl is empty"),
        ([GSM8K], [GSM8K], r"train\.jsonl has 1 examples: too few for shots=2"),
        ([GSM8K, GSM8K | {"answer": "42"}], [GSM8K] * 2, r"test\.jsonl, line 2 has no number after '####'"),
    ],
)
def test_unusable_gsm8k_files(tmp_path: Path, test: list, train: list, message: str) -> None:
    write(tmp_path / "test.jsonl", *test)
    write(tmp_path / "train.jsonl", *train)
    with pytest.raises(InputError, match=message):
        gsm8k(shots=2).samples(request(tmp_path))
