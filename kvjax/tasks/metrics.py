"""Metrics of the file tasks: `(prediction, answer) -> score`, 0 to 1."""

import importlib
import re
import string
from collections import Counter
from collections.abc import Sequence
from types import ModuleType

from kvjax.errors import InputError

PUNCTUATION = str.maketrans("", "", string.punctuation)


def qa_f1(prediction: str, answer: str) -> float:
    """F1 of the words that prediction and answer share, without case, punctuation and articles.

    Source: LongBench, `qa_f1_score` (from SQuAD).
    Differs: no.
    """
    said, expected = _plain_words(prediction), _plain_words(answer)
    return _f1((Counter(said) & Counter(expected)).total(), len(said), len(expected))


def included(prediction: str, answer: str) -> float:
    """Whether the answer's words stand in the prediction one after the other, as `qa_f1` reads words."""
    said, expected = (" ".join(_plain_words(text)) for text in (prediction, answer))
    return float(bool(expected) and f" {expected} " in f" {said} ")


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L F1 of a summary: distinct words in longest common subsequences of any two sentences.

    Source: LongBench, `rouge_score`: rouge-l of the PyPI package `rouge` 1.0.1, which splits sentences at full stops
    only, keeps case and punctuation, and counts a word once however often it occurs.
    Differs: no; `rouge` adds 1e-8 to a denominator and gives up (0) on sentences of about 1000 words. The subsequences
    come from the package `rouge-score`; its own ROUGE-L counts repeated words and has other values.
    """
    lcs = _package("rouge_score.rouge_scorer").lcs_ind
    said, expected = _sentences(prediction), _sentences(answer)
    common = {one[at] for one in said for other in expected for at in lcs(one, other)}  # order decides between ties
    return _f1(len(common), len(set().union(*said)), len(set().union(*expected)))


def code_similarity(prediction: str, answer: str) -> float:
    """Edit similarity of a line of code: the first predicted one without `, # or //, in steps of 0.01.

    Source: LongBench, `code_sim_score`: `fuzzywuzzy.fuzz.ratio`.
    Differs: no, where python-Levenshtein is installed beside fuzzywuzzy; without, fuzzywuzzy takes difflib's ratio,
    which is never higher (by 0.03 lower on average over 3000 edited lines of code).
    """
    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(_package("rapidfuzz.fuzz").ratio(code, answer)) / 100


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """One over the number of classes that the prediction names, if the right one is among them.

    Source: LongBench, `classification_score`.
    Differs: no. A class whose name is part of the right one's does not count; as in the source, of two such classes in
    a row the second counts.
    """
    named = [name for name in classes if name in prediction]
    for name in named:
        if name in answer and name != answer:
            named.remove(name)  # while iterating: what follows is passed over
    return 1 / len(named) if answer in named else 0.0


def count(prediction: str, answer: str) -> float:
    """Share of the right number among the predicted ones.

    Source: LongBench, `count_score`.
    Differs: no.
    """
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answer: str) -> float:
    """Share of the right paragraph's number among the predicted ones; answers read `Paragraph 7`.

    Source: LongBench, `retrieval_score`.
    Differs: an answer without `Paragraph` scores 0 instead of failing.
    """
    paragraph = re.search(r"Paragraph (\d+)", answer)
    return count(prediction, paragraph[1]) if paragraph else 0.0


def last_number(text: str) -> str | None:
    """The last number of a text without `$` and commas, as it is written; None if there is none.

    >>> last_number("That is 2 x $1,200 = $2,400.")
    '2400'
    """
    numbers = re.findall(r"(?:(?<!\d)-)?\d*\.?\d+", re.sub(r"[$,]", "", text))
    return numbers[-1] if numbers else None


def _plain_words(text: str) -> list[str]:
    """Words in lower case without punctuation and articles."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split()


def _sentences(text: str) -> list[list[str]]:
    """Words of what stands between full stops; a blank sentence has the empty word, as in `rouge`."""
    return [sentence.split() or [""] for sentence in text.split(".") if sentence]


def _f1(common: int, said: int, expected: int) -> float:
    """Harmonic mean of `common / said` and `common / expected`."""
    return 2 * common / (said + expected) if common else 0.0


def _package(name: str) -> ModuleType:
    """A module of an optional package."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0].replace("_", "-")
        raise InputError(f"a metric needs the package {package}: pip install 'kvjax[eval]'") from error
