"""Text to tokens and back, from a checkpoint's `tokenizer.json` and chat template."""

import contextlib
import functools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from kvjax.errors import InputError
from kvjax.models import chat_template, small_files

T = TypeVar("T")
LONGER = 32  # times that normalizers and their like may lengthen a text
_MARK = "<kvjax:words>"  # stands where a user's words may go on
_SAMPLE = "Hello, wörld\n 你好 🙂 123"
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # SentencePiece's token for one byte


class Tokenizer:
    """A checkpoint's tokenizer.

    Args:
      backend: the `tokenizers` object.
      template: the source of the chat template, if there is one.
      special: names and texts of special tokens for the template, such as `bos_token`.
    """

    def __init__(self, backend: tokenizers.Tokenizer, template: str | None, special: dict[str, str]):
        self._backend = backend
        self._template = None if template is None else chat_template.Template(template, special)
        self._end = special.get("eos_token")
        self._hidden = {token for token, added in backend.get_added_tokens_decoder().items() if added.special}

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer | None":
        """The tokenizer of a checkpoint directory or a GGUF file; None when it has no `tokenizer.json`."""
        text = small_files.read_text(directory, "tokenizer.json")
        if text is None:
            return None
        backend = _backend(directory / "tokenizer.json", text)
        config = small_files.read_json(directory, "tokenizer_config.json") or {}
        return cls(backend, _template(directory, config), _special(config))

    @property
    def end(self) -> int | None:
        """The token that ends a text, as `tokenizer_config.json` names it; None if it does not."""
        return None if self._end is None else self._backend.token_to_id(self._end)

    def __len__(self) -> int:
        return self._backend.get_vocab_size()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text; `special` adds what the tokenizer puts around one, such as the first token."""
        return self._encoded(text, special).ids

    def split(self, text: str, cut: int, special: bool = True) -> tuple[list[int], list[int]]:
        """Token ids of a text, up to and from a character on; a token across the cut belongs to the second part."""
        found = self._encoded(text, special)
        first = next((i for i, (_, end) in enumerate(found.offsets) if end > cut), len(found.ids))
        return found.ids[:first], found.ids[first:]

    def _encoded(self, text: str, special: bool) -> tokenizers.Encoding:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"character {error.start + 1} of the text is half a surrogate pair") from None
        encode = lambda: self._backend.encode_batch([text], add_special_tokens=special)  # other threads run meanwhile
        return _guarded("this checkpoint's tokenizer cannot read the text", encode)[0]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        decode = lambda: self._backend.decode(list(ids), skip_special_tokens=True)
        return _guarded("this checkpoint's tokenizer cannot spell what it is given", decode)

    def stream(self) -> "TokenStream":
        """A decoder that takes tokens one at a time."""
        return TokenStream(self)

    @property
    def has_template(self) -> bool:
        """Whether the checkpoint is a chat model."""
        return self._template is not None

    def chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant answers; see `render`."""
        return self.encode(self.render(messages), special=False)

    def around(self, words: str, earlier: Sequence[dict[str, Any]] = ()) -> tuple[str, str]:
        """What a conversation has up to a user's words, them included, and from there to where the assistant answers.

        More words may stand between the two. `earlier` messages come before them.
        """
        before, mark, after = self.render([*earlier, {"role": "user", "content": words + _MARK}]).rpartition(_MARK)
        if not mark:
            raise InputError("the chat template changes the end of what a user says: give a plain prompt instead")
        return before, after

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """A conversation in the checkpoint's template, up to where the assistant answers.

        Args:
          messages: each with `role` and `content`.

        Raises:
          InputError: the template refuses them, or leaves out what a user or the system says.
        """
        if self._template is None:
            raise InputError("this checkpoint has no chat template; give a plain prompt instead")
        return self._template.render(messages)

    def name(self, token: int) -> str:
        """How the vocabulary spells a token; "" for an id that it does not have."""
        return self._backend.id_to_token(token) or ""

    def piece(self, token: int) -> str:
        """What a token adds to a text that has begun; U+FFFD for parts of a character, and special ones' names."""
        begun = self._begun
        return self.name(token) if self.is_special(token) else self.decode([*begun, token])[len(self.decode(begun)) :]

    @functools.cached_property
    def _begun(self) -> list[int]:
        return self.encode("a", special=False)[-1:]

    def is_special(self, token: int) -> bool:
        """Whether `decode` leaves a token out."""
        return token in self._hidden

    def special(self, text: str) -> int | None:
        """The special token that is spelled so; None if there is none."""
        found = self._backend.token_to_id(text)
        return found if found in self._hidden else None

    @functools.cached_property
    def having(self) -> dict[str, list[int]]:
        """Tokens by the characters that they add to a text that has begun; under U+FFFD those that are parts of one."""
        begun, found = self._begun, dict[str, list[int]]()
        each = [[*begun, i] for i in range(1 + max(self._backend.get_vocab().values(), default=-1))]
        decode = lambda: self._backend.decode_batch(each)
        texts = _guarded("this checkpoint's tokenizer cannot spell its tokens", decode)
        shown = len(self.decode(begun))
        for i, text in enumerate(texts):
            for character in {*text[shown:], *("\ufffd" * self.is_byte(i))}:
                found.setdefault(character, []).append(i)
        return found

    def is_byte(self, token: int) -> bool:
        """Whether a token stands for one byte, whose text depends on its neighbours."""
        return _BYTE.fullmatch(self.name(token)) is not None


class TokenStream:
    """Decodes token by token; the pieces join to what `Tokenizer.decode` gives for all tokens.

    A piece is held back while it may still change: an unfinished UTF-8 character, or a run of byte tokens.
    The window of tokens that is decoded again reaches back to the last piece, since the first token of a text may
    lose its leading space.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._window: list[int] = []  # [tokens of the last piece, held tokens]
        self._shown = 0  # tokens of the window that were given out

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while nothing is complete."""
        if self._tokenizer.is_special(token):
            return ""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        if text.endswith("\ufffd") or self._tokenizer.is_byte(token):
            return ""
        return self._give(text)

    @property
    def held(self) -> str:
        """What is held back, as it stands."""
        return self._beyond_shown(self._tokenizer.decode(self._window))

    def finish(self) -> str:
        """What was held back."""
        return self._give(self._tokenizer.decode(self._window))

    def _give(self, text: str) -> str:
        piece = self._beyond_shown(text)
        if self._tokenizer.decode(self._window[self._shown :]):
            self._window = self._window[self._shown :]
        self._shown = len(self._window)
        return piece

    def _beyond_shown(self, text: str) -> str:
        return text[len(self._tokenizer.decode(self._window[: self._shown])) :]


def _backend(file: Path, text: str) -> tokenizers.Tokenizer:
    """The `tokenizers` object of a file's text, once it has read a text and is sure to stay within bounds."""
    problem = f"{file}: is not a tokenizer"
    with _silent():
        backend = _guarded(problem, lambda: tokenizers.Tokenizer.from_str(text))
        _check_growth(file, backend)
        _check_ids(file, backend)
        _guarded(problem, lambda: _try(backend))
    backend.no_padding()
    backend.no_truncation()
    return backend


def _try(backend: tokenizers.Tokenizer) -> None:
    """Read and write a text; what comes out is not looked at, since it may have what a vocabulary has not."""
    with contextlib.suppress(Exception):  # a panic is none
        backend.decode(backend.encode(_SAMPLE).ids)


def _check_ids(file: Path, backend: tokenizers.Tokenizer) -> None:
    """Refuse two tokens with one id: which of them the library spells differs from load to load."""
    found: dict[int, str] = {}
    for token, i in backend.get_vocab(with_added_tokens=False).items():
        if found.setdefault(i, token) != token:
            first, second = sorted((found[i], token))
            raise InputError(f"{file}: tokens {first!r} and {second!r} have the same id, {i}")


def _check_growth(file: Path, backend: tokenizers.Tokenizer) -> None:
    for part in (backend.normalizer, backend.post_processor, backend.decoder):
        longer = 1 if part is None else _growth(json.loads(part.__getstate__()))
        if longer > LONGER:
            raise InputError(f"{file}: makes a text {longer:,} times as long; at most {LONGER} times is read")


def _growth(step: dict[str, Any]) -> int:
    """How many times longer a text may become in a step of a tokenizer, or in a sequence of them."""
    match step:
        case {"type": "Sequence"}:
            inner = (each for name, steps in step.items() if name != "type" for each in steps)
            return math.prod(_growth(each) for each in inner)
        case {"type": "Replace", "pattern": {"String": _}, "content": content}:
            return max(1, len(content))
        case {"type": "Replace", "content": content} | {"type": "Prepend", "prepend": content}:
            return 1 + len(content)  # a pattern may match nothing
        case {"type": "TemplateProcessing", "single": pieces}:
            return sum("Sequence" in piece for piece in pieces)
    return 1


def _guarded(problem: str, call: Callable[[], T]) -> T:
    """What a call into the `tokenizers` library gives; an `InputError` if it fails, also by a panic.

    The library raises bare Exception, and for a panic what is no Exception at all.
    """
    try:
        return call()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise InputError(f"{problem} ({error})") from None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Nothing on standard error: a panic prints its stack before it can be caught."""
    if sys.stderr is None or sys.__stderr__ is None:  # closed
        yield
        return
    sys.stderr.flush()
    shown = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(shown, 2)
        os.close(shown)


def _template(directory: Path, config: dict[str, Any]) -> str | None:
    """The chat template: its own file first, then `tokenizer_config.json`, where it may be one of several."""
    own = small_files.read_text(directory, "chat_template.jinja")
    if own is not None:
        return own
    match config.get("chat_template"):
        case None | str() as template:
            return template
        case [*entries] if all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in entries):
            template = {entry["name"]: entry.get("template") for entry in entries}.get("default")
            if template is None or isinstance(template, str):
                return template
    raise InputError(f"{directory / 'tokenizer_config.json'}: chat_template is not a text, or a list of named texts")


def _special(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token` and its like, given as a text or as an object with `content`."""
    tokens = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}
