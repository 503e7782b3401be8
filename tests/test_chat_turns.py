"""Conversations: a turn reads what is new, compiles nothing, and says what one long prompt would have said."""

import dataclasses
import io
import json
import re
import shutil
import sys

import numpy as np
import pytest

import kvjax
from kvjax import chat as command
from kvjax import generate
from kvjax.checkpoint import shipped
from kvjax.errors import InputError, say_once
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


def test_a_saved_conversation_goes_on(tmp_path):
    """With the same tokens; the file is a context, too."""
    model = talking(TEMPLATE)
    begun = Chat(model, "h2o", 24, max_length=200, messages=({"role": "system", "content": "be brief"},))
    with pytest.raises(InputError, match="nothing has been said"):
        begun.save(tmp_path / "talk.kv")
    _, chat = begun.say("some words", max_new_tokens=4)
    chat.save(tmp_path / "talk.kv")
    loaded = Chat.load(model, tmp_path / "talk.kv")
    for words in ("other words", "the last ones"):
        (out, chat), (same, loaded) = (each.say(words, max_new_tokens=6) for each in (chat, loaded))
        assert out.sequences == same.sequences and np.array_equal(out.logits, same.logits)
        assert chat.messages == loaded.messages and (chat.text, chat.read) == (loaded.text, loaded.read)
    assert model.load_context(tmp_path / "talk.kv").ask(["x"], max_new_tokens=1)
    model.read("some words").save(tmp_path / "text.kv")
    with pytest.raises(InputError, match="without a conversation"):
        Chat.load(model, tmp_path / "text.kv")


def test_another_method_reads_the_conversation_again():
    model = talking(TEMPLATE)
    _, chat = Chat(model, "h2o", 16, max_length=200).say("some words " * 5, max_new_tokens=4)
    other = chat.using("snapkv+window=8", "50%")
    assert chat.context is not None and other.context is not None and other.context.tokens == chat.context.tokens
    read = model.read(chat.context.tokens, "snapkv+window=8", "50%", max_length=200)
    assert np.array_equal(other.context.logits, read.logits) and other.context.kept == read.kept
    before = len(other.context.tokens)
    out, _ = other.say("more", max_new_tokens=2)
    assert out.sequences[0].prompt_tokens - before < 20  # only what is new


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "is not a list of messages"),
        ("[]", "is not a list of messages"),
        ("[1]", "message 1 is not an object with a role"),
        ('[{"role": "user"}]', "message 1 is not an object with a role"),
        ('[{"role": "user", "content": null}]', "message 1 is not an object with a role"),
        ('[{"role": "tool", "content": ""}]', "of 'tool': choose from system, user, assistant"),
        ('[{"role": "user", "content": "a", "name": "b"}]', "has 'name': only role and content"),
        ('[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]', "part of type 'image_url'"),
        ('[{"role": "user", "content": [{"type": "text"}]}]', "a part that is not"),
        ('[{"role": "user", "content": ["a"]}]', "a part that is not"),
        ("[", "is not JSON"),
    ],
)
def test_what_is_no_conversation(content, message, tmp_path):
    (tmp_path / "talk.json").write_text(content)
    with pytest.raises(InputError, match=message):
        command.main(["--model", "demo", "--messages", str(tmp_path / "talk.json")])


@pytest.fixture
def directory(tmp_path):
    """The demo model with a chat template."""
    found = shutil.copytree(shipped.directory(), tmp_path / "talking")
    (found / "chat_template.jinja").write_text(TEMPLATE)
    return found


def test_a_checkpoint_says_how_to_sample(directory, monkeypatch, capsys):
    """Unless flags do; in chats only, and said in one line."""
    config = {"do_sample": True, "temperature": 2.0, "top_k": 20, "repetition_penalty": None}
    (directory / "generation_config.json").write_text(json.dumps(config))
    flags = ("--model", str(directory), "--max-new-tokens", "12")
    own = ("--temperature", "2", "--top-k", "20")
    line = "sampling as generation_config.json says: temperature 2.0, top-k 20\n"

    def answers(*more: str) -> tuple[str, str]:
        say_once.cache_clear()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"some words\n")))
        command.main([*flags, "--max-length", "64", *more])
        return capsys.readouterr()

    drawn, said = answers()
    assert said == line and answers(*own) == (drawn, "")
    greedy, said = answers("--temperature", "0")
    assert said == "" and greedy != drawn
    assert answers("--top-k", "5")[1] == line.replace(", top-k 20", "")

    def generated(*more: str) -> tuple[list[int], str]:
        say_once.cache_clear()
        generate.main([*flags, "--prompt", "some words", "--json", *more])
        found = capsys.readouterr()
        return json.loads(found.out)["sequences"][0]["tokens"], found.err

    assert generated("--chat") == (generated("--chat", *own)[0], line)
    assert generated() == generated("--temperature", "0")


def test_the_command_saves_loads_and_goes_on(directory, monkeypatch, capsys, tmp_path):
    flags = (
        "--model",
        str(directory),
        "--method",
        "h2o",
        "--budget",
        "40",
        "--max-length",
        "160",
        "--max-new-tokens",
        "4",
    )
    talk = [{"role": "user", "content": [{"type": "text", "text": "some "}, {"type": "text", "text": "words"}]}]
    (tmp_path / "talk.json").write_text(json.dumps(talk))
    name = str(tmp_path / "talk.kv")
    lines = (
        f"/save {name}\nmore words\n/load {name}\nmore words\n/method full+store=int8\n/method\n/reset\n/save {name}\n"
    )
    out = say(monkeypatch, capsys, lines.encode(), *flags, "--messages", str(tmp_path / "talk.json"))
    said = [line for line in out.splitlines() if line.startswith("(")]
    answers = [line for line in out.splitlines() if not line.startswith("(")]
    assert answers[1] == answers[2]
    found = [line.split(":") for line in said if "2 messages" in line and "h2o 40" in line]
    assert [line[0] for line in found] == [f"(saved in {name}", f"(loaded from {name}"] and found[0][1] == found[1][1]
    assert any("full+store=int8" in line and "were read again" in line for line in said)
    assert said[-2].startswith("(the method is full+store=int8") and "nothing has been said" in said[-1]
    wrong = b"/save\n/load\n/load /nowhere/x.kv\n/method nothing\n/method h2o many\n/save /nowhere/x.kv\n/ \nsome words"
    out = say(monkeypatch, capsys, wrong, *flags)
    assert len(out.splitlines()) == 8 + out.count("(cut")  # a line for each
    with pytest.raises(InputError, match="leave --system out"):
        (tmp_path / "talk.json").write_text('[{"role": "system", "content": "a"}]')
        command.main([*flags, "--system", "b", "--messages", str(tmp_path / "talk.json")])


def say(monkeypatch, capsys, lines: bytes, *flags: str) -> str:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    command.main([*flags])
    return capsys.readouterr().out


def test_the_command_talks(directory, monkeypatch, capsys):
    flags = ("--model", str(directory), "--method", "snapkv", "--budget", "50%", "--max-length", "128")
    lines = b"/bytes\nsome words\n\n/bytes\n/what\nmore words\n/reset\nsome words\n/quit\nnot this"
    out = say(monkeypatch, capsys, lines, *flags, "--max-new-tokens", "4", "--system", "be brief")
    assert "nothing has been read yet" in out and "where a full cache takes" in out and "unknown command /what" in out
    assert re.search(r"\b[56]\d% kept", out)
    answers = [line for line in out.splitlines() if not line.startswith(("(", "/bytes"))]
    assert answers[1] == answers[-1]  # the same words after /reset
    assert (answer := answers[1].strip()) not in say(monkeypatch, capsys, b"some words\n", *flags, "--stop", answer[-1])
    out = say(monkeypatch, capsys, b"some words\n" + b"words " * 200 + b"\n/bytes\n", *flags, "--max-new-tokens", "2")
    assert "max-length is 128: give more" in out and "where a full cache takes" in out.splitlines()[-1]
    out = say(monkeypatch, capsys, b"words " * 200 + b"\nsome words\n", *flags, "--max-new-tokens", "2")
    assert "max-length is 128: give more" in out and len(out.splitlines()) > 1  # the conversation begins anyway
    with pytest.raises(InputError, match="max-length is 1"):
        say(monkeypatch, capsys, b"", "--model", str(directory), "--max-length", "1")  # before anything is said
    with pytest.raises(InputError, match="no chat template"):
        say(monkeypatch, capsys, b"", "--model", "demo")
    with pytest.raises(InputError, match="UTF-8"):
        say(monkeypatch, capsys, b"\xff\n", *flags)
