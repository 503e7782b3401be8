"""Encoding, decoding, streaming and chat templates, on tokenizers of the two styles that Llama's family has."""

import json
import subprocess
import sys
import threading
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from kvjax.errors import InputError
from kvjax.models.tokenizer import Tokenizer

MESSAGES = [{"role": "tool", "content": "be brief"}, {"role": "user", "content": "hi <you>"}]
TEXTS = [
    "",
    "hello world",
    " two  spaces ",
    "naïve café",
    "你好，世界",
    "🙂 family 👩‍👩‍👧",
    "a\nb\tc",
    "x\ufffdy",
    "\ufffd",
]


def byte_level():
    """Llama 3's and Qwen's style: every byte is a letter of the alphabet."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)}
    for merged in ("he", "ll", "ð٠", "Ġw", "ä½"):
        vocab.setdefault(merged, len(vocab))
    backend = Backend(models.BPE(vocab, [("h", "e"), ("l", "l"), ("Ġ", "w"), ("ä", "½")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def byte_fallback():
    """Llama 2's style: SentencePiece pieces, and a token for each byte of what has no piece."""
    vocab = {"<unk>": 0} | {f"<0x{i:02X}>": i + 1 for i in range(256)}
    for piece in ("▁", *"abcdefghijklmnopqrstuvwxyz", "▁▁", "▁w", "▁wo", "ï", "世"):
        vocab[piece] = len(vocab)
    merges = [("▁", "▁"), ("▁", "w"), ("▁w", "o")]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return backend


def write(backend, directory, **config) -> Tokenizer:
    """A checkpoint directory's tokenizer, with a first token that is added around a text."""
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    first = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", first)])
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}, "pad_token": None}
    (directory / "tokenizer_config.json").write_text(json.dumps(special | config))
    return reload(directory)


def reload(directory) -> Tokenizer:
    tokenizer = Tokenizer.load(directory)
    assert tokenizer is not None
    return tokenizer


STYLES = {"byte_level": byte_level, "byte_fallback": byte_fallback}


@pytest.fixture(scope="module", params=STYLES)
def tokenizer(request, tmp_path_factory):
    return write(STYLES[request.param](), tmp_path_factory.mktemp(request.param))


def streamed(tokenizer, ids):
    """The pieces that a stream gives, the last one from `finish`."""
    stream = tokenizer.stream()
    return [*(stream.push(i) for i in ids), stream.finish()]


def test_no_tokenizer(tmp_path):
    assert Tokenizer.load(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_that_panics_is_one_line_at_load(tmp_path):
    """The library's panics are no Exception, and print a stack by themselves."""
    write(byte_level(), tmp_path)
    file = tmp_path / "tokenizer.json"
    whole = json.loads(file.read_text())
    for broken in (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},  # while it is read
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},  # while it reads a text
    ):
        file.write_text(json.dumps(whole | broken))
        with pytest.raises(InputError, match=r"tokenizer\.json: is not a tokenizer \("):
            Tokenizer.load(tmp_path)
    code = (
        f"import pathlib; from kvjax.models import tokenizer; tokenizer.Tokenizer.load(pathlib.Path({str(tmp_path)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "panicked" not in done.stderr and done.stderr.splitlines()[-1].startswith("kvjax.errors.InputError: ")


@pytest.mark.parametrize(
    ("part", "step"),
    [
        ("normalizer", {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": "a"}, "content": "aa"}),
        ("normalizer", {"type": "Prepend", "prepend": "aaaa"}),
        ("decoder", {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}),
    ],
)
def test_a_tokenizer_that_blows_texts_up_is_refused(part, step, tmp_path):
    write(byte_level(), tmp_path)
    file = tmp_path / "tokenizer.json"
    whole = json.loads(file.read_text())
    for times, refused in ((1, False), (10, True)):
        file.write_text(json.dumps(whole | {part: {"type": "Sequence", f"{part}s": [step] * times}}))
        if refused:
            with pytest.raises(InputError, match="times as long; at most 32"):
                Tokenizer.load(tmp_path)
        else:
            reload(tmp_path)


def test_texts_that_a_tokenizer_cannot_read_are_refused(tokenizer):
    words = Tokenizer(Backend(models.WordLevel({"known": 0}, unk_token="<unk>")), None, {})
    assert words.encode("known") == [0]
    for read in (words.encode, lambda text: words.split(text, 1)):
        with pytest.raises(InputError, match=r"cannot read the text \(.*Missing \[UNK\]"):
            read("other")
    with pytest.raises(InputError, match="character 2 of the text is half a surrogate pair"):
        tokenizer.encode("a\ud800")
    with pytest.raises(InputError, match="cannot spell"):
        tokenizer.decode([-1])


def test_other_threads_run_while_a_text_is_read(tokenizer):
    """What hears Ctrl-C is one of them."""
    text, ticks, reading = "some words to read " * 20_000, [], threading.Event()
    thread = threading.Thread(target=lambda: [ticks.append(reading.wait(0.001)) for _ in iter(reading.is_set, True)])
    thread.start()
    tokenizer.encode(text)
    reading.set()
    thread.join()
    assert len(ticks) > 20


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.encode("<s>", special=False)[-1]
    assert ids[1:] == tokenizer.encode(text, special=False)
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) > max(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_split_parts_join_to_the_whole(tokenizer, text):
    for cut in range(len(text) + 1):
        before, after = tokenizer.split(text, cut)
        assert before + after == tokenizer.encode(text)
        assert len(tokenizer.decode(before)) <= cut
    before, after = tokenizer.split("hello world", 5)
    assert (tokenizer.decode(before), tokenizer.decode(after).strip()) == ("hello", "world")


@pytest.mark.parametrize("text", TEXTS)
def test_stream_gives_whole_characters(tokenizer, text):
    ids = tokenizer.encode(text)
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    if text == "hello world":  # nothing is held back without need
        assert sum(map(bool, pieces)) >= len(ids) - 2
        assert pieces[-1] == ""


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=500, deadline=None, derandomize=True)
@given(data=st.data())
def test_stream_joins_to_decode_for_any_tokens(style, data):
    tokenizer = ANY[style]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=24))
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def with_special(backend):
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return Tokenizer(backend, None, {})


ANY = {style: with_special(make()) for style, make in STYLES.items()}


CHATML = """{{ bos_token }}{% for message in messages %}
    {% if message.role == 'tool' %}{% continue %}{% endif %}
[{{ message.role }}] {{ message.content | tojson }}
{% generation %}!{% endgeneration %}
{% endfor %}
{% if add_generation_prompt %}
[assistant]{{ eos_token }}{% endif %}"""


def test_chat(tmp_path):
    tokenizer = write(byte_level(), tmp_path / "one", chat_template=CHATML)
    expected = '<s>[user] "hi <you>"\n!\n[assistant]</s>'.replace("!\n", "!")
    assert tokenizer.chat(MESSAGES) == tokenizer.encode(expected, special=False)
    listed = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    assert write(byte_level(), tmp_path / "two", chat_template=listed).chat(MESSAGES) == tokenizer.chat(MESSAGES)
    (tmp_path / "one" / "chat_template.jinja").write_text("{{ messages[-1].content }}{{ strftime_now('%Y') }}")
    file_first = reload(tmp_path / "one")
    assert file_first.decode(file_first.chat(MESSAGES)) == f"hi <you>{datetime.now().year}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ([{"name": ["x"]}], "a list of named texts"),
        (5, "is not a text"),
        ("{% if %}", "chat template"),
        ("{{ messages.append(1) }}", "chat template"),
        ("{{ ''.__class__.__mro__ }}", "chat template"),
    ],
)
def test_chat_refuses(tmp_path, template, words):
    with pytest.raises(InputError, match=words):
        write(byte_level(), tmp_path, chat_template=template).chat(MESSAGES)


def test_a_template_that_is_not_text_is_refused(tmp_path):
    write(byte_level(), tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        Tokenizer.load(tmp_path)


def test_chat_is_that_of_transformers(tmp_path):
    chat = pytest.importorskip("transformers.utils.chat_template_utils")
    tokenizer = write(byte_level(), tmp_path, chat_template=CHATML)
    (expected,), _ = chat.render_jinja_template(
        [MESSAGES], chat_template=CHATML, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    assert tokenizer.chat(MESSAGES) == tokenizer.encode(expected, special=False)
