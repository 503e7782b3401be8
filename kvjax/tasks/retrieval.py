"""Tasks that look something up: line retrieval, the needle in a haystack and its relatives, the pass key.

>>> from kvjax.tasks.retrieval import needle
>>> needle(depths=11).name
'needle'

In the short form all of them are lines `key: value`, two numbers each, and a question `! key:` that the value answers:

    river: 217 130        niah_multivalue: `river: 217 130` and `river: 305 111` are hidden;
    apple: 183 405                         `! river:` is answered by ` 217 130 305 111`, in the order of the text
    ! river: 217 130      niah_multiquery: `! apple:river:` is answered by ` 183 405 217 130`
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from kvjax.errors import InputError
from kvjax.tasks import lines as demo_lines
from kvjax.tasks import vocabulary, words
from kvjax.tasks.needles import PIECES, Haystack, Kind, needle_task
from kvjax.tasks.synthetic import LAST, Case, Written, at_least, hide, noise, one_of, synthetic, value
from kvjax.tasks.task import Form, Sample, Task

REGISTERS = 50000  # LongEval's numbers are 1 to this many
SECRET = "secret:"  # the key of the short form's pass key
RECORD = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains "
    "a '<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its "
    "corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding "
    "<REGISTER_CONTENT> of a certain line index. Now the record start:\n\n"
)
QUIZ = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
    "about the important information there.\n"
)


class Registers(NamedTuple):
    """A record of lines."""

    names: Sequence[str]  # distinct
    contents: Sequence[int]  # of each line
    asked: int  # line


def draw_registers(rng: np.random.Generator, count: int) -> Registers:
    """A random record of `count` lines, and one of them."""
    contents = rng.integers(1, REGISTERS, size=count, endpoint=True).tolist()
    return Registers(words.pairs(rng, count), contents, int(rng.integers(count)))


def write_registers(content: Registers) -> Written:
    """A record in LongEval's wording."""
    rows = zip(content.names, content.contents, strict=True)
    record = "".join(f"line {name}: REGISTER_CONTENT is <{number}>\n" for name, number in rows)
    name, answer = content.names[content.asked], str(content.contents[content.asked])
    question = f"\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line {name}? I need the number."
    return Written(RECORD + record, question, [answer], new=100)


def write_lines(doc: demo_lines.Lines) -> Written:
    """A document of `kvjax.tasks.lines` as a prompt that ends in its last question."""
    answer = demo_lines.answers(doc)[-1]
    context, mark, key = demo_lines.text(doc).removesuffix(answer + "\n").rpartition(LAST)
    return Written(context, mark + key, [answer])


def lines(count: int = 0) -> Task:
    """Line retrieval. The short form is the text of `kvjax.tasks.lines`.

    Args:
      count: lines; 0 = as many as fit (the short form has at most 1,024).

    Source: Li et al., LongChat and LongEval (2023): wording, new tokens, score (`last_number`).
    Differs: names of lines are made of our words (`words`); the question does not end in a space.
    """
    at_least("lines", "count", count, 0)
    if count > words.num_pairs():
        raise InputError(f"task lines: count={count} is too large: there are {words.num_pairs()} names of lines")

    def write(case: Case, size: int) -> Written:
        short = case.form == "short"
        content = demo_lines.draw(case.rng(), size, 1) if short else draw_registers(case.rng(), size)
        if isinstance(content, Registers):
            text, line = write_registers(content), content.asked
        else:
            text, line = write_lines(content), int(content.asked[-1])
        return text._replace(facts={"depth": line / max(1, size - 1), "lines": size})

    def sizes(form: Form) -> tuple[int, int]:
        most = vocabulary.NUM_KEYS if form == "short" else words.num_pairs()
        return (count, min(count, most)) if count else (1, most)

    return synthetic("lines", write, sizes, last_number)


def last_number(text: str, sample: Sample) -> float:
    """Whether the last number of the text is the answer. Source: LongEval."""
    found = re.findall(r"\d+", text)
    return float(bool(found) and int(found[-1]) == int(sample.answers[0]))


def draw_passkey(rng: np.random.Generator, form: Form) -> str:
    """A random pass key: a number of 5 digits, or a value of the short form."""
    if form == "short":
        return value(rng.integers(vocabulary.NUM_NUMBERS, size=2).tolist())
    return str(rng.integers(10000, REGISTERS, endpoint=True))


def write_passkey(form: Form, key: str, pieces: Sequence[str], depth: float) -> Written:
    """A pass key at a depth (0 to 1) of a haystack."""
    if form == "short":
        return Written(hide(pieces, [f"{SECRET}{key}\n"], [depth]), LAST + SECRET, [key])
    line = f"The pass key is {key}. Remember it. {key} is the pass key.\n"
    return Written(QUIZ + hide(pieces, [line], [depth]), "What is the pass key?", [key], " The pass key is", 10)


def passkey() -> Task:
    """A pass key at a random depth of noise. The short form hides the line `secret: 217 130`.

    Source: Mohtashami & Jaggi, Landmark Attention (2023): wording, new tokens, score (`first_number`).
    Differs: the key always has 5 digits (10000 to 50000), the noise is cut at whole repetitions, one per line.
    """

    def write(case: Case, size: int) -> Written:
        rng = case.rng()
        key, depth = draw_passkey(rng, case.form), float(rng.random())
        return write_passkey(case.form, key, noise(size), depth)._replace(facts={"depth": depth})

    return synthetic("passkey", write, lambda form: (1, PIECES), first_number)


def first_number(text: str, sample: Sample) -> float:
    """Whether the first number of the text is the answer. Source: Mohtashami & Jaggi."""
    found = re.search(r"\d+", text)
    return float(found is not None and int(found[0]) == int(sample.answers[0]))


def needle(depths: int = 5) -> Task:
    """One needle at a depth of an essay: sample i at the (i mod depths)-th of `depths` equally spaced ones.

    Facts: `depth` 0 to 1, `length` [tokens]. A grid over both has `samples` = a multiple of `depths`.

    Source: Kamradt, LLMTest_NeedleInAHaystack (2023), with the needle and the wording of RULER's niah_single_2.
    Differs: the needle is drawn at random, so that no answer comes from the weights; the score is whether the
      answer is in the output, not a model's opinion.
    """
    at_least("needle", "depths", depths, 1)
    depth = lambda index: index % depths / (depths - 1) if depths > 1 else 0.5
    return needle_task("needle", "essay", "words", "numbers", depth=depth)


def niah_single(haystack: Haystack = "noise", keys: Kind = "words", values: Kind = "numbers") -> Task:
    """One needle; the default is RULER's niah_single_1.

    Args:
      haystack: `essay` is niah_single_2, and with `values="uuids"` niah_single_3.
      keys: kind of the keys; natural form only.
      values: kind of the values; natural form only.

    Source: Hsieh et al., RULER (2024): definition, wording, score (`match_all`).
    Differs: words and text are ours (`words`, `synthetic.essay`); keys are distinct; every haystack hides needles at
      the 40 depths that RULER has for essays.
    """
    return needle_task("niah_single", haystack, keys, values)


def niah_multikey(
    haystack: Haystack = "essay", keys: Kind = "words", values: Kind = "numbers", needles: int = 4, questions: int = 1
) -> Task:
    """Several needles with different keys, one asked for; the default is RULER's niah_multikey_1.

    Args:
      haystack: `needle` = it consists of needles: niah_multikey_2, and with uuids for keys and values niah_multikey_3.
      keys: kind of the keys; natural form only.
      values: kind of the values; natural form only.
      needles: how many; with `haystack="needle"` at least so many.
      questions: about each context, for different needles.

    Source: as `niah_single`.
    Differs: as `niah_single`.
    """
    at_least("niah_multikey", "needles", needles, 1)
    at_least("niah_multikey", "questions", questions, 1)
    if questions > needles:
        raise InputError(f"task niah_multikey: questions={questions} is more than needles={needles}")
    return needle_task("niah_multikey", haystack, keys, values, needles, questions=questions)


def niah_multivalue(
    haystack: Literal["noise", "essay"] = "essay", keys: Kind = "words", values: Kind = "numbers", needles: int = 4
) -> Task:
    """One key several times with different values, all asked for; the default is RULER's niah_multivalue.

    Args:
      haystack: what the needles are hidden in.
      keys: kind of the key; natural form only.
      values: kind of the values; natural form only.
      needles: values of the key.

    Source: as `niah_single`.
    Differs: as `niah_single`.
    """
    at_least("niah_multivalue", "needles", needles, 1)
    one_of("niah_multivalue", "haystack", haystack, Literal["noise", "essay"])
    return needle_task("niah_multivalue", haystack, keys, values, 1, needles)


def niah_multiquery(
    haystack: Haystack = "essay", keys: Kind = "words", values: Kind = "numbers", queries: int = 4
) -> Task:
    """Several needles with different keys, all asked for; the default is RULER's niah_multiquery.

    Args:
      haystack: `needle` = it consists of needles.
      keys: kind of the keys; natural form only.
      values: kind of the values; natural form only.
      queries: needles that are asked for.

    Source: as `niah_single`.
    Differs: as `niah_single`.
    """
    at_least("niah_multiquery", "queries", queries, 1)
    return needle_task("niah_multiquery", haystack, keys, values, queries, 1, queries)
