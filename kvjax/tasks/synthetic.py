"""What the synthetic tasks share: one sample of a given length, haystacks and scores.

A task is two functions: one draws content from a generator, one writes content as text in one of two forms. `short`
is made of the demo model's keys (`apple:`) and numbers (` 217`) and can be trained on; `natural` is the wording that a
benchmark published. Both are plain functions, so that a training program can call them with its own generators.
"""

import functools
import re
import typing
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from kvjax.errors import InputError
from kvjax.tasks import vocabulary
from kvjax.tasks.task import Form, Request, Sample, Task, fit

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
LAST = "! "  # asks, in the short form
_SENTENCE = re.compile(r"\S.{0,400}?[.!?](?=\s|$)|\S.{0,400}(?=\s|$)|\S{400}")  # or words, or letters

Metric = Callable[[str, Sample], float]


class Written(NamedTuple):
    """A prompt as text, and what is expected after it."""

    context: str
    question: str
    answers: Sequence[str]
    prefix: str = ""
    new: int = 0  # tokens that the benchmark generates; the answers' are the least
    facts: dict[str, int | float | str] = {}  # noqa: RUF012  (never changed)


class Case(NamedTuple):
    """Which sample is to be written."""

    request: Request
    task: str
    length: int  # of prompt and answer together [tokens]
    index: int  # within the length
    asked: int = 0  # which of the questions about the context

    @property
    def form(self) -> Form:
        """The form of the prompt."""
        return self.request.form

    def rng(self) -> np.random.Generator:
        """The sample's generator, from its beginning."""
        return self.request.rng(self.task, str(self.length), self.index)


def synthetic(
    name: str,
    write: Callable[[Case, int], Written],
    sizes: Callable[[Form], tuple[int, int]],
    metric: Metric,
    questions: int = 1,
) -> Task:
    """A task whose parts are lengths and whose samples are as long as fits.

    Args:
      name: of the task.
      write: `(case, size) -> text`, longer for a larger size (lines, sentences, words).
      sizes: the least and the largest size of a form.
      metric: of the natural form; the short form is scored by `short_score`.
      questions: about each context, which `write` makes the same for all of them.
    """

    def one(request: Request, length: int, index: int) -> Sequence[Sample]:
        cases = [Case(request, name, length, index, asked) for asked in range(questions)]
        least, most = sizes(request.form)
        if least > most:
            raise InputError(f"task {name}: {least} is more than the {most} keys that the {request.form} form has")
        build = functools.cache(lambda size: [_sample(case, write(case, size)) for case in cases])
        size = least
        while size < most and request.tokens(*build(size)) <= length:  # no text much longer than the prompt is counted
            size = min(2 * size, most)
        return fit(request, name, length, build, least, size)

    def samples(request: Request) -> list[Sample]:
        whole = (one(request, length, index) for length in request.lengths for index in range(request.samples))
        return [sample for questions in whole for sample in questions]

    return Task(name, samples, lambda text, sample: (metric if sample.chat else short_score)(text, sample))


def _sample(case: Case, text: Written) -> Sample:
    natural = case.form == "natural"
    answer = " " + " ".join(text.answers) if natural else "".join(text.answers)
    new = max(text.new if natural else 0, len(case.request.encode(answer)))
    facts = {"length": case.length, **text.facts}
    prompt = (text.context, text.question, text.prefix)
    return Sample(str(case.length), case.index, *prompt, tuple(text.answers), new, natural, facts, case.asked)


def short_score(text: str, sample: Sample) -> float:
    """One answer: whether the first line is it. Several: the fraction of them that the first line contains."""
    line = text.split("\n")[0]
    if len(sample.answers) == 1:
        return float(line.strip() == sample.answers[0].strip())
    return sum(answer in line for answer in sample.answers) / len(sample.answers)


def match_all(text: str, sample: Sample) -> float:
    """The fraction of the answers that the text contains, in upper or lower case.

    Source: RULER's `string_match_all`.
    """
    return sum(answer.lower() in text.lower() for answer in sample.answers) / len(sample.answers)


def value(numbers: Sequence[int]) -> str:
    """Numbers of the demo model's vocabulary as text: ` 217 130`."""
    return "".join(map(vocabulary.number, numbers))


def noise(count: int) -> list[str]:
    """A haystack that says nothing: `count` times the same line.

    Source: Mohtashami & Jaggi, Landmark Attention (2023); RULER.
    """
    return [NOISE + "\n"] * count


def essay(rng: np.random.Generator, form: Form, text: str, count: int) -> list[str]:
    """A haystack of `count` pieces of a text, from a random one on and round its end.

    Pieces are sentences, each with a space behind it; in the short form they are lines without any key.

    Source: RULER, needle in a haystack.
    Differs: the text is any text instead of Paul Graham's essays; it does not always begin at its first sentence;
      sentences are cut by a regular expression instead of NLTK, and after 400 letters anyway.
    """
    pieces = _pieces(text, form)
    if not pieces:
        raise InputError("the text for haystacks is empty: give a text of a few sentences")
    start = int(rng.integers(len(pieces)))
    return [pieces[(start + index) % len(pieces)] for index in range(count)]


@functools.lru_cache(maxsize=4)
def _pieces(text: str, form: Form) -> tuple[str, ...]:
    if form == "natural":
        return tuple(sentence + " " for sentence in _SENTENCE.findall(" ".join(text.split())))
    lines = (line.strip() for line in text.splitlines())
    return tuple(line + "\n" for line in lines if line and not set(re.findall(r"\w+:", line)) & set(vocabulary.keys()))


def hide(pieces: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> str:
    """The haystack with each needle between two pieces, as near to its depth as there is such a place.

    Args:
      pieces: of the haystack.
      needles: in the order in which they are to appear.
      depths: fractions of the haystack's characters, ascending.
    """
    ends = np.cumsum([0, *map(len, pieces)])
    places = np.searchsorted((ends[1:] + ends[:-1]) / 2, np.asarray(depths) * ends[-1], side="right")
    parts = list(pieces)
    for place, needle in reversed(list(zip(places.tolist(), needles, strict=True))):
        parts.insert(place, needle)
    return "".join(parts).rstrip() + "\n"


def at_least(task: str, name: str, given: int, least: int) -> None:
    """Refuse an argument that is too small."""
    if given < least:
        raise InputError(f"task {task}: {name}={given} is too small: give {least} or more")


def one_of(task: str, name: str, given: str, accepted: object) -> None:
    """Refuse an argument that is not one of a `Literal`'s."""
    if given not in (choices := typing.get_args(accepted)):
        raise InputError(f"task {task}: {name}={given} is not one of {', '.join(choices)}")
