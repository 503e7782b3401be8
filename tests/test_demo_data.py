"""What the demo model learns from: its text, its tokens, its documents."""

import collections
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.corpus import data, documents, sources, tokens
from kvjax.corpus.documents import Passage
from kvjax.tasks import lines as demo_lines
from kvjax.tasks import vocabulary as v
from kvjax.tasks.registry import make_task
from kvjax.tasks.task import EVALUATION, Request

ROOT = Path(__file__).parents[1]
HAYSTACK = "The haystack of the tests.\nIt has a few lines, and none of them is a needle.\n" * 9
ASKING = [kind for kind in data.KINDS if kind != "text"]
MARKED = [kind for kind in ASKING if kind not in ("copy", "patterns")]


@pytest.fixture(autouse=True)
def small_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents from a text that takes no time to read."""
    small = documents.Source(HAYSTACK, [HAYSTACK], np.array([len(HAYSTACK)]))
    monkeypatch.setattr(documents, "source", lambda split: small)


def written(kind: str, seed: int, size: int = 512) -> str:
    """A held-out document as text, BOS and EOS left out."""
    ids, _ = data.one(kind, data.held_out_rng(seed, 0), int(size * 0.6), size)
    assert ids[0] == v.BOS and ids[-1] == v.EOS and len(ids) <= size + 1
    return tokens.tokenizer().decode(ids[1:-1].tolist())


# Tokens


@given(text=st.text())
@settings(deadline=None)
def test_any_text_survives(text: str) -> None:
    ids = tokens.tokenizer().encode(text).ids
    assert ids[0] == v.BOS and v.EOS not in ids
    assert tokens.tokenizer().decode(ids) == text


@given(text=st.text(st.characters(max_codepoint=127, exclude_characters="\r\x0b\x0c\x1c\x1d\x1e")), lines=st.data())
@settings(deadline=None)
def test_training_tokens_are_the_tokenizers(text: str, lines: st.DataObject) -> None:
    some = lines.draw(st.lists(st.sampled_from(["! ", "? ", "\n", "river:", " 217", " 12", "  ", ".", "x"])))
    for whole in (text, "".join(some)):
        assert tokens.encode(whole) == tokens.tokenizer().encode(whole, add_special_tokens=False).ids


def test_vocabulary_keeps_the_pieces_of_the_tasks() -> None:
    backend = tokens.tokenizer()
    assert backend.get_vocab_size() == tokens.SIZE == 4096
    assert {token: backend.token_to_id(token) for token in v.vocabulary()} == v.vocabulary()
    pieces = ["! ", "? ", *v.keys(), *(v.number(n) for n in range(v.NUM_NUMBERS)), "\n"]
    assert all(len(tokens.encode(piece)) == 1 for piece in pieces)
    assert len(tokens.encode("A common sentence of the library's documentation.")) < 20


def test_merges_are_learned_the_same_every_time() -> None:
    texts = [sources.sentences(np.random.default_rng(0), 500)]
    pairs = tokens.learn(texts, v.SIZE + 300)
    assert pairs == tokens.learn(texts, v.SIZE + 300)
    assert tokens.build(pairs).get_vocab_size() == v.SIZE + 300


# Text


def test_text_is_split_by_the_names_of_modules() -> None:
    training, held_out = ({module.name for module in sources.modules(split)} for split in ("training", "held-out"))
    assert training and held_out and not training & held_out
    assert len(held_out) < 0.2 * len(training)
    evaluation = (ROOT / "kvjax/tasks/text.txt").read_text("utf-8").splitlines()
    known = {line for module in sources.modules("training") for line in module.source.splitlines()}
    assert not known & {line for line in evaluation if len(line) > 30}


# Documents


@pytest.mark.parametrize("kind", data.KINDS)
@pytest.mark.parametrize("size", [64, 200, 1024])
def test_document_is_the_tokens_of_its_text(kind: str, size: int) -> None:
    for seed in range(5):
        ids, weight = data.one(kind, data.held_out_rng(seed, 1), int(size * 0.7), size)
        assert len(ids) == len(weight) <= size + 1
        text = tokens.tokenizer().decode(ids[1:-1].tolist())
        assert tokens.tokenizer().encode(text).ids == ids[:-1].tolist()
        assert (ids == v.LAST).sum() == (kind in MARKED)
        assert (weight == demo_lines.ANSWER).any() == (kind != "text") or kind == "copy"


def test_data_is_a_function_of_seed_and_step() -> None:
    first, again = (data.batch(data.training_rng(3, 5), 4, 64) for _ in range(2))
    assert first.ids.shape == first.weight.shape == (4, 65)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (data.training_rng(3, 6), data.training_rng(4, 5), data.held_out_rng(3, 5)):
        assert not np.array_equal(first.ids, data.batch(other, 4, 64).ids)


def test_no_seed_is_shared() -> None:
    entropies = [data.TRAINING, data.HELD_OUT, demo_lines.SCORING, EVALUATION]
    assert len(set(entropies)) == len(entropies)


def _request(length: int, samples: int) -> Request:
    return Request(samples, 0, (length,), "short", tokens.encode, 1, HAYSTACK, None)


@pytest.mark.parametrize(
    "task",
    "lines needle passkey niah_single niah_multikey niah_multivalue niah_multiquery variable_tracking common_words "
    "frequent_words".split(),
)
def test_evaluations_prompt_begins_a_training_document(task: str) -> None:
    for sample in make_task(task).samples(_request(512, 3)):
        asked = sample.question.removeprefix("! ")
        assert asked != sample.question
        answer = "".join(sample.answers)
        ids, weight = data.document([Passage(sample.context), Passage(asked, answer)], 600)
        prompt = tokens.tokenizer().encode(sample.context + sample.question).ids
        assert ids[: len(prompt)].tolist() == prompt
        whole = tokens.tokenizer().encode(sample.context + sample.question + answer + "\n").ids
        assert ids.tolist() == [*whole, v.EOS]
        assert np.flatnonzero(weight == demo_lines.ANSWER).tolist() == list(range(len(prompt), len(whole) - 1))


def _questions(text: str) -> tuple[str, list[str]]:
    """The context of a marked document and its questions with their answers."""
    context, *asked = re.split(r"^[?!] ", text, flags=re.MULTILINE)
    return context, asked


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["lines", "needle", "multi_value", "multi_query"])
def test_values_are_in_the_context_alone(kind: str, seed: int) -> None:
    context, asked = _questions(written(kind, seed))
    found = collections.defaultdict(str)
    for key, value in re.findall(r"^(\w+:)((?: \d{3,4}){2})\n", context, flags=re.MULTILINE):
        found[key] += value
    assert asked and set(found) <= set(v.keys())
    for question in asked:
        keys, values = re.fullmatch(r"((?:\w+:)+)((?: \d{3,4})+)\n", question).groups()  # pyright: ignore[reportOptionalMemberAccess]
        assert values == "".join(found[key] for key in re.findall(r"\w+:", keys))
        assert len(re.findall(r"\w+:", keys)) > 1 or kind != "multi_query"


@pytest.mark.parametrize("seed", range(8))
def test_chains_are_followed(seed: int) -> None:
    context, asked = _questions(written("chains", seed))
    names = dict(re.findall(r"^(\w+:)((?: \d{3,4}){2}|\w+:)\n", context, flags=re.MULTILINE))
    heirs = {source: name for name, source in names.items()}
    for question in asked:
        value, answer = question.splitlines()
        expected, at = "", value
        while at in heirs:
            at = heirs[at]
            expected += at
        assert answer == expected


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["common", "frequent"])
def test_words_are_counted(kind: str, seed: int) -> None:
    sections = re.findall(r"^(.*)\n[?!] (.*)\n", written(kind, seed), flags=re.MULTILINE)
    assert sections
    for listed, answer in sections:
        counts = collections.Counter(re.findall(r"\w+:", listed))
        answers = re.findall(r"\w+:", answer)
        least = min(counts[word] for word in answers)
        assert least > max([count for word, count in counts.items() if word not in answers], default=0)
        order = [counts[word] for word in answers] if kind == "frequent" else [-listed.index(w) for w in answers]
        assert order == sorted(order, reverse=True)


@pytest.mark.parametrize("seed", range(4))
def test_patterns_follow_one_rule(seed: int) -> None:
    for section in written("patterns", seed).split("\n\n"):
        pairs = [
            [re.findall(r"\w+", side) for side in line.split(documents.ARROW)]
            for line in section.splitlines()
            if line.count(documents.ARROW) == 1 and not line.endswith(documents.ARROW)
        ]
        obeyed = [rule for rule in documents.RULES if all(rule(given) == answer for given, answer in pairs)]
        assert obeyed


def test_copies_are_exact() -> None:
    text = written("copy", 1)
    half = text[: len(text) // 2]
    assert text == half * 2


def test_repeated_questions_count_less() -> None:
    parts = [Passage("river: 217 130\n"), Passage("river:", " 217 130"), Passage("river:", " 217 130", repeated=True)]
    _, weight = data.document(parts, 64)
    assert np.flatnonzero(weight == demo_lines.ANSWER).tolist() == [7, 8]
    assert np.allclose(weight[12:14], documents.REPEATED)
