"""A checkpoint's chat template, kept to what a template is for: no endless loop, and no message lost in silence."""

import contextlib
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvjax.errors import InputError

SECONDS, BYTES = 5, 2**30  # of processor time for a conversation; of memory
_PROBE = "kvjax probe"
_SHOWN = ("user", "system")  # whose words have to be in the text; an assistant's reasoning is left out by many


class Reply(NamedTuple):
    """What a template makes of a conversation."""

    kind: str  # "text" or "error"
    text: str


class Template:
    """A chat template, rendered by a process of its own that starts with the first conversation.

    Args:
      source: in Jinja.
      special: names and texts of special tokens, such as `bos_token`.
    """

    def __init__(self, source: str, special: dict[str, str]):
        self._about = [source, special, SECONDS, BYTES]
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._in_parts: bool | None = None  # unknown yet

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """A conversation as text, up to where the assistant answers; `InputError` if a user's words are not in it."""
        shaped = [_as_parts(message) for message in messages] if self._wants_parts() else list(messages)
        text = _text(self._ask(shaped))
        for i, message in enumerate(messages):
            if message.get("role") in _SHOWN and not all(_shows(text, words) for words in _words(message)):
                raise InputError(f"the chat template leaves out or changes the text of message {i + 1}: {_how_else()}")
        return text

    def _wants_parts(self) -> bool:
        """Whether contents are lists of parts, as templates of models that also see pictures may have it."""
        if self._in_parts is None:
            message = {"role": "user", "content": _PROBE}
            plain = self._ask([message])
            if plain.kind == "text" and _PROBE in plain.text:
                self._in_parts = False
            else:
                parts = self._ask([_as_parts(message)])
                if parts.kind == "error":
                    _text(plain)
                if _PROBE not in parts.text:
                    raise InputError(f"the chat template leaves out what a user says: {_how_else()}")
                self._in_parts = True
        return self._in_parts

    def _ask(self, messages: list[dict[str, Any]]) -> Reply:
        """The process's answer; a new one takes over where one has ended."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = _start(self._about)
                weakref.finalize(self, _end, self._process)
            process = self._process
            try:
                _write(process, messages)
                line = process.stdout.readline()  # pyright: ignore[reportOptionalMemberAccess]
            except BaseException:  # an answer that nobody has read is not the next one's
                process.kill()
                raise
            if not line:
                raise InputError(f"the chat template cannot be rendered: {_why_ended(process.wait())}")
            return Reply(*json.loads(line))


def _start(about: list[Any]) -> subprocess.Popen[str]:
    """A process that does not hear Ctrl-C, and ends when nobody can ask it any more."""
    program = [sys.executable, "-P", str(Path(__file__).with_name("chat_process.py"))]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        program, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, encoding="utf-8", process_group=0
    )
    _write(process, about)
    return process


def _write(process: subprocess.Popen[str], what: list[Any]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # an ended process has no answer either
        print(json.dumps(what), file=process.stdin, flush=True)


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(BrokenPipeError):
        process.communicate()


def _why_ended(status: int) -> str:
    limits = f"it takes more than {SECONDS} s or {BYTES // 2**20} MiB"
    return limits if status < 0 else f"its process ended with status {status}"


def _text(answer: Reply) -> str:
    if answer.kind == "error":
        raise InputError(f"the chat template cannot show these messages: {answer.text}")
    return answer.text


def _as_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return message | {"content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _words(message: dict[str, Any]) -> list[str]:
    """The texts of a message."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = (part.get("text") for part in parts if isinstance(part, dict))
    return [text for text in texts if isinstance(text, str)]


def _shows(text: str, words: str) -> bool:
    """Whether a text has some words in it, stripped as templates do, or quoted as JSON."""
    quoted = (json.dumps(words.strip(), ensure_ascii=ascii)[1:-1] for ascii in (False, True))
    return any(each in text for each in (words.strip(), *quoted))


def _how_else() -> str:
    return "mend it, or leave --chat out (kvjax.evaluate: give --no-chat)"
