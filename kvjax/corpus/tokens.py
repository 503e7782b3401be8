"""The whole vocabulary: that of `kvjax.tasks.vocabulary`, whose ids it keeps, and pieces of English and Python.

The short forms' keys, numbers, marks and newlines stay single tokens. Everything else is byte-level BPE, learned once
from `corpus` and shipped as `merges.txt`, so that it does not depend on the interpreter that trains.

    python -m kvjax.demo.tokens      # learn the merges again
"""

import functools
import json
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from kvjax.corpus import sources
from kvjax.tasks import vocabulary as v

SIZE = 4096
CODE = 8  # one module's source of so many: English matters more than Python
# One piece each: a mark with its space at the beginning of a line; a word or a number with the space before it, a word
# with its colon; other characters; a newline; spaces, of which the last belongs to what follows. No piece crosses the
# end of a line, hence lines are tokenised independently.
PIECES = r"^[?!] | ?[\p{L}]+:?| ?\d+| ?[^\s\p{L}\d]+|\n|[^\S\n]+(?=[^\S\n])|[^\S\n]"
_ASCII = re.compile(PIECES.replace(r"\p{L}", "A-Za-z"), re.MULTILINE)


def _split(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    split = pre_tokenizers.Split(tokenizers.Regex(PIECES), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return backend


def learn(texts: Iterable[str], size: int = SIZE) -> list[tuple[str, str]]:
    """The merges that fill a vocabulary of `size` tokens, the most frequent first."""
    base = v.vocabulary()
    backend = _split(tokenizers.Tokenizer(models.BPE()))
    letters = list(base)[v.BYTE : v.ASK]
    # Some merges make tokens that the vocabulary has: more are learned than are needed.
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=letters, limit_alphabet=256, show_progress=False, max_token_length=16
    )
    backend.train_from_iterator(texts, trainer)
    merges = [(left, right) for left, right in json.loads(backend.to_str())["model"]["merges"]]
    kept, known = [], set(base)
    for left, right in merges:
        if len(known) == size and left + right not in known:
            break
        kept.append((left, right))
        known.add(left + right)
    return kept


@functools.cache
def merges() -> tuple[tuple[str, str], ...]:
    """The shipped merges."""
    lines = resources.files("kvjax.demo").joinpath("merges.txt").read_text("utf-8").splitlines()
    return tuple((left, right) for left, _, right in (line.partition(" ") for line in lines))


def build(pairs: Iterable[tuple[str, str]]) -> tokenizers.Tokenizer:
    """Byte-level BPE over the fixed tokens and these merges; a piece that is a token stays one."""
    table, pairs = dict(v.vocabulary()), list(pairs)
    for left, right in pairs:
        table.setdefault(left + right, len(table))
    backend = _split(tokenizers.Tokenizer(models.BPE(vocab=table, merges=pairs, ignore_merges=True)))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(v.SPECIAL))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{v.SPECIAL[0]} $A", pair=f"{v.SPECIAL[0]} $A $B", special_tokens=[(v.SPECIAL[0], v.BOS)]
    )
    return backend


@functools.cache
def tokenizer() -> tokenizers.Tokenizer:
    """The shipped tokenizer."""
    return build(merges())


@functools.cache
def _model() -> tokenizers.Tokenizer:
    """The shipped tokenizer without its rule for pieces."""
    backend = tokenizers.Tokenizer(tokenizer().model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return backend


@functools.cache
def _piece(piece: str) -> tuple[int, ...]:
    return tuple(_model().encode(piece).ids)


def encode(text: str) -> list[int]:
    """Token ids of an ASCII text that begins with a line or between pieces: faster than the tokenizer, for training."""
    return [token for piece in _ASCII.findall(text) for token in _piece(piece)]


@functools.cache
def stream(split: sources.Split) -> np.ndarray:
    """The split's sources and documentation as one array of token ids; every module ends with EOS."""
    texts = [*(module.source for module in sources.modules(split)), *sources.documentation(split)]
    found = tokenizer().encode_batch_fast(texts, add_special_tokens=False)
    return np.concatenate([np.asarray([*one.ids, v.EOS], np.uint16) for one in found])


def main() -> None:
    """Learn the merges from the training split and write them."""
    code = [module.source for module in sources.modules("training")[::CODE]]
    pairs = learn([*sources.documentation("training"), *code, sources.sentences(np.random.default_rng(0), 20000)])
    path = Path(__file__).parents[1] / "demo" / "merges.txt"
    path.write_text("".join(f"{left} {right}\n" for left, right in pairs), "utf-8")


if __name__ == "__main__":
    main()
