"""Facts in an essay and a question about each: the context is compressed once, and then asked several times."""

from collections.abc import Sequence

import numpy as np

from kvjax.errors import InputError
from kvjax.tasks import words
from kvjax.tasks.needles import DEPTHS, PIECES, Needles, draw_depths, draw_needles, write_needles
from kvjax.tasks.synthetic import Case, Written, at_least, essay, hide, match_all, synthetic
from kvjax.tasks.task import Form, Task

HEAD = (
    "Some secret codes are hidden within the following text. Make sure to memorize them. "
    "I will quiz you about the codes afterwards.\n"
)


def draw_facts(rng: np.random.Generator, form: Form, count: int) -> Needles:
    """Random facts, all of them asked for: `green harbor` has `4821-candle`. The short form has its own."""
    if form == "short":
        return draw_needles(rng, form, "words", "words", count, asked=count)
    names = [pair.replace("-", " ") for pair in words.pairs(rng, count)]
    numbers = (1000 + rng.choice(9000, count, replace=False)).tolist()
    nouns = rng.choice(words.nouns(), count, replace=False)
    values = [[f"{number}-{noun}"] for number, noun in zip(numbers, nouns, strict=True)]
    return Needles(names, values, rng.permutation(count).tolist())


def write_facts(form: Form, content: Needles, asked: int, pieces: Sequence[str], depths: Sequence[float]) -> Written:
    """An essay with facts, and one of the questions.

    Args:
      form: of the prompt.
      content: from `draw_facts`.
      asked: which of its questions.
      pieces: of the essay.
      depths: of the facts, ascending.
    """
    fact = content.asked[asked]
    facts: dict[str, int | float | str] = {"depth": depths[fact]}
    if form == "short":
        return write_needles(form, content._replace(asked=[fact]), "words", pieces, depths)._replace(facts=facts)
    rows = zip(content.keys, content.values, strict=True)
    hidden = [f"The secret code of the {name} is {value}. " for name, (value,) in rows]
    text, code = hide(pieces, hidden, depths), f"secret code of the {content.keys[fact]} mentioned in the provided text"
    return Written(HEAD + text, f"What is the {code}?", content.values[fact], f" The {code} is", 32, facts)


def facts(count: int = 4, questions: int = 0) -> Task:
    """Facts at random depths of an essay, and questions about them, each for another one.

    A method that keeps one of them by luck answers one question of its context. Values are of several tokens, which
    neither the essay nor the weights tell: `4821-candle`.

    Args:
      count: facts in a context.
      questions: about each context; 0 = one about each fact.

    Source: the protocol of KVzip (arXiv 2505.23416): a context is compressed once, before all of its questions; needles
    in an essay as in `needle`, the score is whether the value is in the output (`match_all`).
    """
    at_least("facts", "count", count, 1)
    at_least("facts", "questions", questions, 0)
    if count > DEPTHS or questions > count:
        raise InputError(f"task facts: {count} facts and {questions} questions: at most {DEPTHS}, and a fact for each")

    def write(case: Case, size: int) -> Written:
        rng = case.rng()
        content, depths = draw_facts(rng, case.form, count), draw_depths(rng, count)
        pieces = essay(rng, case.form, case.request.text, size)
        return write_facts(case.form, content, case.asked, pieces, depths)

    return synthetic("facts", write, lambda form: (1, PIECES), match_all, questions or count)
