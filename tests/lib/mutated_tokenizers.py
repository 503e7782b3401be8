"""Mutated tokenizers and chat templates: what is accepted does what the libraries do that they are written for."""

import functools
import json
import tempfile
from pathlib import Path

import jinja2.sandbox
import tokenizers
from hypothesis import strategies as st

from kvjax.models.tokenizer import Tokenizer
from tests import test_tokenizer
from tests.lib.mutate import REFUSED, Kind, dump, edited, json_of, mangled, reading, refused

TEXTS = ["hello world", "naïve 🙂 你好", "", " a\nb", "half \ud800"]
MESSAGES = test_tokenizer.MESSAGES


# Tokenizers


@functools.cache
def tokenizer_files() -> dict[str, tuple[bytes, bytes]]:
    """`tokenizer.json` and `tokenizer_config.json` of both styles."""
    found = {}
    for name, make in test_tokenizer.STYLES.items():
        with tempfile.TemporaryDirectory() as folder:
            test_tokenizer.write(make(), Path(folder))
            found[name] = tuple((Path(folder) / f"tokenizer{end}.json").read_bytes() for end in ("", "_config"))
    return found


@st.composite
def tokenizer_cases(draw: st.DrawFn) -> bytes:
    """Mutated `tokenizer.json`; its vocabulary is seldom what changes."""
    whole = json.loads(tokenizer_files()[draw(st.sampled_from(sorted(tokenizer_files())))][0])
    if draw(st.booleans()):
        return draw(json_of(whole))
    return dump(whole | draw(edited({key: value for key, value in whole.items() if key != "model"})))


def tokenizer_holds(text: bytes, folder: Path) -> None:
    """An accepted tokenizer splits and joins texts as the library does that it is made for."""
    file = folder / "tokenizer.json"
    file.write_bytes(text)
    found = refused(lambda: Tokenizer.load(folder))
    if found is REFUSED:
        return
    backend = tokenizers.Tokenizer.from_file(str(file))
    if getattr(backend.model, "dropout", None) is not None:
        return  # merges at random
    backend.no_padding()
    backend.no_truncation()
    for text_ in TEXTS:
        ids = refused(lambda text_=text_: found.encode(text_))
        if ids is not REFUSED:
            assert ids == backend.encode(text_).ids
            assert found.decode(ids) == backend.decode(ids, skip_special_tokens=True)


# Chat templates


TEMPLATE = (
    "{% for message in messages %}{{ bos_token if loop.first }}<|{{ message['role'] }}|>\n"
    "{{ message['content'] | trim }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PIECES = ["{{ 1 / 0 }}", "{{ messages[9].x.y }}", "{% if %}", "{{ range(3) | list }}", "{% macro f() %}x{% endmacro %}",
          "{{ f() }}", "{{ ''.__class__.__mro__ }}", "{{ messages | tojson }}", "{{ raise_exception('no') }}",
          "{% for x in range(9) %}{{ x }}{% endfor %}", "{{ 'a' * 9 }}", "{{ 2 ** 9 }}", "{{ 'é' }}", "{#"]  # fmt: skip
BOMB = b"{{ 'a' * 10 ** 10 }}"
SETTINGS = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>"},
    "chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}],
}


@st.composite
def template_cases(draw: st.DrawFn) -> bytes:
    """Mutated `chat_template.jinja`."""
    if draw(st.booleans()):
        return draw(mangled(TEMPLATE.encode()))
    at = draw(st.integers(0, len(TEMPLATE)))
    return (TEMPLATE[:at] + draw(st.sampled_from(PIECES)) + TEMPLATE[at:]).encode()


def template_holds(text: bytes, folder: Path) -> None:
    """An accepted template writes what Jinja writes."""
    test_tokenizer.write(test_tokenizer.byte_level(), folder)
    (folder / "chat_template.jinja").write_bytes(text)
    tokenizer = refused(lambda: Tokenizer.load(folder))
    found = REFUSED if tokenizer is REFUSED else refused(lambda: tokenizer.render(MESSAGES))
    if found is not REFUSED:
        assert found == rendered(text.decode().replace("\r\n", "\n"), bos_token="<s>", eos_token="</s>")


def rendered(template: str, **special: str) -> str:
    """What Jinja makes of the messages."""
    usual = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    usual.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    asked = {"messages": MESSAGES, "add_generation_prompt": True, "tools": None, "documents": None}
    return usual.from_string(template).render(**asked, **special)


def settings_hold(text: bytes, folder: Path) -> None:
    """Accepted settings of a tokenizer give the template that they name, with the special tokens that they name."""
    test_tokenizer.write(test_tokenizer.byte_level(), folder)
    (folder / "tokenizer_config.json").write_bytes(text)
    tokenizer, config = refused(lambda: Tokenizer.load(folder)), reading(json.loads, text)
    if tokenizer is REFUSED:
        return
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry.get("template") for entry in template}.get("default")
    assert tokenizer.has_template == (template is not None)
    found = REFUSED if template is None else refused(lambda: tokenizer.render(MESSAGES))
    if found is not REFUSED:
        assert isinstance(template, str)
        first = config.get("bos_token") or ""
        first = first.get("content", "") if isinstance(first, dict) else first
        assert found == rendered(template, **({"bos_token": first} if isinstance(first, str) else {}))


MODEL = {"type": "BPE", "vocab": {}, "merges": []}
TWICE = {"model": {"type": "BPE", "vocab": {"a": 0, "h": 1, "e": 1}, "merges": []}}
PRECOMPILED = {"version": "1.0", "added_tokens": [], "normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}
KINDS = {
    "tokenizer.json": Kind(tokenizer_cases(), tokenizer_holds, [dump(PRECOMPILED | {"model": MODEL}), dump(TWICE)]),
    "tokenizer_config.json": Kind(
        json_of(SETTINGS), settings_hold, [dump({"chat_template": [{"name": ["x"]}]}), dump({"chat_template": 5})]
    ),
    "chat_template.jinja": Kind(template_cases(), template_holds, [BOMB, b"\xff"]),
}
