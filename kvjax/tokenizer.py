"""Text to tokens and back, from a checkpoint's `tokenizer.json` and chat template."""

import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvjax.errors import InputError
from kvjax.text_files import read_json

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
        self._template = template
        self._special = special
        self._hidden = {token for token, added in backend.get_added_tokens_decoder().items() if added.special}

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer | None":
        """The tokenizer of a checkpoint directory; None when it has no `tokenizer.json`."""
        file = directory / "tokenizer.json"
        if not file.is_file():
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the binding raises bare Exception
            raise InputError(f"{file}: is not a tokenizer ({error})") from None
        backend.no_padding()
        backend.no_truncation()
        settings = directory / "tokenizer_config.json"
        config = read_json(settings) if settings.is_file() else {}
        return cls(backend, _template(directory, config), _special(config))

    @property
    def end(self) -> int | None:
        """The token that ends a text, as `tokenizer_config.json` names it; None if it does not."""
        return self._backend.token_to_id(self._special["eos_token"]) if "eos_token" in self._special else None

    def __len__(self) -> int:
        return self._backend.get_vocab_size()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text; `special` adds what the tokenizer puts around one, such as the first token."""
        return self._backend.encode(text, add_special_tokens=special).ids

    def split(self, text: str, cut: int, special: bool = True) -> tuple[list[int], list[int]]:
        """Token ids of a text, up to and from a character on; a token across the cut belongs to the second part."""
        found = self._backend.encode(text, add_special_tokens=special)
        first = next((i for i, (_, end) in enumerate(found.offsets) if end > cut), len(found.ids))
        return found.ids[:first], found.ids[first:]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def stream(self) -> "Stream":
        """A decoder that takes tokens one at a time."""
        return Stream(self)

    @property
    def has_template(self) -> bool:
        """Whether the checkpoint is a chat model."""
        return self._template is not None

    def chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant answers; see `render`."""
        return self.encode(self.render(messages), special=False)

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """A conversation in the checkpoint's template, up to where the assistant answers.

        Args:
          messages: each with `role` and `content`.

        Source: transformers `apply_chat_template`.
        """
        if self._template is None:
            raise InputError("this checkpoint has no chat template; give a plain prompt instead")
        try:
            return _environment().from_string(self._template).render(
                messages=list(messages), tools=None, documents=None, add_generation_prompt=True, **self._special
            )  # fmt: skip
        except Exception as error:  # a template is a program
            raise InputError(f"the chat template refuses these messages: {' '.join(str(error).split())}") from error

    def name(self, token: int) -> str:
        """How the vocabulary spells a token; "" for an id that it does not have."""
        return self._backend.id_to_token(token) or ""

    def is_special(self, token: int) -> bool:
        """Whether `decode` leaves a token out."""
        return token in self._hidden

    def is_byte(self, token: int) -> bool:
        """Whether a token stands for one byte, whose text depends on its neighbours."""
        return _BYTE.fullmatch(self.name(token)) is not None


class Stream:
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

    def finish(self) -> str:
        """What was held back."""
        return self._give(self._tokenizer.decode(self._window))

    def _give(self, text: str) -> str:
        piece = text[len(self._tokenizer.decode(self._window[: self._shown])) :]
        if self._tokenizer.decode(self._window[self._shown :]):
            self._window = self._window[self._shown :]
        self._shown = len(self._window)
        return piece


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that templates are written for; sandboxed, since they come with a checkpoint."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _template(directory: Path, config: dict[str, Any]) -> str | None:
    """The chat template: its own file first, then `tokenizer_config.json`, where it may be one of several."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _special(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token` and its like, given as a text or as an object with `content`."""
    tokens = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}
