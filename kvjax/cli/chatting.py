"""What `kvjax.chat` does once its flags are read: lines in, answers out."""

import argparse
import dataclasses
import sys
from pathlib import Path

from kvjax.cli.console import to_stdout
from kvjax.cli.flags import CHAT_LENGTH, numbers, sampling
from kvjax.cli.generating import show
from kvjax.errors import InputError
from kvjax.generation.accounting import full_bytes
from kvjax.generation.chat import Chat
from kvjax.generation.model import load
from kvjax.generation.sampling import Sampling
from kvjax.methods import default_budget, of, read_entry, write_entry


def run(args: argparse.Namespace, messages: list[dict[str, str]]) -> None:
    """Answer every line of standard input until it ends; first the last message, if it is a user's."""
    model = load(args.model, **numbers(args), ignore_config=args.ignore_config)
    how = sampling(args, model)
    entry = write_entry(args.method or of(model.spec), args.arguments)
    length = min(CHAT_LENGTH, model.spec.max_position) if args.max_length is None else args.max_length
    asked = messages.pop()["content"] if messages and messages[-1]["role"] == "user" else None
    begun = chat = Chat(model, entry, args.budget, max_length=length, messages=(*messages,))
    begun.check()
    if asked is not None:
        chat = _answer(chat, asked, args.max_new_tokens, how, args.stop)
    while (line := _line()) is not None:
        name, _, rest = line.partition(" ")
        if name == "/quit":
            return
        if name == "/reset":
            chat = dataclasses.replace(begun, method=chat.method, budget=chat.budget)
        elif name in COMMANDS:
            try:
                chat = COMMANDS[name](chat, rest.strip())
            except InputError as error:  # the conversation goes on
                print(f"({error})", flush=True)
        elif line.startswith("/"):
            known = "/bytes, /load FILE, /method NAME BUDGET, /reset, /save FILE and /quit"
            print(f"(unknown command {name}: there are {known})", flush=True)
        elif line:
            try:
                chat = _answer(chat, line, args.max_new_tokens, how, args.stop)
            except InputError as error:
                print(f"({error})", flush=True)


def _line() -> str | None:
    """The next line; None at the end."""
    if sys.stdin.isatty():
        print("> ", end="", flush=True)
    try:
        line = sys.stdin.buffer.readline().decode("utf-8")
    except UnicodeDecodeError:
        raise InputError("standard input is not UTF-8 text") from None
    return line.strip() if line else None


def _answer(chat: Chat, line: str, new: int, how: Sampling, stop: list[str]) -> Chat:
    out, after = show(chat.stream(line, max_new_tokens=new, sampling=how, stop=stop))
    if chat.context is not None and after.read == out.sequences[0].prompt_tokens:
        print("(the chat template shows earlier turns otherwise now: everything was read again)", flush=True)
    if out.sequences[0].finish_reason == "length":
        print(f"(cut off: --max-new-tokens {new}, or --max-length {chat.max_length})", flush=True)
    return after


def _show_bytes(chat: Chat, rest: str) -> Chat:
    del rest
    if chat.context is None:
        print("nothing has been read yet", flush=True)
        return chat
    tokens, most = len(chat.context.tokens), chat.max_length
    held, full = chat.context.bytes.total, full_bytes(chat.model, [most])
    kept = sum(chat.context.kept) / (len(chat.context.kept) * tokens)
    line = f"{tokens:,} tokens, {kept:.0%} kept; {held:,} bytes with the room for up to {most:,}"
    to_stdout().print(f"{line}, where a full cache takes {full:,}", highlight=False, soft_wrap=True)
    return chat


def _save(chat: Chat, rest: str) -> Chat:
    chat.save(_path("/save", rest))
    print(f"(saved in {rest}: {_size(chat)})", flush=True)
    return chat


def _load(chat: Chat, rest: str) -> Chat:
    chat = Chat.load(chat.model, _path("/load", rest))
    print(f"(loaded from {rest}: {_size(chat)})", flush=True)
    return chat


def _method(chat: Chat, rest: str) -> Chat:
    name, _, budget = rest.partition(" ")
    if not name:
        raise InputError(f"the method is {_named(chat)}; /method NAME BUDGET takes another one")
    chat = chat.using(name, budget.strip() or None)
    read = 0 if chat.context is None else len(chat.context.tokens)
    print(f"({_named(chat)}: {read:,} tokens of the conversation were read again)", flush=True)
    return chat


def _path(command: str, rest: str) -> Path:
    if not rest:
        raise InputError(f"give a file: {command} FILE")
    return Path(rest).expanduser()


def _named(chat: Chat) -> str:
    entry = str(chat.method)
    budget = default_budget(read_entry(entry)[0]) if chat.budget is None else chat.budget
    return entry if budget is None else f"{entry} {budget}"


def _size(chat: Chat) -> str:
    assert chat.context is not None
    return f"{len(chat.messages)} messages, {len(chat.context.tokens):,} tokens, {_named(chat)}"


COMMANDS = {"/bytes": _show_bytes, "/load": _load, "/method": _method, "/save": _save}
