"""A GGUF file's vocabulary as `tokenizer.json` and `tokenizer_config.json`.

Two kinds are read: byte-level BPE ("gpt2"), whose file names the rule that first cuts a text (`tokenizer.ggml.pre`),
and SentencePiece's BPE ("llama"), whose merges follow from its scores. A rule that is not known here is refused: it
decides the tokens.

Source: llama.cpp, `src/llama-vocab.cpp`; the rules as the models' own `tokenizer.json` have them.
"""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from kvjax.errors import InputError
from kvjax.files.gguf import Gguf

LONGEST = 1024  # characters of a token that is made of others
_USER_DEFINED = 4
_WHOLE = (2, 3, _USER_DEFINED)  # types of tokens that are found in a text before it is cut: unknown, control
_SPACE = "\u2581"  # SentencePiece's
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
_QWEN2 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_TEKKEN = _CASED.replace("%s", "") + rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
_GPT4O = _CASED.replace("%s", f"{_CONTRACTION}?") + rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"


def _byte_level(**more: Any) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True} | more


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


_DIGITS = [{"type": "Digits", "individual_digits": True}, _byte_level()]
_PUNCTUATION = {"type": "Punctuation", "behavior": "Contiguous"}
_BYTES = [{"type": "ByteFallback"}, {"type": "Fuse"}]
_RUNS = {"type": "Digits", "individual_digits": False}
_STEPS = {
    "llama3": [_split(_LLAMA3), _byte_level(use_regex=False)],
    "qwen2": [_split(_QWEN2), _byte_level(use_regex=False)],
    "tekken": [_split(_TEKKEN), _byte_level(use_regex=False)],
    "gpt4o": [_split(_GPT4O), _byte_level(use_regex=False)],
    "digits": _DIGITS,
    "gpt2": [_byte_level()],
    "falcon": [_PUNCTUATION, _byte_level(), _RUNS, _split("[0-9][0-9][0-9]")],
}
# tokenizer.ggml.pre -> the rule
_PRE = {
    **dict.fromkeys(
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 dbrx smaug-bpe".split(), "llama3"
    ),
    **dict.fromkeys("qwen2 deepseek-r1-qwen megrez".split(), "qwen2"),
    "tekken": "tekken",
    **dict.fromkeys("gpt-4o llama4 kanana2".split(), "gpt4o"),
    **dict.fromkeys("smollm starcoder refact codeshell".split(), "digits"),
    **dict.fromkeys("gpt-2 phi-2 exaone4".split(), "gpt2"),
    "falcon": "falcon",
}
_WHOLE_WORDS = set("llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 tekken".split())
_COMPOSED = {"qwen2"}  # their own tokenizer.json composes characters first (NFC)
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer(file: Gguf) -> dict[str, Any] | None:
    """What `tokenizer.json` would be; None where a file has no vocabulary."""
    kind = file.fields.get("tokenizer.ggml.model")
    if kind in (None, "none", "no_vocab"):
        return None
    if kind not in ("gpt2", "llama"):
        raise InputError(f"{file.path}: tokenizer.ggml.model = {kind!r}; kvjax reads gpt2 and llama")
    tokens = _tokens(file)
    types = _numbers(file, "token_type", len(tokens)) or [1] * len(tokens)
    made = _byte_pairs(file, tokens) if kind == "gpt2" else _sentence_piece(file, tokens)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, tokens[i], kind) for i, kind in enumerate(types) if kind in _WHOLE],
        **made,
        "post_processor": _around(file, tokens),
    }


def settings(file: Gguf) -> dict[str, Any] | None:
    """What `tokenizer_config.json` would be: special tokens and the chat template."""
    if file.fields.get("tokenizer.ggml.model") in (None, "none", "no_vocab"):
        return None
    tokens = _tokens(file)
    found: dict[str, Any] = {"chat_template": file.fields.get("tokenizer.chat_template")}
    for name, key in _SPECIAL.items():
        i = _special(file, key, tokens)
        found[name] = None if i is None else tokens[i]
    return found


def _byte_pairs(file: Gguf, tokens: list[str]) -> dict[str, Any]:
    """Byte-level BPE."""
    pre = file.fields.get("tokenizer.ggml.pre")
    if not isinstance(pre, str) or pre not in _PRE:
        known = ", ".join(_PRE)
        raise InputError(
            f"{file.path}: tokenizer.ggml.pre = {pre!r}: how it cuts a text into words is not known; kvjax has {known}"
        )
    vocab, pairs = set(tokens), [_pair(text) for text in _texts(file, "merges")]
    for left, right in pairs:
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise InputError(f"{file.path}: tokenizer.ggml.merges joins {left!r} and {right!r}, which makes no token")
    return {
        "normalizer": {"type": "NFC"} if _PRE[pre] in _COMPOSED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _STEPS[_PRE[pre]]},
        "decoder": _byte_level(),
        "model": _model(tokens, pairs, ignore_merges=pre in _WHOLE_WORDS),
    }


def _pair(text: str) -> list[str]:
    """The two sides of a merge; the first of them may begin with a space."""
    at = text.find(" ", 1)
    return [text[:at], text[at + 1 :]]


def _sentence_piece(file: Gguf, tokens: list[str]) -> dict[str, Any]:
    """SentencePiece's BPE: of two neighbours that can be joined those with the best score are, the first ones of them.

    Differs: transformers' own conversion sets a space before the first word alone, and none before one that a text
      begins with; llama.cpp and the `tokenizer.json` of Llama 2, Mistral and Phi-3 set it after every special token.
    """
    scores = _numbers(file, "scores", len(tokens))
    if scores is None:
        raise InputError(f"{file.path}: has no tokenizer.ggml.scores, from which merges follow")
    unknown = _special(file, "unknown", tokens)
    more = {"unk_token": None if unknown is None else tokens[unknown], "fuse_unk": True, "byte_fallback": True}
    normal = [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
    decode = [{"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}, *_BYTES]
    if file.fields.get("tokenizer.ggml.add_space_prefix", True):
        normal = [{"type": "Prepend", "prepend": _SPACE}, *normal]
        decode = [*decode, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return {
        "normalizer": {"type": "Sequence", "normalizers": normal},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decode},
        "model": _model(tokens, list(_merges(tokens, scores)), **more),
    }


def _merges(tokens: list[str], scores: list[float]) -> Iterator[list[str]]:
    """All pairs of tokens that make a token, the best one first."""
    vocab = {token: i for i, token in enumerate(tokens)}
    for i in sorted(range(len(tokens)), key=lambda i: -scores[i]):
        token = tokens[i]
        cuts = ((token[:at], token[at:]) for at in range(1, len(token) if len(token) <= LONGEST else 0))
        pairs = [[left, right] for left, right in cuts if left in vocab and right in vocab]
        yield from sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))


def _model(tokens: list[str], merges: list[list[str]], **more: Any) -> dict[str, Any]:
    return {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges} | more


def _added(i: int, token: str, kind: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": token, **flags, "special": kind != _USER_DEFINED}


def _around(file: Gguf, tokens: list[str]) -> dict[str, Any] | None:
    """What is put around a text."""
    kind, pre = (file.fields.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    defaults = {"bos": kind == "llama" or pre in _WHOLE_WORDS, "eos": False}
    found = {}
    for name, default in defaults.items():
        flag = file.fields.get(f"tokenizer.ggml.add_{name}_token", default)
        if not isinstance(flag, bool):
            raise InputError(f"{file.path}: tokenizer.ggml.add_{name}_token = {flag!r}, expected true or false")
        i = _special(file, name, tokens) if flag else None
        if flag and i is None:
            raise InputError(f"{file.path}: adds a {name} token to a text, but has no tokenizer.ggml.{name}_token_id")
        if i is not None:
            found[name] = i
    if not found:
        return None
    piece = lambda name: [{"SpecialToken": {"id": tokens[found[name]], "type_id": 0}}] if name in found else []
    text = lambda name: {"Sequence": {"id": name, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [*piece("bos"), text("A"), *piece("eos")],
        "pair": [*piece("bos"), text("A"), *piece("eos"), *piece("bos"), text("B"), *piece("eos")],
        "special_tokens": {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in found.values()},
    }


def _special(file: Gguf, name: str, tokens: list[str]) -> int | None:
    """The id of a special token; None where a file names none."""
    i = file.fields.get(f"tokenizer.ggml.{name}_token_id")
    if i is not None and (type(i) is not int or not 0 <= i < len(tokens)):
        raise InputError(f"{file.path}: tokenizer.ggml.{name}_token_id = {i!r}, expected one of {len(tokens)} tokens")
    return i


def _tokens(file: Gguf) -> list[str]:
    """The vocabulary; empty tokens have llama.cpp's names."""
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(_texts(file, "tokens"))]
    if len(set(tokens)) < len(tokens):
        ((twice, _),) = Counter(tokens).most_common(1)
        raise InputError(f"{file.path}: token {twice!r} is in tokenizer.ggml.tokens twice")
    return tokens


def _texts(file: Gguf, name: str) -> list[str]:
    found = file.fields.get(f"tokenizer.ggml.{name}")
    if not isinstance(found, list) or (found and not isinstance(found[0], str)):
        raise InputError(f"{file.path}: has no list of texts tokenizer.ggml.{name}")
    return found


def _numbers(file: Gguf, name: str, count: int) -> list[Any] | None:
    """One number for each token; None where a file has none."""
    found = file.fields.get(f"tokenizer.ggml.{name}")
    if found is None:
        return None
    fits = isinstance(found, list) and len(found) == count
    if not fits or not all(isinstance(number, int | float) and math.isfinite(number) for number in found):
        raise InputError(f"{file.path}: tokenizer.ggml.{name} is not a list of {count} finite numbers")
    return found
