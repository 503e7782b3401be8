"""Prompts that a command line gives: texts, files, standard input, token ids."""

import argparse
import sys
from pathlib import Path

from kvjax.errors import InputError


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
