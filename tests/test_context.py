"""Contexts: read once, asked often, changed by nothing."""

import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
import safetensors.numpy

import kvjax
from kvjax import generate, methods
from kvjax.cache import tier as tiers_
from kvjax.errors import InputError
from kvjax.generation import context_file
from kvjax.generation.context import Context
from kvjax.generation.model import Model
from kvjax.models.tokenizer import Tokenizer
from kvjax.policies.base import Recipe
from tests.lib import oracle
from tests.lib.matrix import BUDGET, VARIANTS, WITH_BUDGET, decoder, model_of, quick, reference, text

TEXT, QUESTIONS = text(40, 0), (text(3, 1), text(5, 2), text(1, 3))
# What differs most: rings of runs, places in the cache, budgets over layers, two tiers, a gate.
DEFAULT = ("full kivi2", "streaming_llm", "dynamickv int8", "mikv", "dmc")
APPENDING = ("full", "full int8", "snapkv", "pyramidkv", "adakv", "adakv int2", "dynamickv", "dynamickv int8", "oracle")


def model(name: str) -> Model:
    return Model(decoder(name), None, (), name)


def recipe(method: str) -> Recipe:
    """A method, with room for all that a gate may want: what it is refused depends on what else was expected."""
    name, room = method.split()[0], {"capacity": "100%"} if model_of(method) != "gqa" else {}
    return methods.make(name, BUDGET if method in WITH_BUDGET else None, VARIANTS[method] | room)


def close(a, b) -> None:
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def tokens(out) -> list[list[int]]:
    return [sequence.tokens for sequence in out.sequences]


@pytest.mark.parametrize("method", quick(VARIANTS, DEFAULT))
def test_questions_leave_a_context_as_it_is(method):
    """Asked together or one by one, once or twice; what it grows to is what `generate` reads."""
    own, how = model(model_of(method)), recipe(method)
    context = own.read(TEXT, how)
    before = jax.device_get(context.cache)
    together = context.ask(QUESTIONS, max_new_tokens=4)
    for i, question in enumerate(QUESTIONS):
        alone = context.ask([question], max_new_tokens=4)
        close(alone.logits[0], together.logits[i])
        assert tokens(alone) == tokens(together)[i : i + 1]
    again = context.ask(QUESTIONS, max_new_tokens=4)
    assert tokens(again) == tokens(together) and np.array_equal(again.logits, together.logits)

    grown = context.extend(QUESTIONS[0])
    out, after = grown.generate(max_new_tokens=4)
    read = own.generate([TEXT], how, questions=[QUESTIONS[0]], max_new_tokens=4)
    close(grown.logits, read.logits)
    assert tokens(out) == tokens(read) and after.tokens == (*TEXT, *QUESTIONS[0], *tokens(out)[0])
    assert len(context.tokens) == len(TEXT)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(context.cache))

    if method in APPENDING:
        close(together.logits[0], read.logits[0])
        assert tokens(together)[:1] == tokens(read)


def test_a_full_context_is_the_text():
    """Also through sliding windows: logits are those of a forward pass, and nothing is compiled for a second batch."""
    sinks = Model(oracle.random_model(5, num_layers=2, max_position=128, sinks=True), None, (), "sinks")
    for own in (model("gqa"), model("capped"), model("latent"), sinks):
        context = own.read(TEXT)
        out = context.ask(QUESTIONS, max_new_tokens=2)
        for question, logits in zip(QUESTIONS, out.logits, strict=True):
            close(logits, reference(own.decoder, TEXT + question)[len(TEXT + question) - 1])
        assert context.ask([text(9, 4), text(2, 5), text(12, 6)], max_new_tokens=20).timing.compile_s == 0
        close(
            context.extend(QUESTIONS[0]).extend(QUESTIONS[1]).logits,
            own.read(TEXT + QUESTIONS[0] + QUESTIONS[1]).logits,
        )


def test_sinks_count_once_for_all_that_is_read():
    own = Model(oracle.random_model(5, num_layers=1, sinks=True), None, (), "sinks")
    out = own.read(TEXT).ask(QUESTIONS, max_new_tokens=2)
    for question, logits in zip(QUESTIONS, out.logits, strict=True):
        close(logits, reference(own.decoder, TEXT + question)[-1])


@pytest.mark.parametrize("method", quick(("snapkv", "adakv", "dynamickv"), ("snapkv",)))
def test_a_context_that_grows_in_small_steps_loses_nothing(method):
    """Of a budget's share of the prompt and all that follows it."""
    own, more = model("gqa"), text(80, 7)
    context = own.read(TEXT, f"{method}+window=4", "50%")
    for at in range(0, len(more), 16):
        context = context.extend(more[at : at + 16])
    read = own.generate([TEXT], f"{method}+window=4", "50%", questions=[more], max_new_tokens=1)
    close(context.logits, read.logits)
    assert context.kept == read.slots[0]


def test_places_in_the_cache_reach_beyond_the_limit(tmp_path):
    """While it generates; questions are kept whole, and so have the limit."""
    own = Model(oracle.random_model(5, num_layers=1, max_position=64), None, (), "short")
    context = own.read(TEXT, "streaming_llm", 16)
    _, far = context.generate(max_new_tokens=60)
    assert len(far.tokens) == far.room == 100 and far.kept == [16]
    far.save(tmp_path / "far.kv")
    assert own.load_context(tmp_path / "far.kv").room == 100
    with pytest.raises(InputError, match="context limit"):
        context.ask([[1]], max_new_tokens=2**28)


def test_a_context_that_grows_within_its_length_compiles_nothing():
    own = model("gqa")
    context = own.read(TEXT, "h2o", "50%", max_length=128)
    context = context.extend([1]).generate(max_new_tokens=3)[1]
    for turn in range(3):
        out, context = context.extend(text(5 + turn, turn)).generate(max_new_tokens=8)
        assert out.timing.compile_s == 0
    with pytest.raises(InputError, match="max-length"):
        own.read(TEXT, max_length=len(TEXT) - 1)


PRUNED = (
    *("streaming_llm", "streaming_llm+positions=absolute", "h2o", "h2o+store=int4", "h2o+decode_budget=60%", "tova"),
    *("snapkv+window=4", "snapkv+window=4+decode_budget=60%", "snapkv+window=4+store=int4", "pyramidkv+window=4"),
    "keydiff+split=row",
)


EACH = [(name, method) for name in ("gqa", "capped") for method in PRUNED]


@pytest.mark.parametrize("case", quick(EACH, (("gqa", "streaming_llm"), ("gqa", "h2o"), ("capped", "snapkv+window=4"))))
def test_a_pruned_context_was_read_with_less(case, tmp_path):
    """The same tokens in the same bytes, and what comes of them."""
    (name, method), own = case, model(case[0])
    if name == "capped" and method == "streaming_llm":
        method += "+windowed=whole"
    wide = own.read(TEXT, method, "50%")
    for budget in ("20%", "5%", "50%") if "decode" in method else ("20%", 5, "50%"):
        pruned, read = wide.prune(budget), own.read(TEXT, method, budget)
        assert pruned.kept == read.kept and pruned.bytes == read.bytes
        for mine, other in zip(pruned.cache, read.cache, strict=True):
            for a, b in zip(mine, other, strict=True):
                for layer in range(a.length.shape[0]):
                    one, two = (jax.device_get(tiers_.positions(tiers_.layer(t, layer))) for t in (a, b))
                    assert np.array_equal(np.sort(one), np.sort(two))
                assert np.array_equal(a.budget, b.budget)
        (out, more), (same, _) = (each.extend(QUESTIONS[1]).generate(max_new_tokens=8) for each in (pruned, read))
        assert tokens(out) == tokens(same)
        close(out.logits, same.logits)
        assert tokens(pruned.ask(QUESTIONS, max_new_tokens=4)) == tokens(read.ask(QUESTIONS, max_new_tokens=4))
    pruned.save(tmp_path / "less.kv")
    assert own.load_context(tmp_path / "less.kv").kept == pruned.kept
    with pytest.raises(InputError, match="is more than the context has"):
        wide.prune("20%").prune("30%")
    with pytest.raises(InputError, match="has grown"):
        more.prune(2)


NOT_PRUNED = {
    "it has no budget": ("full", "oracle"),
    "share slots by scores": ("adakv+window=4", "dynamickv+window=4", "keydiff", "d2o"),
    "are merged, or go to another tier": ("mikv",),
}


@pytest.mark.parametrize(("method", "why"), [(name, why) for why, names in NOT_PRUNED.items() for name in names])
def test_what_cannot_be_pruned(method, why):
    context = model("gqa").read(TEXT, method, None if method == "full" else "50%")
    with pytest.raises(InputError, match=f"{why}.*: read the text with budget 10%"):
        context.prune("10%")


def test_questions_share_a_context():
    """Of its bytes there is one copy, and a small one of each question's."""
    context = model("gqa").read(TEXT)
    sizes = [context.ask([[1]] * n, max_new_tokens=2).bytes.total for n in (2, 4, 6)]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] and sizes[0] - (sizes[1] - sizes[0]) <= context.bytes.total + 64
    out = context.ask([text(1 + i % 9, i) for i in range(32)], max_new_tokens=2)
    private = context.ask([[1]], max_new_tokens=2).bytes.total - context.bytes.total
    assert out.bytes.total <= context.bytes.total + 32 * private
    assert context.ask([text(9, i) for i in range(32)], max_new_tokens=3).timing.compile_s == 0
    assert context.kept == [len(TEXT)] * 2


@pytest.mark.parametrize(
    ("name", "method"),
    [("gqa", "full+store=kivi2:8:16"), ("gqa", "h2o+store=int4"), ("gqa-bf16", "mikv"), ("gqa-bf16", "full+store=fp8")],
)
def test_a_saved_context_goes_on(name, method, tmp_path):
    own = model(name)
    context = own.read(TEXT, method, "50%" if "full" not in method else None).extend(QUESTIONS[0])
    context.save(tmp_path / "text.kv")
    loaded = own.load_context(tmp_path / "text.kv")
    assert loaded.tokens == context.tokens and loaded.bytes == context.bytes and loaded.kept == context.kept
    assert tokens(loaded.ask(QUESTIONS, max_new_tokens=2)) == tokens(context.ask(QUESTIONS, max_new_tokens=2))
    a, b = (each.generate(max_new_tokens=2)[1] for each in (loaded, context))
    assert a.tokens == b.tokens and np.array_equal(a.logits, b.logits)


def test_a_context_of_another_model_or_a_damaged_one_is_refused(tmp_path):
    own, file = model("gqa"), tmp_path / "text.kv"
    own.read(TEXT, "snapkv+window=4", "50%").save(file)
    whole = file.read_bytes()
    with pytest.raises(InputError, match="was made by gqa in float32, which is not this model, gqa-bf16 in bfloat16"):
        model("gqa-bf16").load_context(file)
    with pytest.raises(InputError, match="given as a recipe"):
        own.read(TEXT, methods.h2o()).save(file)
    with pytest.raises(InputError, match="cannot write"):
        own.read(TEXT).save(tmp_path / "nowhere" / "text.kv")
    assert file.read_bytes() == whole  # what could not be written has changed nothing
    random = np.random.default_rng(0)
    for at in (*random.integers(0, len(whole), 20), 0, 7, 9, len(whole) - 1):
        changed = bytearray(whole)
        changed[at] ^= 1 << random.integers(8)
        file.write_bytes(changed)
        with pytest.raises(InputError):
            own.load_context(file)
        file.write_bytes(whole[:at])
        with pytest.raises(InputError):
            own.load_context(file)


def test_contexts_say_what_they_cannot_do():
    own = model("gqa")
    context = own.read(TEXT)
    for questions, message in (
        ("one text", "list of questions"),
        ([], "no question"),
        ([[97]], "vocabulary"),
        ([[1]] * 2 + [[2] * 90], "context limit"),
    ):
        with pytest.raises(InputError, match=message):
            context.ask(questions)
    with pytest.raises(InputError, match="whole number"):
        context.generate(max_new_tokens=0)
    with pytest.raises(InputError, match="context limit"):
        context.extend([1] * 100)
    with pytest.raises(InputError, match="positions=absolute"):
        model("capped").read(TEXT, "streaming_llm", "50%").ask([[1]])
    assert context.extend([]) is context


def test_a_question_ends_what_a_user_says(tmp_path):
    """The template stands around text and question as around both in one."""
    own = kvjax.load()
    assert own.tokenizer is not None
    backend = own.tokenizer._backend
    chat = Tokenizer(backend, "<{{ messages[0].content | trim }}> now", {})
    talking = dataclasses.replace(own, tokenizer=chat)
    context = talking.read("some words ", chat=True)
    out = context.ask(["of mine"], max_new_tokens=2)
    assert chat.decode([*context.tokens]) == "<some words " and out.sequences[0].prompt_tokens == len(
        chat.encode("<some words ", special=False) + chat.encode("of mine> now", special=False)
    )
    context.save(tmp_path / "chat.kv")
    assert tokens(talking.load_context(tmp_path / "chat.kv").ask(["of mine"], max_new_tokens=2)) == tokens(out)


def test_a_file_that_says_what_cannot_be_is_refused(tmp_path):
    """In one line, though its checksum is right."""
    own, file = model("gqa"), tmp_path / "text.kv"
    own.read(TEXT).save(file)
    about, content = context_file._read(file)
    del about["digest"]
    ((_, width),) = about["pools"][0]
    keys = next(name for name in content if name.endswith(".k"))
    named = about.keys() - {"chat", "called"}  # which may be anything
    headers = [{**about, key: value} for key in named for value in (-1, "x", [], {}, float("inf"))]
    headers += [{**about, "pools": pools} for pools in ([[[2**40, width]]], [[[10**8, width]]], [[[]]])]
    headers += [{**about, "dtypes": about["dtypes"] | {name: "V4"}} for name in ("tokens", "logits", keys)]
    cases = [(header, content) for header in headers]
    cases += [(about, content | {keys: content[keys].reshape(shape)}) for shape in (-1, (1, -1))]
    cases += [(about, content | {"tokens": x}) for x in (content["tokens"][None], content["tokens"] + 97)]

    def write(header: str, arrays: dict[str, np.ndarray]) -> None:
        file.write_bytes(safetensors.numpy.save(arrays, {context_file.HEADER: header}))

    for header, arrays in cases:
        write(json.dumps(header | {"digest": context_file._digest(header, arrays)}), arrays)
        with pytest.raises(InputError):
            own.load_context(file)
    for header in ("[" * 100_000, "null", "3"):
        write(header, content)
        with pytest.raises(InputError):
            own.load_context(file)


def test_a_context_lies_on_one_device(tmp_path):
    kvjax.load().read([1, 2, 3]).save(tmp_path / "text.kv")
    split = kvjax.load(mesh="data=1")
    for use in (lambda: split.read([1]), lambda: split.load_context(tmp_path / "text.kv")):
        with pytest.raises(InputError, match="one device"):
            use()


def test_threads_save_contexts_side_by_side(tmp_path):
    own = model("gqa")
    contexts = [own.read(text(length, 0)) for length in (10, 12, 14)]

    def save(context: Context) -> None:
        for _ in range(5):
            context.save(tmp_path / str(len(context.tokens)))

    threads = [threading.Thread(target=save, args=(context,)) for context in contexts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "12", "14"]
    for context in contexts:
        assert own.load_context(tmp_path / str(len(context.tokens))).tokens == context.tokens


def test_a_save_that_is_killed_leaves_the_old_file(tmp_path):
    """And what it leaves beside it goes with the next save; what somebody else is writing stays."""
    own, file = model("gqa"), tmp_path / "text.kv"
    context = own.read(TEXT)
    context.save(file)
    killed = "import os, sys, pathlib; from kvjax.files import output; os.fsync = lambda file: os.kill(os.getpid(), 9);"
    killed += "output.write(pathlib.Path(sys.argv[1]), b'x' * 10**6)"
    done = subprocess.run([sys.executable, "-c", killed, str(file)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.glob(".kvjax-*.partial")
    assert left.stat().st_size == 10**6 and own.load_context(file).tokens == context.tokens
    writing, fifo = tmp_path / ".kvjax-1-1.partial", tmp_path / ".kvjax-1-2.partial"
    os.mkfifo(fifo)
    with writing.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        context.extend([1]).save(file)
    assert sorted(tmp_path.iterdir()) == [writing, fifo, file] and len(own.load_context(file).tokens) == len(TEXT) + 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--prompt a --save-context a.kv --json", "give --save-context a --question"),
        ("--prompt a --save-context a.kv --dump-cache a.npz", "give --save-context a --question"),
        ("--prompt a --question b --save-context a.kv --dump-cache a.kv", "another name"),
        ("--context a.kv --question b --dump-cache a.kv", "another name"),
        ("--context a.kv --question b --set window=4", "of its own"),
    ],
)
def test_flags_that_contradict_each_other(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        generate.main(flags.split())
