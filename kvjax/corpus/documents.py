"""What the demo model reads: documents of many kinds, written by the evaluation's own functions.

A document is a stream of parts: text, and questions with their answers. The content of the tasks is drawn and written
by `kvjax.evaluation` in its short form. What differs from an evaluation's prompt is that a document asks often, since
a model learns from what it is asked: `? ` marks a question, `! ` the last one, as in `kvjax.tasks.lines`.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from kvjax.corpus import sources, tokens
from kvjax.tasks import aggregation, needles, retrieval, synthetic
from kvjax.tasks import lines as demo_lines
from kvjax.tasks import vocabulary as v
from kvjax.tasks.synthetic import LAST

LINE = demo_lines.LINE  # tokens
NOISE_TOKENS = len(tokens.encode(synthetic.noise(1)[0]))
# Weights of the loss: plain text, text that hides something, the answer to a question that was answered before.
TEXT, HAYSTACK, REPEATED = 0.4, 0.05, 0.3
END = 0.5  # of the newline behind an answer, and of the end of a document that asked
ARROW = " =>"


class Passage(NamedTuple):
    """A piece of a document."""

    text: str  # context, or what is asked
    answer: str = ""  # what follows from the context; "" = nothing is asked
    marked: bool = True  # the question begins with a mark
    repeated: bool = False  # it was answered before, in the same document
    weight: float = HAYSTACK  # of the text's tokens that are no pieces of a task


class Source(NamedTuple):
    """What documents are written from."""

    haystack: str
    texts: Sequence[str]
    ends: np.ndarray  # of the texts, one behind the other [characters]; prose counts twice


@functools.cache
def source(split: sources.Split) -> Source:
    """The text of a split: documentation, sources, and generated lines in the haystack."""
    prose = [text for text in sources.documentation(split) if len(text) > 500]
    code = [module.source for module in sources.modules(split) if len(module.source) > 500]
    sizes = [2 * len(text) for text in prose] + [len(text) for text in code]
    return Source(sources.haystack(split), [*prose, *code], np.cumsum(sizes))


def _log_uniform(rng: np.random.Generator, least: int, most: int) -> int:
    """A number between two, small ones more often."""
    return int(least * (max(least, most) / least) ** rng.random() + 0.5)


def hay(rng: np.random.Generator, room: int, text: Source) -> list[str]:
    """Lines of at most `room` tokens: noise, text as it is, text that is disguised, or random pieces of words.

    What is asked must not depend on what the haystack is about: a needle is found in a text unlike any in the corpus.
    """
    kind = rng.random()
    if kind < 0.3:
        return synthetic.noise(room // NOISE_TOKENS)
    if kind < 0.5:
        pieces = [_scramble(rng) for _ in range(room // 8)]
    else:
        pieces = synthetic.essay(rng, "short", text.haystack, room // 8)
        if kind < 0.8:
            pieces = _disguise(rng, pieces)
    ends = np.cumsum([len(tokens.encode(piece)) for piece in pieces])
    return pieces[: int(np.searchsorted(ends, room, side="right"))]


def _scramble(rng: np.random.Generator) -> str:
    """A line of random pieces of words."""
    drawn = rng.integers(v.SIZE, tokens.SIZE, size=int(rng.integers(4, 16))).tolist()
    return tokens.tokenizer().decode(drawn).strip() + "\n"


def _disguise(rng: np.random.Generator, pieces: Sequence[str]) -> list[str]:
    """A text with its words shuffled or not, in lines of another length, with names of speakers between them."""
    found = " ".join(pieces).split()
    if rng.random() < 0.5:
        found = [found[index] for index in rng.permutation(len(found)).tolist()]
    width, named, out = int(rng.integers(4, 13)), 0.5 * rng.random(), []
    for start in range(0, len(found), width):
        line = " ".join(found[start : start + width])
        out.append(line[0].upper() + line[1:] + "\n")
        if rng.random() < named:
            out.append(f"{found[int(rng.integers(len(found)))].strip('.,:;()').upper() or 'A'}:\n")
    return out


def _ask(content: needles.Needles, chosen: Sequence[int], repeated: bool) -> Passage:
    """The question for some of the keys."""
    keys, values = [content.keys[key] for key in chosen], [content.values[key] for key in chosen]
    one = needles.write_needles("short", needles.Needles(keys, values, range(len(keys))), "numbers", [], [])
    return Passage(one.question.removeprefix(LAST), "".join(one.answers), repeated=repeated)


def retrieve(
    rng: np.random.Generator, room: int, text: Source, each: int = 1, asked: int = 1, bare: float = 0.0
) -> Iterator[Passage]:
    """Lines `key: value`, hidden in a haystack or, with probability `bare`, alone: `evaluation.needles`."""
    most = room // (LINE * each)
    if hidden := rng.random() >= bare:
        count = _log_uniform(rng, asked, min(most // 2, needles.DEPTHS // each))
    else:
        count = int(rng.integers(max(2, asked), max(3, asked + 1, min(most, v.NUM_KEYS // each) + 1)))
    content = needles.draw_needles(rng, "short", "words", "numbers", count, each)
    if hidden and retrieval.SECRET not in content.keys and rng.random() < 0.25:  # the pass key is a needle
        content = content._replace(keys=[retrieval.SECRET, *content.keys[1:]])
    pieces = hay(rng, room - LINE * each * count, text) if hidden else []
    depths = needles.draw_depths(rng, count * each) if pieces else []
    yield Passage(needles.write_needles("short", content, "numbers", pieces, depths).context)
    for turn in itertools.count():
        order = rng.permutation(count)[: count - count % asked].reshape(-1, asked)
        for chosen in order.tolist():
            yield _ask(content, chosen, turn > 0)


def lines(rng: np.random.Generator, room: int, text: Source) -> Iterator[Passage]:
    """A list of lines and questions: the text of `kvjax.tasks.lines`."""
    return retrieve(rng, room, text, bare=1.0)


def multi_value(rng: np.random.Generator, room: int, text: Source) -> Iterator[Passage]:
    """Keys with several values, all asked for."""
    return retrieve(rng, room, text, each=int(rng.integers(2, 5)), bare=0.3)


def multi_query(rng: np.random.Generator, room: int, text: Source) -> Iterator[Passage]:
    """Questions for several keys at once."""
    return retrieve(rng, room, text, asked=int(rng.integers(2, 5)), bare=0.3)


def chains(rng: np.random.Generator, room: int, text: Source) -> Iterator[Passage]:
    """Variable tracking: every chain is asked for before one is asked for again."""
    hops = int(rng.integers(1, 5))
    cost = LINE + (LINE - 1) * hops
    count = _log_uniform(rng, 1, min(room // cost, v.NUM_KEYS // (hops + 1)))
    content = aggregation.draw_chains(rng, "short", count, hops)
    pieces = synthetic.noise(max(0, room - cost * count) // NOISE_TOKENS)
    yield Passage(aggregation.scatter_chains(rng, "short", content, pieces))
    for turn in itertools.count():
        for chain in map(int, rng.permutation(count)):
            one = aggregation.Chains([content.names[chain]], [content.values[chain]])
            written = aggregation.write_chains("short", one, "")
            yield Passage(written.question.removeprefix(LAST), "".join(written.answers), repeated=turn > 0)


def _sections(rng: np.random.Generator, room: int, write: Callable[[int], synthetic.Written]) -> Iterator[Passage]:
    """Lists of words, each with its one question: as long as fits, or several shorter ones."""
    least = room if rng.random() < 0.5 else min(room, 48)
    while True:
        written = write(_log_uniform(rng, least, room))
        yield Passage(written.context)
        yield Passage(written.question.removeprefix(LAST), "".join(written.answers))


def common(rng: np.random.Generator, room: int, text: Source) -> Iterator[Passage]:
    """The words that are repeated more often than others, in the order of their first appearance."""

    def write(size: int) -> synthetic.Written:
        often, seldom = (30, 3) if size > 900 and rng.random() < 0.3 else (int(rng.integers(2, 7)), 1)
        count = 10 if size > 100 and rng.random() < 0.5 else int(rng.integers(1, max(2, min(10, size // (2 * often)))))
        distinct = min(v.NUM_KEYS, count + max(1, (size - count * (often + 1)) // seldom))
        content = aggregation.draw_common(rng, v.keys(), distinct, count, often, seldom)
        return aggregation.write_common("short", content)

    return _sections(rng, room, write)


def frequent(rng: np.random.Generator, room: int, text: Source) -> Iterator[Passage]:
    """The three most frequent words after the noise."""

    def write(size: int) -> synthetic.Written:
        distinct = max(aggregation.TOP + 1, (size - 50) // 50)
        ranked = [".", *(v.keys()[key] for key in rng.permutation(v.NUM_KEYS)[: distinct - 1])]
        return aggregation.write_frequent("short", aggregation.draw_frequent(rng, ranked, size, 2.0))

    return _sections(rng, room, write)


def _item(index: int, word: bool) -> str:
    return v.keys()[index] if word else v.number(index)


def copy(rng: np.random.Generator, room: int, text: Source) -> Iterator[Passage]:
    """A passage and, after its first piece, the passage again: random words and numbers, or lines of text."""
    room //= 2
    if rng.random() < 0.5:
        count = max(2, room)
        drawn, words = rng.integers(v.NUM_NUMBERS, size=count).tolist(), (rng.random(count) < rng.random()).tolist()
        pieces = [_item(index, word) for index, word in zip(drawn, words, strict=True)] + ["\n"]
    else:
        pieces = [*synthetic.essay(rng, "short", text.haystack, 1), *hay(rng, room, text)]
    yield Passage("".join(pieces))
    yield Passage(pieces[0], "".join(pieces[1:]).removesuffix("\n"), marked=False)


RULES: tuple[Callable[[list[str]], list[str]], ...] = (
    lambda items: items[:1],
    lambda items: items[-1:],
    lambda items: items[1:2],
    lambda items: items[::-1],
    lambda items: [max(items)],
    lambda items: [min(items)],
    lambda items: items[:1] * 2,
    lambda items: [*items[1:], items[0]],
    lambda items: sorted(items),
)


def patterns(rng: np.random.Generator, room: int, text: Source) -> Iterator[Passage]:
    """Few-shot patterns: examples of a rule, which change after a blank line; the first example shows it."""
    while True:
        rule, width, word = RULES[int(rng.integers(len(RULES)))], int(rng.integers(2, 5)), rng.random() < 0.5
        for example in range(int(rng.integers(4, 17))):
            drawn = rng.choice(v.NUM_NUMBERS, width, replace=False).tolist()
            items = [_item(index, bool(word)) for index in drawn]
            given, answer = "".join(items) + ARROW, "".join(rule(items))
            yield Passage(given, answer, marked=False) if example else Passage(f"{given}{answer}\n")
        yield Passage("\n")


def text(rng: np.random.Generator, room: int, text: Source) -> Iterator[Passage]:
    """Plain text: a module or its documentation from a random line on, or generated sentences."""
    if rng.random() < 0.15:
        written = sources.sentences(rng, 4 + 8 * room // 64)
    else:
        whole = text.texts[int(np.searchsorted(text.ends, rng.random() * text.ends[-1], side="right"))]
        start = whole.find("\n", int(rng.integers(max(1, len(whole) - 4 * room)))) + 1
        written = whole[start : start + 40 * room]
    for line in written.splitlines(keepends=True):
        yield Passage(line, weight=TEXT)
