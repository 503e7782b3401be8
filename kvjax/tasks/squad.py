"""SQuAD: questions about a paragraph, from the official file, grouped by the paragraph."""

from typing import Any

from kvjax.errors import InputError
from kvjax.files.text import read_json
from kvjax.tasks import jsonl
from kvjax.tasks.metrics import included
from kvjax.tasks.task import Request, Sample, Task

ADDRESS = "https://rajpurkar.github.io/SQuAD-explorer"
FILES = ("squad/dev-*.json", "dev-*.json", "squad/*.json")
NEW = 32  # tokens


def squad(questions: int = 0) -> Task:
    """Questions about paragraphs of Wikipedia; a paragraph is one context with all of its questions.

    Takes the first `samples` paragraphs, of those that fit into the longest length with their questions, of
    `DATA/squad/dev-*.json` or `DATA/dev-*.json`; of version 2 the questions that have an answer.

    Source: Rajpurkar et al. 2016 (arXiv:1606.05250), https://rajpurkar.github.io/SQuAD-explorer; grouped by context,
    and scored by inclusion, as KVzip's evaluation does (arXiv 2505.23416).
    Differs: the source asks for a span and scores exact match and F1; here an accepted answer has to be in the output.

    Args:
      questions: at most so many about each paragraph; 0 = all.
    """
    if questions < 0:
        raise InputError(f"squad: questions={questions} is negative")
    return Task("squad", lambda request: _samples(request, questions), score)


def score(text: str, sample: Sample) -> float:
    """1 if an accepted answer is in the text."""
    return max(included(text, answer) for answer in sample.answers)


def _samples(request: Request, most: int) -> list[Sample]:
    """All questions about the first paragraphs that fit."""
    path = jsonl.find(request.data, "squad", FILES, ADDRESS)
    try:
        paragraphs = [paragraph for article in read_json(path)["data"] for paragraph in article["paragraphs"]]
        groups = [_questions(index, paragraph, most) for index, paragraph in enumerate(paragraphs)]
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is not a file of SQuAD: download it from {ADDRESS}") from None
    limit = max(request.lengths)
    found = [group for group in groups if group and request.tokens(*group) <= limit][: request.samples]
    if not found:
        raise InputError(f"task squad: no paragraph of {path} fits into {limit} tokens with its questions")
    return [sample for group in found for sample in group]


def _questions(index: int, paragraph: dict[str, Any], most: int) -> list[Sample]:
    """The questions about one paragraph that have an answer."""
    samples = []
    for asked in paragraph["qas"]:
        answers = tuple(dict.fromkeys(answer["text"].strip() for answer in asked["answers"]))
        question = f"\nAnswer with a few words of the text. {asked['question'].strip()}"
        if answers and (not most or len(samples) < most):
            where = {"context": paragraph["context"].strip() + "\n", "question": question, "prefix": " Answer:"}
            samples.append(Sample("dev", index, **where, answers=answers, new=NEW, asked=len(samples)))
    return samples
