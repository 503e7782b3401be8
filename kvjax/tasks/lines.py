"""Line retrieval, the demo model's first task: a list of `key: value` lines, then questions about them.

    river: 217 130
    apple: 183 405
    ? river: 217 130
    ! apple: 183 405

`? ` asks for a line, `! ` asks for the last one: after its answer the document ends with EOS. A key with its colon, a
number and a newline are one token each, hence a line costs 4 tokens and a question 5. A value is two numbers because
the first one already follows from the prompt's exact attention: only the second is read from a compressed cache.
This module is the only source of such text: for training, for scoring and for the programs' default prompt.
"""

from typing import NamedTuple

import numpy as np

from kvjax.tasks import vocabulary as v

LINE, QUESTION, ANSWER_TOKENS = 4, 5, 2  # tokens
SCORING = 0x73636F72  # entropy: training has another
ANSWER, STRUCTURE, NOISE = 1.0, 0.1, 0.01  # weights of the loss: numbers asked for, predictable tokens, random tokens


class Lines(NamedTuple):
    """A document before it becomes text or tokens."""

    keys: np.ndarray  # [lines] distinct keys
    values: np.ndarray  # [lines 2] numbers; the first ones are distinct where they can be
    asked: np.ndarray  # [questions] lines that are asked for


def scoring_rng(seed: int, tokens: int = 0) -> np.random.Generator:
    """The generator of the prompts of one length; training never uses it."""
    return np.random.default_rng([SCORING, seed, tokens])


def draw(rng: np.random.Generator, lines: int, questions: int) -> Lines:
    """A random document; every question asks for a line at a uniformly random depth."""
    if not 1 <= lines <= v.NUM_KEYS:
        raise ValueError(f"a document has 1 to {v.NUM_KEYS} lines (keys are distinct), got {lines}")
    keys = rng.permutation(v.NUM_KEYS)[:lines]
    first = np.resize(rng.permutation(v.NUM_NUMBERS), lines)
    values = np.stack([first, rng.integers(v.NUM_NUMBERS, size=lines)], axis=1)
    return Lines(keys, values, rng.integers(lines, size=questions))


def fitting_lines(tokens: int, questions: int, ending: int) -> int:
    """The most lines of a document of at most `tokens` tokens with BOS, `questions` and `ending` more tokens."""
    lines = (tokens - 1 - QUESTION * questions - ending) // LINE
    if lines < 1:
        raise ValueError(f"{tokens} tokens are too few for one line and {questions} questions")
    return min(lines, v.NUM_KEYS)


def text(doc: Lines) -> str:
    """The document as text, without EOS."""
    keys = v.keys()
    pairs = zip(doc.keys.tolist(), doc.values.tolist(), strict=True)
    lines = [f"{keys[key]}{_value(value)}\n" for key, value in pairs]
    marks = ["? "] * (len(doc.asked) - 1) + ["! "]
    return "".join(lines + [mark + lines[line] for mark, line in zip(marks, doc.asked, strict=True)])


def _value(value: list[int]) -> str:
    return "".join(map(v.number, value))


def answers(doc: Lines) -> list[str]:
    """What each question is answered with: the value with the space before it, two tokens."""
    return [_value(value) for value in doc.values[doc.asked].tolist()]


def prompt(rng: np.random.Generator, tokens: int, questions: int = 1) -> tuple[str, str]:
    """A prompt of at most `tokens` tokens (BOS included) that ends in the last question, and its answer.

    The model answers with the value, a newline and EOS, 4 tokens. Earlier questions are answered in the prompt.
    """
    doc = draw(rng, fitting_lines(tokens, questions, ending=-1 - ANSWER_TOKENS), questions)
    answer = answers(doc)[-1]
    return text(doc).removesuffix(answer + "\n"), answer
