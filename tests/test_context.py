"""Contexts: read once, asked often, changed by nothing."""

import dataclasses

import jax
import numpy as np
import pytest

import kvjax
from kvjax import methods
from kvjax.errors import InputError
from kvjax.generation.model import Model
from kvjax.models.tokenizer import Tokenizer
from kvjax.policies.base import Recipe
from tests import oracle
from tests.matrix import BUDGET, VARIANTS, WITH_BUDGET, decoder, model_of, quick, reference, text

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
        assert context.ask([text(9, 4), text(2, 5), text(30, 6)], max_new_tokens=20).timing.compile_s == 0
        close(
            context.extend(QUESTIONS[0]).extend(QUESTIONS[1]).logits,
            own.read(TEXT + QUESTIONS[0] + QUESTIONS[1]).logits,
        )


def test_a_context_that_grows_within_its_length_compiles_nothing():
    own = model("gqa")
    context = own.read(TEXT, "h2o", "50%", max_length=128)
    context = context.extend([1]).generate(max_new_tokens=3)[1]
    for turn in range(3):
        out, context = context.extend(text(5 + turn, turn)).generate(max_new_tokens=8)
        assert out.timing.compile_s == 0
    with pytest.raises(InputError, match="max-length"):
        own.read(TEXT, max_length=len(TEXT) - 1)


def test_questions_share_a_context():
    """Of its bytes there is one copy, and a small one of each question's."""
    context = model("gqa").read(TEXT)
    sizes = [context.ask([[1]] * n, max_new_tokens=2).bytes.total for n in (2, 4, 6)]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] and sizes[0] - (sizes[1] - sizes[0]) <= context.bytes.total + 64
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
    with pytest.raises(InputError, match="another model"):
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
        ([], "no prompt"),
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
