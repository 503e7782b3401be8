"""What `kvjax.chat` does once its flags are read: lines in, answers out."""

import argparse
import sys

from kvjax.cli.console import to_stdout
from kvjax.cli.flags import CHAT_LENGTH, DTYPES
from kvjax.cli.generating import show
from kvjax.errors import InputError
from kvjax.generation.chat import Chat
from kvjax.generation.model import load
from kvjax.generation.sampling import Sampling
from kvjax.methods import of, write_entry


def run(args: argparse.Namespace, sampling: Sampling) -> None:
    """Answer every line of standard input until it ends."""
    model = load(args.model, dtype=DTYPES.get(args.dtype), ignore_config=args.ignore_config)
    entry = write_entry(args.method or of(model.spec), args.arguments)
    length = min(CHAT_LENGTH, model.spec.max_position) if args.max_length is None else args.max_length
    system = () if args.system is None else ({"role": "system", "content": args.system},)
    begun = chat = Chat(model, entry, args.budget, max_length=length, messages=system)
    while (line := _line()) is not None:
        if line == "/quit":
            return
        if line == "/reset":
            chat = begun
        elif line == "/bytes":
            _show_bytes(chat)
        elif line.startswith("/"):
            print("/bytes, /reset and /quit are what begins with a stroke", flush=True)
        elif line:
            chat = _answer(chat, line, args.max_new_tokens, sampling, args.stop)


def _line() -> str | None:
    """The next line; None at the end."""
    if sys.stdin.isatty():
        print("> ", end="", flush=True)
    try:
        line = sys.stdin.buffer.readline().decode("utf-8")
    except UnicodeDecodeError:
        raise InputError("standard input is not UTF-8 text") from None
    return line.strip() if line else None


def _answer(chat: Chat, line: str, new: int, sampling: Sampling, stop: list[str]) -> Chat:
    out, after = show(chat.stream(line, max_new_tokens=new, sampling=sampling, stop=stop))
    if chat.context is not None and after.read == out.sequences[0].prompt_tokens:
        print("(the chat template shows earlier turns otherwise now: everything was read again)", flush=True)
    if out.sequences[0].finish_reason == "length":
        print("(cut off: --max-new-tokens or --max-length)", flush=True)
    return after


def _show_bytes(chat: Chat) -> None:
    if chat.context is None:
        print("nothing has been read yet", flush=True)
        return
    held, full = chat.context.bytes.total, chat.context.full_bytes
    tokens = len(chat.context.tokens)
    to_stdout().print(f"{tokens:,} tokens in {held:,} bytes; the full cache would have {full:,}", highlight=False)
