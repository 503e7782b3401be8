"""Prompts that a command line gives: texts, files, standard input, token ids, conversations."""

import argparse
import sys
from pathlib import Path
from typing import Any

from kvjax.errors import InputError
from kvjax.files import text as text_files

ROLES = ("system", "user", "assistant")


def read_texts(args: argparse.Namespace) -> list[str]:
    """The prompts that are given as text."""
    given = args.prompt or []
    if given.count("-") > 1:
        raise InputError("standard input can be read once only: give --prompt - once")
    texts = [_text("standard input", sys.stdin.buffer.read()) if text == "-" else text for text in given]
    for name in args.prompt_file or ():
        try:
            texts.append(_text(name, Path(name).read_bytes()))
        except OSError as error:
            raise InputError(f"cannot read {name}: {error.strerror}") from None
    for text in texts:
        if not text:
            raise InputError("the prompt is empty")
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # how Python passes on bytes that are not UTF-8
            raise InputError("--prompt is not UTF-8 text")
    return texts


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{name} is not UTF-8 text") from None


def read_ids(text: str) -> list[int]:
    """Token ids that are given as `1,2,3`."""
    try:
        return [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        raise InputError(f"--prompt-tokens {text!r} is not a list of ids such as 1,2,3") from None


def read_messages(path: Path) -> list[dict[str, str]]:
    """A conversation from a file: a JSON list of messages with `role` and `content`; parts of a content are joined."""
    found = text_files.parse_json(text_files.read_text(path), path)
    if not isinstance(found, list) or not found:
        raise InputError(f'{path} is not a list of messages, [{{"role": "user", "content": "..."}}]')
    return [_message(f"{path}: message {i}", message) for i, message in enumerate(found, 1)]


def _message(where: str, message: Any) -> dict[str, str]:
    match message:
        case {"role": str(role), "content": str() | list() as content, **others}:
            pass
        case _:
            raise InputError(f"{where} is not an object with a role, and a content that is a text or a list of parts")
    if role not in ROLES:
        raise InputError(f"{where} is of {role!r}: choose from {', '.join(ROLES)}")
    if others:
        raise InputError(f"{where} has {', '.join(map(repr, others))}: only role and content are read")
    texts = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        match part:
            case {"type": "text", "text": str(words)} if len(part) == 2:
                texts.append(words)
            case {"type": str(kind)} if kind != "text":
                raise InputError(f"{where} has a part of type {kind!r}: only text is read")
            case _:
                raise InputError(f'{where} has a part that is not {{"type": "text", "text": "..."}}')
    return {"role": role, "content": "".join(texts)}
