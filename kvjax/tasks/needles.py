"""Needles in a haystack: pairs of a key and its values, hidden in a text, and a question for some of the keys."""

import uuid
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from kvjax.errors import InputError
from kvjax.tasks import lines as demo_lines
from kvjax.tasks import vocabulary, words
from kvjax.tasks.synthetic import LAST, Case, Written, essay, hide, match_all, noise, one_of, synthetic, value
from kvjax.tasks.task import Form, Task

Haystack = Literal["noise", "essay", "needle"]
Kind = Literal["words", "numbers", "uuids"]
PIECES = 1 << 24  # no haystack is larger
DEPTHS = 40  # places for needles


class Needles(NamedTuple):
    """What is hidden and what is asked for."""

    keys: Sequence[str]  # distinct
    values: Sequence[Sequence[str]]  # of each key
    asked: Sequence[int]  # keys, in the order of the question


def draw_needles(
    rng: np.random.Generator, form: Form, keys: Kind, values: Kind, count: int, each: int = 1, asked: int = 1
) -> Needles:
    """Random needles: `count` keys with `each` values, `asked` of them asked for.

    The short form knows only one kind: `kvjax.tasks.lines`. Otherwise numbers have 7 digits, as in RULER.
    """
    if form == "short":
        doc = demo_lines.draw(rng, count * each, 1)
        names = [vocabulary.keys()[key] for key in doc.keys[:count]]
        found = [value(numbers) for numbers in doc.values.tolist()]
    else:
        names, found = draw_strings(rng, keys, count), draw_strings(rng, values, count * each)
    chosen = rng.choice(count, asked, replace=False).tolist()
    return Needles(names, [found[each * key : each * (key + 1)] for key in range(count)], chosen)


def draw_strings(rng: np.random.Generator, kind: Kind, count: int) -> list[str]:
    """Distinct random words `brave-otter`, numbers of 7 digits or UUIDs."""
    if kind == "words":
        return words.pairs(rng, count)
    if kind == "numbers":
        return [str(10**6 + number) for number in rng.choice(9 * 10**6, count, replace=False).tolist()]
    return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(count)]


def draw_depths(rng: np.random.Generator, count: int) -> list[float]:
    """Distinct depths, ascending, out of 40 equally spaced ones from 0 to 1."""
    return (np.sort(rng.choice(DEPTHS, count, replace=False)) / (DEPTHS - 1)).tolist()


def write_needles(
    form: Form, content: Needles, values: Kind, pieces: Sequence[str], depths: Sequence[float], end: str = "\n"
) -> Written:
    """Needles in a haystack as text, in RULER's wording or short.

    Args:
      form: of the prompt.
      content: from `draw_needles`.
      values: their kind.
      pieces: of the haystack; none = the needles are the haystack.
      depths: of the needles, ascending.
      end: what follows a needle in the natural form.
    """
    kind = str(values)
    line = "{key}{value}\n" if form == "short" else f"One of the special magic {kind} for {{key}} is: {{value}}.{end}"
    pairs = [(key, one) for key, each in zip(content.keys, content.values, strict=True) for one in each]
    hidden = [line.format(key=key, value=one) for key, one in pairs]
    text = hide(pieces, hidden, depths) if pieces else "".join(hidden).rstrip() + "\n"
    answers = [one for key in content.asked for one in content.values[key]]
    asked = [content.keys[key] for key in content.asked]
    if form == "short":
        return Written(text, LAST + "".join(asked), answers)
    some, are, are_all = ("Some", "are", "are all") if len(answers) > 1 else ("A", "is", "is")
    kind = kind if len(answers) > 1 else kind.removesuffix("s")
    query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
    head = (
        f"{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {kind} afterwards.\n"
    )
    question = f"What {are_all} the special magic {kind} for {query} mentioned in the provided text?"
    prefix = f" The special magic {kind} for {query} mentioned in the provided text {are}"
    return Written(head + text, question, answers, prefix, 128)


def needle_task(
    name: str, haystack: str, keys: Kind, values: Kind, count: int = 1, each: int = 1, asked: int = 1,
    depth: Callable[[int], float] | None = None, questions: int = 1,
) -> Task:  # fmt: skip
    """Any task of needles; `depth` gives the one needle's from a sample's index. Questions ask for different keys."""
    for argument, given, accepted in (("haystack", haystack, Haystack), ("keys", keys, Kind), ("values", values, Kind)):
        one_of(name, argument, given, accepted)
    if (hidden := haystack != "needle") and count * each > DEPTHS:
        raise InputError(f"task {name}: {count * each} needles are too many: a haystack has {DEPTHS} places")

    def write(case: Case, size: int) -> Written:
        rng = case.rng()
        content = draw_needles(rng, case.form, keys, values, count if hidden else size, each, asked * questions)
        content = content._replace(asked=content.asked[asked * case.asked : asked * (case.asked + 1)])
        if not hidden:
            facts = {"depth": content.asked[0] / max(1, size - 1), "lines": size}
            return write_needles(case.form, content, values, [], [])._replace(facts=facts)
        depths = [depth(case.index)] if depth else draw_depths(rng, count * each)
        pieces = noise(size) if haystack == "noise" else essay(rng, case.form, case.request.text, size)
        end = " " if haystack == "essay" else "\n"
        facts = {"depth": depths[content.asked[0] * each]} if asked * each == 1 else {}
        return write_needles(case.form, content, values, pieces, depths, end)._replace(facts=facts)

    def sizes(form: Form) -> tuple[int, int]:
        if hidden:
            return 1, PIECES
        return count, vocabulary.NUM_KEYS if form == "short" else words.num_pairs()

    return synthetic(name, write, sizes, match_all, questions)
