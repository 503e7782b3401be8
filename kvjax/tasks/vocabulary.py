"""The part of the demo model's vocabulary that its tasks are written in: special tokens, bytes, marks, keys, numbers.

Each of them is one token, and their ids are arithmetic. `kvjax.corpus.tokens` adds the pieces of other text.
"""

import functools
from importlib import resources

BOS, EOS = 0, 1
SPECIAL = ("<|begin|>", "<|end|>")
BYTE = 2  # id of byte 0
ASK = BYTE + 256  # "? " asks for a line
LAST = ASK + 1  # "! " asks for the last time: the answer is followed by a newline and EOS
KEY = LAST + 1  # id of the first key, a word with its colon: "river:"
NUM_KEYS = 1024
NUMBER = KEY + NUM_KEYS  # id of the first number
FIRST_NUMBER, NUM_NUMBERS = 100, 1024  # " 100" .. " 1123"
SIZE = NUMBER + NUM_NUMBERS
NEWLINE = BYTE + ord("\n")


@functools.cache
def keys() -> tuple[str, ...]:
    """Common English nouns with a colon, in the order of their token ids."""
    return tuple(f"{word}:" for word in resources.files("kvjax.demo").joinpath("words.txt").read_text("utf-8").split())


def number(index: int) -> str:
    """The number with this index, with the space before it."""
    return f" {FIRST_NUMBER + index}"


def _byte_letters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (as in GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    shift = {b: 256 + n for n, b in enumerate(rest)}
    return [chr(shift.get(b, b)) for b in range(256)]


def vocabulary() -> dict[str, int]:
    """Every token in the byte-level spelling of `tokenizer.json`, with its id."""
    letters = _byte_letters()
    texts = ["? ", "! ", *keys(), *(number(n) for n in range(NUM_NUMBERS))]
    spelled = ["".join(letters[b] for b in text.encode()) for text in texts]
    return {token: index for index, token in enumerate([*SPECIAL, *letters, *spelled])}
