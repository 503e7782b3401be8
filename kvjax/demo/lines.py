"""Line retrieval, the demo model's only task: a list of `key: value` lines, then questions about them.

    river: 217 130
    apple: 183 405
    ? river: 217 130
    ! apple: 183 405

`? ` asks for a line, `! ` asks for the last one: after its answer the document ends with EOS. A key with its colon, a
number and a newline are one token each, hence a line costs 4 tokens and a question 5. A value is two numbers because
the first one already follows from the prompt's exact attention: only the second is read from a compressed cache.
This module is the only source of such text: for training (`batch`), for scoring and for the programs' default prompt.
"""

from typing import NamedTuple

import numpy as np

from kvjax.demo import vocabulary as v

LINE, QUESTION, ANSWER_TOKENS = 4, 5, 2  # tokens
TRAINING, SCORING = 0x7261696E, 0x73636F72  # entropy: no seed is shared between training and scoring
ANSWER, STRUCTURE, NOISE = 1.0, 0.1, 0.01  # weights of the loss: numbers asked for, predictable tokens, random tokens


class Lines(NamedTuple):
    """A document before it becomes text or tokens."""

    keys: np.ndarray  # [lines] distinct keys
    values: np.ndarray  # [lines 2] numbers; the first ones are distinct where they can be
    asked: np.ndarray  # [questions] lines that are asked for


def training_rng(seed: int, step: int) -> np.random.Generator:
    """The generator of one training step."""
    return np.random.default_rng([TRAINING, seed, step])


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


def document(rng: np.random.Generator, tokens: int, questions: int) -> tuple[str, list[str]]:
    """A document of at most `tokens` tokens (BOS and EOS included) with as many lines as fit, and its answers."""
    doc = draw(rng, fitting_lines(tokens, questions, ending=1), questions)
    return text(doc), answers(doc)


def prompt(rng: np.random.Generator, tokens: int, questions: int = 1) -> tuple[str, str]:
    """A prompt of at most `tokens` tokens (BOS included) that ends in the last question, and its answer.

    The model answers with the value, a newline and EOS, 4 tokens. Earlier questions are answered in the prompt.
    """
    doc = draw(rng, fitting_lines(tokens, questions, ending=-1 - ANSWER_TOKENS), questions)
    answer = answers(doc)[-1]
    return text(doc).removesuffix(answer + "\n"), answer


def ids(doc: Lines) -> np.ndarray:
    """The document as token ids, BOS and EOS included: what the tokenizer makes of `text`, without a tokenizer."""
    lines = np.full((len(doc.keys), LINE), v.NEWLINE, np.int32)
    lines[:, 0], lines[:, 1:3] = v.KEY + doc.keys, v.NUMBER + doc.values
    asked = np.full((len(doc.asked), QUESTION), v.ASK, np.int32)
    asked[:, 1:], asked[-1:, 0] = lines[doc.asked], v.LAST
    return np.concatenate([[v.BOS], lines.ravel(), asked.ravel(), [v.EOS]]).astype(np.int32)


def weights(doc: Lines) -> np.ndarray:
    """The weight of each token of `ids` as a target of the loss."""
    lines = np.tile(np.array([NOISE, NOISE, NOISE, STRUCTURE], np.float32), len(doc.keys))
    asked = np.tile(np.array([NOISE, NOISE, ANSWER, ANSWER, STRUCTURE], np.float32), len(doc.asked))
    return np.concatenate([np.zeros(1), lines, asked, [STRUCTURE]]).astype(np.float32)


def batch(rng: np.random.Generator, rows: int, tokens: int, share: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Training documents of `tokens` tokens and EOS.

    The number of lines is uniform between 2 and `share` of what fits; questions fill the rest. The more questions
    there are per line, the easier the document is to learn from.

    Returns:
      Token ids `[rows, tokens + 1]` and weights of the same shape; padding has weight 0.
    """
    most = max(2, int(share * fitting_lines(tokens + 1, 1, ending=1)))
    out, weight = np.full((rows, tokens + 1), v.EOS, np.int32), np.zeros((rows, tokens + 1), np.float32)
    for row in range(rows):
        lines = int(rng.integers(2, most + 1))
        doc = draw(rng, lines, (tokens - 1 - LINE * lines) // QUESTION)
        used = ids(doc)
        out[row, : len(used)], weight[row, : len(used)] = used, weights(doc)
    return out, weight
