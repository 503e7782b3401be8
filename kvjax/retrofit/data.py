"""Text to train on: files become one stream of tokens, packed into sequences of equal length.

A `.jsonl` file has a document per line, `{"text": ...}` or `{"tokens": [...]}`; any other file is one document.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvjax.errors import InputError
from kvjax.files.text import parse_json
from kvjax.generation.model import Model
from kvjax.retrofit.objective import PackedBatch


class DocumentStream(NamedTuple):
    """Documents one after the other."""

    tokens: np.ndarray  # [n] int32
    starts: np.ndarray  # [n] bool, the first token of a document

    @property
    def fingerprint(self) -> str:
        """What tells one stream from another."""
        digest = hashlib.sha256(np.ascontiguousarray(self.tokens).data)
        digest.update(np.ascontiguousarray(self.starts).data)
        return digest.hexdigest()[:16]


def read(files: Sequence[Path], model: Model, length: int) -> DocumentStream:
    """Tokens of all documents of all files.

    Args:
      files: of text.
      model: whose tokenizer is used; a document ends with its first stop token, if it has one.
      length: tokens of a sequence; there must be at least one sequence.

    Cost: 9 bytes of memory per token, and the largest file that is one document.
    """
    pieces = [np.asarray(ids, np.int32) for file in files for ids in _documents(file, model)]
    total = sum(map(len, pieces))
    if total < length + 1:
        names = ", ".join(map(str, files))
        raise InputError(f"{names}: {total} tokens are less than a sequence (--length {length}, and one more)")
    starts = np.zeros(total, bool)
    starts[np.cumsum([0, *map(len, pieces)])[:-1]] = True
    return DocumentStream(np.concatenate(pieces), starts)


def batch(stream: DocumentStream, seed: int, step: int, rows: int, length: int) -> PackedBatch:
    """The sequences of a step, a function of its arguments alone; every epoch has an order of its own."""
    each = (len(stream.tokens) - 1) // length
    ids = np.empty((rows, length + 1), np.int32)
    starts = np.empty((rows, length + 1), bool)
    orders: dict[int, np.ndarray] = {}
    for row in range(rows):
        epoch, place = divmod(step * rows + row, each)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, epoch]).permutation(each)
        at = int(orders[epoch][place]) * length
        ids[row], starts[row] = stream.tokens[at : at + length + 1], stream.starts[at : at + length + 1]
    return PackedBatch(ids, starts)  # pyright: ignore[reportArgumentType]


def _documents(file: Path, model: Model) -> Iterator[list[int]]:
    try:
        if file.suffix != ".jsonl":
            yield _encode(model, file.read_bytes().decode("utf-8"), str(file))
            return
        count = 0
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _entry(line, model, f"{file}, line {number}")
                    count += 1
        if not count:
            raise InputError(f"{file} is empty")
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{file} is not UTF-8 text") from None


def _entry(line: bytes, model: Model, where: str) -> list[int]:
    entry = parse_json(line, where)
    if isinstance(entry, dict) and isinstance(entry.get("text"), str) and entry["text"]:
        return _encode(model, entry["text"], where)
    ids = entry.get("tokens") if isinstance(entry, dict) else None
    if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
        raise InputError(f'{where}: is neither {{"text": ...}} nor {{"tokens": [...]}}')
    if not 0 <= min(ids) <= max(ids) < model.spec.vocab_size:
        raise InputError(f"{where}: a token id is not in the vocabulary (0 to {model.spec.vocab_size - 1})")
    return ids


def _encode(model: Model, text: str, where: str) -> list[int]:
    if model.tokenizer is None:
        raise InputError(f'{where}: {model.name} has no tokenizer.json: give {{"tokens": [...]}}')
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InputError(f"{where}: has half a surrogate pair, which is no text")
    ids = model.tokenizer.encode(text) if text.strip() else []
    if not ids:
        raise InputError(f"{where} is empty")
    return ids if not model.stop or ids[-1] in model.stop else [*ids, model.stop[0]]
