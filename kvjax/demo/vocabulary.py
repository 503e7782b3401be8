"""The demo model's vocabulary: special tokens, bytes, two question marks, keys and numbers.

Every part of the task (`kvjax.demo.lines`) is one token; any other text falls back to one token per byte, so that
every text survives encoding and decoding. Token ids are arithmetic: training needs no tokenizer.
"""

import functools
from importlib import resources

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

BOS, EOS = 0, 1
SPECIAL = ("<|begin|>", "<|end|>")
BYTE = 2  # id of byte 0
ASK = BYTE + 256  # "? " asks for a line
LAST = ASK + 1  # "! " asks for the last time: the answer is followed by a newline and EOS
KEY = LAST + 1  # id of the first key, a word with its colon: "river:"
NUM_KEYS = 512
NUMBER = KEY + NUM_KEYS  # id of the first number
FIRST_NUMBER, NUM_NUMBERS = 100, 400  # " 100" .. " 499"
SIZE = NUMBER + NUM_NUMBERS
NEWLINE = BYTE + ord("\n")

# One piece each: a question mark with its space, a number with its space, letters with their colon, a newline. What
# lies between the matches is a piece, too. No piece crosses a line's end, hence lines are tokenised independently.
PIECES = r"[?!] | ?\d+|\p{L}+:?|\n"


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


def tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE without merges: a piece that is in the vocabulary is one token, any other is its bytes."""
    tok = tokenizers.Tokenizer(models.BPE(vocab=vocabulary(), merges=[], ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(PIECES), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(list(SPECIAL))
    tok.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A", pair=f"{SPECIAL[0]} $A $B", special_tokens=[(SPECIAL[0], BOS)]
    )
    return tok
