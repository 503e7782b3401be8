"""Batches of documents: token ids, the weight of each as a target of the loss, and the kind of each document.

A batch is a function of the seed, the step and the stage alone. Training, held-out scores and the evaluation have
generators of different entropy, so they share no document.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from kvjax.corpus import documents, sources, tokens
from kvjax.corpus.documents import Passage, Source
from kvjax.tasks import lines as demo_lines
from kvjax.tasks import vocabulary as v
from kvjax.tasks.lines import ANSWER, NOISE, STRUCTURE

TRAINING, HELD_OUT = 0x63757272, 0x68656C64  # entropy

Write = Callable[[np.random.Generator, int, Source], Iterator[Passage]]


class Kind(NamedTuple):
    """A kind of document."""

    write: Write
    share: float  # of the documents
    looks_up: bool = False  # its accuracy decides when documents grow


KINDS: dict[str, Kind] = {
    "lines": Kind(documents.lines, 0.16, looks_up=True),
    "needle": Kind(documents.retrieve, 0.14, looks_up=True),
    "multi_value": Kind(documents.multi_value, 0.09, looks_up=True),
    "multi_query": Kind(documents.multi_query, 0.09, looks_up=True),
    "chains": Kind(documents.chains, 0.18, looks_up=True),
    "common": Kind(documents.common, 0.05),
    "frequent": Kind(documents.frequent, 0.04),
    "copy": Kind(documents.copy, 0.05),
    "patterns": Kind(documents.patterns, 0.06),
    "text": Kind(documents.text, 0.14),
}
_SHARES = np.array([kind.share for kind in KINDS.values()])


class DocumentBatch(NamedTuple):
    """Documents of one step."""

    ids: np.ndarray  # [rows tokens+1]
    weight: np.ndarray  # [rows tokens+1]; padding has weight 0
    kind: np.ndarray  # [rows] index in KINDS


def training_rng(seed: int, step: int) -> np.random.Generator:
    """The generator of one training step."""
    return np.random.default_rng([TRAINING, seed, step])


def held_out_rng(seed: int, step: int) -> np.random.Generator:
    """The generator of one batch for scores."""
    return np.random.default_rng([HELD_OUT, seed, step])


@functools.cache
def _weights() -> np.ndarray:
    """The weight of each token of a context; 0 = that of its part."""
    table = np.zeros(tokens.SIZE, np.float32)
    table[[v.EOS, v.ASK, v.LAST, v.NEWLINE]] = STRUCTURE
    table[v.KEY : v.NUMBER + v.NUM_NUMBERS] = NOISE
    return table


class _Piece(NamedTuple):
    """A part as tokens."""

    ids: list[int]
    weight: np.ndarray
    answers: bool
    mark: int | None  # where a question's mark is


def _piece(part: Passage) -> _Piece:
    mark = [v.ASK] if part.marked and part.answer else []
    before, answer = [*mark, *tokens.encode(part.text)], tokens.encode(part.answer)
    ids = [*before, *answer, v.NEWLINE] if answer else before
    weight = _weights()[ids]
    weight[weight == 0] = part.weight
    weight[len(before) : len(before) + len(answer)] = documents.REPEATED if part.repeated else ANSWER
    if answer:
        weight[-1] = documents.END
    return _Piece(ids, weight, bool(answer), 0 if mark else None)


def document(parts: Iterable[Passage], size: int) -> tuple[np.ndarray, np.ndarray]:
    """A document of at most `size` + 1 tokens with BOS and EOS, and its weights.

    It ends with its last answer; plain text ends where the next line does not fit.
    """
    kept, used, end = [], 2, STRUCTURE
    for piece in map(_piece, parts):
        if used + len(piece.ids) > size + 1:
            break
        kept.append(piece)
        used += len(piece.ids)
    if any(piece.answers for piece in kept):
        while not kept[-1].answers:
            kept.pop()
        if kept[-1].mark is not None:
            kept[-1].ids[kept[-1].mark] = v.LAST
        end = documents.END
    ids = np.concatenate([[v.BOS], *(piece.ids for piece in kept), [v.EOS]]).astype(np.int32)
    weight = np.concatenate([[0.0], *(piece.weight for piece in kept), [end]]).astype(np.float32)
    return ids, weight


def batch(
    rng: np.random.Generator, rows: int, size: int, share: float = 0.95, split: sources.Split = "training"
) -> DocumentBatch:
    """Documents of at most `size` + 1 tokens, of which at most `share` is context: questions fill the rest."""
    kind = rng.choice(len(KINDS), rows, p=_SHARES / _SHARES.sum())
    ids, weight = np.full((rows, size + 1), v.EOS, np.int32), np.zeros((rows, size + 1), np.float32)
    for row in range(rows):
        room = int(size * share * (1 - 0.75 * rng.random() ** 2)) - 8
        found, counted = one(list(KINDS)[kind[row]], rng, room, size, split)
        ids[row, : len(found)], weight[row, : len(found)] = found, counted
    return DocumentBatch(ids, weight, kind.astype(np.int32))


def one(
    kind: str, rng: np.random.Generator, room: int, size: int, split: sources.Split = "training"
) -> tuple[np.ndarray, np.ndarray]:
    """A document of a kind whose context has about `room` tokens."""
    room = size if kind == "text" else max(room, demo_lines.LINE * 3)
    return document(KINDS[kind].write(rng, room, documents.source(split)), size)
