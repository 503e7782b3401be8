"""Perplexity and KL divergence on a given continuation.

A sample is a stretch of text whose beginning is compressed at prefill and whose end is read token by token through the
compressed cache. Token counts of the end vary a little: texts are cut between words.
"""

import re
from importlib import resources
from typing import Literal

from kvjax.errors import InputError
from kvjax.tasks import lines as document
from kvjax.tasks.task import Request, Sample, Task, fit, most

Source = Literal["auto", "text", "lines"]


def perplexity(tokens: int = 128, source: Source = "auto") -> Task:
    """Perplexity of the end of a text after its compressed beginning.

    Args:
      tokens: most tokens of the end that are judged; at most a quarter of the length.
      source: `text` = stretches of `--text`; `lines` = a generated list of lines, then questions with their answers,
        as the demo model knows them; `auto` = `lines` in the short form, `text` otherwise.

    Differs: the end's first token is not counted, since its distribution comes from prefill's exact attention.
    """
    return _task("perplexity", tokens, source)


def kl(tokens: int = 128, source: Source = "auto") -> Task:
    """KL divergence of next-token distributions from the full cache's, over the end of a text, teacher-forced.

    Args:
      tokens, source: as for `perplexity`.

    Source: the comparison that llama.cpp's `llama-perplexity --kl-divergence` makes for quantised models.
    """
    return _task("kl", tokens, source)


def _task(name: Literal["perplexity", "kl"], tokens: int, source: Source) -> Task:
    if tokens < 2:
        raise InputError(f"task {name}: tokens={tokens} is not at least 2")
    return Task(name, lambda request: _samples(request, name, tokens, source), name)


def _samples(request: Request, task: str, tokens: int, source: Source) -> list[Sample]:
    generated = source == "lines" or (source == "auto" and request.form == "short")
    draw = _lines if generated else _stretch
    # Both tasks judge the same texts.
    return [
        draw(request, task, length, min(tokens, length // 4), index)
        for length in request.lengths
        for index in range(request.samples)
    ]


def _lines(request: Request, task: str, length: int, tokens: int, index: int) -> Sample:
    """A list of lines; then questions, each with its answer."""
    rng = request.rng("text", str(length), index)
    doc = document.draw(rng, document.v.NUM_KEYS, tokens)  # one question takes several tokens

    def build(count: int) -> list[Sample]:
        shorter = doc._replace(keys=doc.keys[:count], values=doc.values[:count], asked=doc.asked % count)
        rows = document.text(shorter).splitlines(keepends=True)
        asked = _longest(rows[count:-1], tokens, request)  # the last one ends the document
        return [Sample(str(length), index, "".join(rows[:count]), asked, chat=False)]

    return _checked(request, task, tokens, *fit(request, task, length, build, 1, document.v.NUM_KEYS))


def _stretch(request: Request, task: str, length: int, tokens: int, index: int) -> Sample:
    """A stretch of the text at a random place."""
    words = re.findall(r"\s*\S+", request.text)
    span = min(length, len(words))
    start = int(request.rng("text", str(length), index).integers(len(words) - span + 1))
    words = words[start : start + span]

    def build(count: int) -> list[Sample]:
        end = _longest(words[count:], tokens, request)
        return [Sample(str(length), index, "".join(words[:count]), end, chat=False)]

    sample = _checked(request, task, tokens, *fit(request, task, length, build, 1, span - 1))
    if request.tokens(sample) < length // 2:
        raise InputError(f"task {task} needs a text of more than {length} tokens: give a longer --text FILE")
    return sample


def _checked(request: Request, task: str, tokens: int, sample: Sample) -> Sample:
    """A sample whose end has a token to be judged besides its first."""
    if len(request.encode(sample.question)) < 2:
        raise InputError(f"task {task}: tokens={tokens} is too small for an end of two tokens: give more")
    return sample


def _longest(pieces: list[str], tokens: int, request: Request) -> str:
    """As many of the pieces as `tokens` tokens can hold."""
    pieces = pieces[:tokens]
    return "".join(pieces[: most(len(pieces), lambda n: len(request.encode("".join(pieces[:n]))) <= tokens)])


def shipped_text() -> str:
    """The text that haystacks and perplexity are drawn from when none is given."""
    return resources.files("kvjax.tasks").joinpath("text.txt").read_text("utf-8")
