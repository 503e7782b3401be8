"""Conversations: a turn reads what is new, compiles nothing, and says what one long prompt would have said."""

import dataclasses
import io
import shutil
import sys

import pytest

import kvjax
from kvjax import chat as command
from kvjax.checkpoint import shipped
from kvjax.errors import InputError
from kvjax.generation.chat import Chat
from kvjax.generation.model import Model
from kvjax.models.tokenizer import Tokenizer

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}assistant:"
LAST = "{% for m in messages %}{{ 'now' if loop.last else 'then' }}: {{ m.content }}\n{% endfor %}assistant:"


def talking(template: str) -> Model:
    model = kvjax.load()
    assert model.tokenizer is not None
    return dataclasses.replace(model, tokenizer=Tokenizer(model.tokenizer._backend, template, {}))


def test_turns_are_one_long_prompt():
    model = talking(TEMPLATE)
    chat, texts = Chat(model, max_length=600), ["some words", "more words, and these", "x " * 90, "the last ones"]
    for turn, words in enumerate(texts):
        before = () if chat.context is None else chat.context.tokens
        out, chat = chat.say(words, max_new_tokens=8)
        assert chat.context is not None and chat.context.tokens[: len(before)] == before
        assert chat.read == out.sequences[0].prompt_tokens - len(before)
        assert turn == 0 or out.timing.compile_s == 0
    answer = out.sequences[0].tokens
    whole = model.generate([chat.context.tokens[: -len(answer)]], max_new_tokens=8)
    assert whole.sequences[0].tokens == answer
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 4


def test_turns_that_the_template_shows_otherwise_are_read_again():
    chat = Chat(talking(LAST), "h2o", 16, max_length=200)
    for words in ("some words", "other words"):
        out, chat = chat.say(words, max_new_tokens=2)
        assert chat.read == out.sequences[0].prompt_tokens


def test_a_stop_string_is_no_part_of_a_conversation():
    """Nor of its context, so that the next turn reads what is new of it."""
    model = talking(TEMPLATE)
    begun = Chat(model, max_length=200)
    whole = begun.say("some words", max_new_tokens=12)[0].sequences[0].text or ""
    string = whole.strip()[3:6]
    out, chat = begun.say("some words", max_new_tokens=12, stop=[string])
    assert out.sequences[0].text == whole[: whole.index(string)] == chat.messages[-1]["content"]
    assert chat.context is not None and model.tokenizer is not None
    assert model.tokenizer.decode(chat.context.tokens) == chat.text
    before = len(chat.context.tokens)
    out, chat = chat.say("other words", max_new_tokens=2, stop=[string])
    assert before + chat.read == out.sequences[0].prompt_tokens and out.timing.compile_s == 0


def test_a_conversation_has_its_length():
    chat = Chat(talking(TEMPLATE), max_length=24)
    out, chat = chat.say("a", max_new_tokens=100)
    assert out.sequences[0].finish_reason == "stop" or (chat.context and len(chat.context.tokens) == 24)
    with pytest.raises(InputError, match="max-length is 24: give more"):
        chat.say("words " * 20)


@pytest.fixture
def directory(tmp_path):
    """The demo model with a chat template."""
    found = shutil.copytree(shipped.directory(), tmp_path / "talking")
    (found / "chat_template.jinja").write_text(TEMPLATE)
    return found


def say(monkeypatch, capsys, lines: bytes, *flags: str) -> str:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    command.main([*flags])
    return capsys.readouterr().out


def test_the_command_talks(directory, monkeypatch, capsys):
    flags = ("--model", str(directory), "--method", "snapkv", "--budget", "50%", "--max-length", "128")
    lines = b"/bytes\nsome words\n\n/bytes\n/what\nmore words\n/reset\nsome words\n/quit\nnot this"
    out = say(monkeypatch, capsys, lines, *flags, "--max-new-tokens", "4", "--system", "be brief")
    assert "nothing has been read yet" in out and "the full cache would have" in out and "/bytes, /reset" in out
    answers = [line for line in out.splitlines() if not line.startswith(("(cut", "/bytes"))]
    assert answers[1] == answers[-1]  # the same words after /reset
    assert (answer := answers[1].strip()) not in say(monkeypatch, capsys, b"some words\n", *flags, "--stop", answer[-1])
    with pytest.raises(InputError, match="max-length is 1"):
        say(monkeypatch, capsys, b"words\n", "--model", str(directory), "--max-length", "1")
    with pytest.raises(InputError, match="no chat template"):
        say(monkeypatch, capsys, b"words\n", "--model", "demo")
    with pytest.raises(InputError, match="UTF-8"):
        say(monkeypatch, capsys, b"\xff\n", "--model", "demo")
