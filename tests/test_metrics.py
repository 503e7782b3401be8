"""Metrics of the file tasks: values recorded from the official implementations.

Recorded with LongBench's metrics.py (github.com/THUDM/LongBench, commit f6227eb), the PyPI packages rouge 1.0.1,
fuzzywuzzy 0.18.0 and python-Levenshtein 0.27.5.
"""

import sys
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.errors import InputError
from kvjax.tasks import metrics
from kvjax.tasks.gsm8k import score as gsm8k_score
from kvjax.tasks.longbench import score as longbench_score
from kvjax.tasks.task import Sample

CLASSES = ("City", "Other location", "Location", "Other number", "Number", "Num", "N")
OFFICIAL = {
    metrics.qa_f1: [
        ("The Eiffel Tower", "eiffel tower", 1.0),
        ("It was built in 1889, in Paris.", "Paris", 0.25),
        ("a an the", "the", 0.0),
        ("yes yes yes no", "yes no", 0.6666666666666666),
        ("U.S.A.", "usa", 1.0),
        ("", "Paris", 0.0),
        ("Barack Obama's wife", "Michelle Obama", 0.0),
    ],
    metrics.rouge_l: [
        ("the cat sat on the mat", "the cat is on the mat", 0.7999999950000002),
        (
            "The report finds that GAO made 12 recommendations. The agency agreed with ten of them.",
            "GAO made 12 recommendations. The agency agreed with ten.",
            0.782608690888469,
        ),
        (
            "Amanda baked cookies and will bring Jerry some tomorrow.",
            "Amanda baked cookies and will bring some to Jerry tomorrow.",
            0.8421052581717452,
        ),
        ("b. a. c. a. b", "a b c. b a c", 0.999999995),
        ("no no no no no yes", "no yes no yes", 0.999999995),
        ("Costs rose by 3.5 percent... ", "costs rose by 3.5 percent. ", 0.8571428521428571),
        ("First line\nsecond line. Third", "first line second line. Third", 0.749999995),
        ("", "anything", 0.0),
        ("...", "anything", 0.0),
        ("nothing shared", "entirely different words", 0.0),
    ],
    metrics.code_similarity: [
        ("\n\n    return x + 1\n", "    return x + 1", 1.0),
        ("# comment\n// more\nreturn y", "    return x", 0.7),
        ("```python\nfor i in range(10):\n    pass", "for j in range(12):", 0.89),
        ("", "x = 1", 0.0),
        ("#only a comment", "", 1.0),
        ("x = 1", "", 0.0),
        ("self.assertEqual(result.status_code, 200)", "        self.assertEqual(response.status_code, 404)", 0.78),
        ("import numpy as np", "from os import path", 0.49),
        ("int a = foo(b, c);\nint d;", "int a = bar(c, b);", 0.72),
        ("abcab", "bcaba", 0.8),
    ],
    metrics.count: [
        ("17", "17", 1.0),
        ("There are 17 of 30 paragraphs", "17", 0.5),
        ("seventeen", "17", 0.0),
        ("017", "17", 0.0),
        ("1717", "17", 0.0),
    ],
    metrics.retrieval: [
        ("Paragraph 7", "Paragraph 7", 1.0),
        ("7", "Paragraph 7", 1.0),
        ("Paragraph 7, not Paragraph 17", "Paragraph 7", 0.5),
        ("Paragraph seven", "Paragraph 7", 0.0),
        ("Paragraph 70", "Paragraph 7", 0.0),
    ],
    partial(metrics.classification, classes=CLASSES): [
        ("Other number", "Other number", 1.0),
        ("Number of something", "Number", 0.5),  # Num does not count, N after it does
        ("City or Location", "City", 0.5),
        ("a place", "City", 0.0),
        ("Other location", "Location", 0.0),
        ("Other Number", "Number", 0.5),
        ("City", "Location", 0.0),
    ],
}
PACKAGES = {metrics.rouge_l: "rouge_score", metrics.code_similarity: "rapidfuzz"}


@pytest.mark.parametrize(
    ("metric", "prediction", "answer", "value"),
    [(metric, *case) for metric, cases in OFFICIAL.items() for case in cases],
)
def test_official_values(metric, prediction: str, answer: str, value: float) -> None:
    pytest.importorskip(PACKAGES.get(metric, "json"))
    assert metric(prediction, answer) == pytest.approx(value, abs=1e-7)


@pytest.mark.parametrize("metric", OFFICIAL)
@given(prediction=st.text("ab. \n17`#Paragraph"), answer=st.text("ab. \n17Paragraph"))
@settings(max_examples=40)
def test_scores_lie_between_0_and_1(metric, prediction: str, answer: str) -> None:
    pytest.importorskip(PACKAGES.get(metric, "json"))
    assert 0 <= metric(prediction, answer) <= 1


@pytest.mark.parametrize("metric", PACKAGES)
def test_missing_package(metric, monkeypatch: pytest.MonkeyPatch) -> None:
    name = PACKAGES[metric]
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    with pytest.raises(InputError, match=rf"needs the package {name.replace('_', '-')}: pip install 'kvjax\[eval\]'$"):
        metric("a", "b")


@pytest.mark.parametrize(
    ("part", "text", "answers", "value"),
    [
        ("triviaqa", "\n\nParis\nPassage: Rome", ("Rome", "Paris"), 1.0),
        ("triviaqa", "Rome\nParis", ("Paris",), 0.0),
        ("hotpotqa", "Rome\nParis", ("Paris",), 2 / 3),
        ("trec", "City\nNum", ("City",), 1.0),
        ("trec", "City, Location", ("City",), 0.5),
    ],
)
def test_longbench_score(part: str, text: str, answers: tuple[str, ...], value: float) -> None:
    sample = Sample(part, 0, "", answers=answers, facts={"classes": "\n".join(CLASSES)})
    assert longbench_score(text, sample) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 + 3 = 5 apples.\n#### 5", "5"),
        ("He pays $1,234.50.", "1234.50"),
        ("It is 18.", "18"),
        ("It fell to -7 degrees", "-7"),
        ("of 10-15 some", "15"),
        ("a loss of -$3,000", "-3000"),
        ("0.5 or .25", ".25"),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert metrics.last_number(text) == number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (" 40 + 2 = 42.\n#### 42\n\nQuestion: What is 1 + 1?\nAnswer: 2", 1.0),
        (" 42 or 43", 0.0),
        (" 142", 0.0),
        (" I do not know\n\nQuestion: 42", 0.0),
    ],
)
def test_gsm8k_score(text: str, value: float) -> None:
    assert gsm8k_score(text, Sample("test", 0, "", answers=("42",))) == value
