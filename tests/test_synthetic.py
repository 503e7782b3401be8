"""The synthetic tasks: published wordings and definitions, lengths, scores, and what a sample depends on."""

import collections
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.checkpoint import shipped
from kvjax.corpus import data
from kvjax.errors import InputError
from kvjax.models.tokenizer import Tokenizer
from kvjax.tasks import aggregation, needles, retrieval, synthetic, vocabulary, words
from kvjax.tasks import lines as demo_lines
from kvjax.tasks.facts import facts
from kvjax.tasks.task import Form, Request, Sample, Task

FACTORIES: list[Callable[..., Task]] = [
    retrieval.lines, retrieval.needle, retrieval.passkey, retrieval.niah_single, retrieval.niah_multikey,
    retrieval.niah_multivalue, retrieval.niah_multiquery, aggregation.variable_tracking, aggregation.common_words,
    aggregation.frequent_words,
]  # fmt: skip
SEVERAL = [facts(), facts(5, 3), retrieval.niah_multikey(questions=4), retrieval.niah_multikey("needle", questions=2)]
TASKS = [factory() for factory in FACTORIES] + [
    retrieval.lines(3), retrieval.niah_single("essay", "words", "uuids"), retrieval.niah_multikey("needle"),
    facts(questions=1), aggregation.variable_tracking(chains=3, hops=2), aggregation.common_words(3, example=False),
]  # fmt: skip
TOKENIZER = Tokenizer.load(shipped.directory())
TEXT = Path(inspect.getfile(synthetic)).with_name("text.txt").read_text("utf-8")
FORMS: list[Form] = ["short", "natural"]


def of_demo(text: str) -> list[int]:
    assert TOKENIZER is not None
    return TOKENIZER.encode(text, special=False)


def of_characters(text: str) -> list[int]:
    return list(map(ord, text))


def of_words(text: str) -> list[int]:
    return [len(word) for word in re.findall(r"\w+|\s|[^\w\s]", text)]


def ask(
    task: Task, form: Form = "natural", samples: int = 2, length: int = 1500, encode=of_words, seed: int = 0,
    frame: int = 1, text: str = TEXT,
) -> list[Sample]:  # fmt: skip
    return task.samples(Request(samples, seed, (length,), form, encode, frame, text, None))


def prompt(sample: Sample) -> str:
    assert isinstance(sample.context, str) and isinstance(sample.question, str)
    return sample.context + sample.question + sample.prefix


# Published wording

LONGEVAL = """Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and \
contains a '<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its \
corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding \
<REGISTER_CONTENT> of a certain line index. Now the record start:

line energetic-patron: REGISTER_CONTENT is <10438>
line torpid-kid: REGISTER_CONTENT is <2416>
line overrated-lamb: REGISTER_CONTENT is <44293>

Now the record is over. Tell me what is the <REGISTER_CONTENT> in line torpid-kid? I need the number."""

MULTIKEY_3 = """A special magic uuid is hidden within the following text. Make sure to memorize it. I will quiz you \
about the uuid afterwards.
One of the special magic uuids for 1e9b23bc-50c7-4006-b14d-3441b8a6171f is: c31edbbc-f36c-462b-892e-6161be2d740a.
One of the special magic uuids for 455ac762-7428-4656-b3ee-4d3b5a104129 is: 1ee34dc4-3b04-4a8b-805b-fdc94e7ed827.
What is the special magic uuid for 455ac762-7428-4656-b3ee-4d3b5a104129 mentioned in the provided text? The special \
magic uuid for 455ac762-7428-4656-b3ee-4d3b5a104129 mentioned in the provided text is"""

# RULER, scripts/data/synthetic/constants.py: template + answer_prefix
VT = """Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: \
Find all variables that are assigned the value {query} in the text above. Answer: According to the chain(s) of \
variable assignment in the text above, {num_v} variables are assigned the value {query}, they are: """
CWE = """Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that \
appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words \
that appear most often in the list are:"""
FWE = """Read the following coded text and track the frequency of each coded word. Find the three most frequently \
appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the \
three most frequently appeared words in the above coded text? Answer: According to the coded text above, the three \
most frequently appeared words are:"""
MULTIQUERY = """Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz \
you about the numbers afterwards.\n{context}\nWhat are all the special magic numbers for {query} mentioned in the \
provided text? The special magic numbers for {query} mentioned in the provided text are"""
PASSKEY = """There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz \
you about the important information there.\n{before}The pass key is {key}. Remember it. {key} is the pass key.\n{after}\
What is the pass key? The pass key is"""


def matches(template: str, text: str) -> dict[str, str]:
    """The fields of a template that make it the text; each field may be repeated."""
    pattern, seen = "", set()
    for part in re.split(r"(\{\w+\})", template):
        name = part[1:-1]
        if not re.fullmatch(r"\{\w+\}", part):
            pattern += re.escape(part)
        else:
            pattern += f"(?P={name})" if name in seen else f"(?P<{name}>.*?)"
            seen.add(name)
    found = re.fullmatch(pattern, text, re.DOTALL)
    assert found, text
    return found.groupdict()


def test_lines_have_longevals_wording() -> None:
    """Excerpt of LongEval's testcases, 200_lines.jsonl, first prompt, without the space at its end."""
    content = retrieval.Registers(["energetic-patron", "torpid-kid", "overrated-lamb"], [10438, 2416, 44293], 1)
    written = retrieval.write_registers(content)
    assert written.context + written.question + written.prefix == LONGEVAL
    assert written.answers == ["2416"]


def test_needles_have_rulers_wording() -> None:
    """Excerpt of a prompt made by RULER: niah_multikey_3, 4096 tokens, first prompt."""
    keys = ["1e9b23bc-50c7-4006-b14d-3441b8a6171f", "455ac762-7428-4656-b3ee-4d3b5a104129"]
    values = ["c31edbbc-f36c-462b-892e-6161be2d740a", "1ee34dc4-3b04-4a8b-805b-fdc94e7ed827"]
    content = needles.Needles(keys, [[value] for value in values], [1])
    written = needles.write_needles("natural", content, "uuids", [], [])
    assert written.context + written.question + written.prefix == MULTIKEY_3
    assert written.answers == values[1:]


def test_aggregations_and_pass_key_have_their_wording() -> None:
    sample = ask(aggregation.variable_tracking(example=False))[0]
    assert matches(VT, prompt(sample))["num_v"] == "5"
    matches(CWE, prompt(ask(aggregation.common_words(example=False))[0]))
    matches(FWE, prompt(ask(aggregation.frequent_words())[0]))
    sample = ask(retrieval.niah_multiquery())[0]
    query = matches(MULTIQUERY, prompt(sample))["query"]
    assert re.fullmatch(r"([a-z]+-[a-z]+, ){3}and [a-z]+-[a-z]+", query)
    sample = ask(retrieval.passkey())[0]
    fields = matches(PASSKEY, prompt(sample))
    assert re.fullmatch(r"[1-5]\d{4}", fields["key"]) and sample.answers == (fields["key"],)
    noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
    assert (fields["before"] + fields["after"]).replace(noise, "") == ""


def test_examples_are_answered_prompts() -> None:
    """RULER: an example ends in its answers and stands before the prompt, which keeps its wording."""
    example, text = prompt(ask(aggregation.variable_tracking())[0]).split("\n\nMemorize")
    head = example[: example.rindex("they are: ") + len("they are: ")]
    fields = matches(VT, head)
    assert resolve(fields["context"], fields["query"]) == example.removeprefix(head).split()
    assert all(len(name) == 3 for name in example.removeprefix(head).split())
    matches(VT, "Memorize" + text)
    example, text = prompt(ask(aggregation.common_words())[0]).split("\nBelow")
    head = example[: example.rindex("are:") + len("are:")]
    counts = collections.Counter(re.findall(r"\d+\. (\w+)", matches(CWE, head)["context"]))
    assert sorted(counts.values()) == [1] * 10 + [3] * 10
    answer = re.findall(r" (\d+)\. (\w+)", example.removeprefix(head))
    assert [number for number, _ in answer] == [str(number) for number in range(1, 11)]
    assert {word for _, word in answer} == {word for word, count in counts.items() if count == 3}
    matches(CWE, "Below" + text)


# Definitions

NEEDLE = re.compile(r"One of the special magic (?:numbers|uuids) for (\S+) is: (\S+)\.")


@pytest.mark.parametrize(
    ("task", "keys", "each", "asked"),
    [
        (retrieval.niah_single(), 1, 1, 1),
        (retrieval.niah_single("essay", values="uuids"), 1, 1, 1),
        (retrieval.niah_multikey(), 4, 1, 1),
        (retrieval.niah_multikey(needles=7), 7, 1, 1),
        (retrieval.niah_multivalue(), 1, 4, 1),
        (retrieval.niah_multiquery(), 4, 1, 4),
        (retrieval.needle(), 1, 1, 1),
    ],
)
def test_haystacks_hide_what_ruler_says(task: Task, keys: int, each: int, asked: int) -> None:
    for sample in ask(task, samples=4):
        found = NEEDLE.findall(str(sample.context))
        assert len(found) == keys * each and len({value for _, value in found}) == keys * each
        assert collections.Counter(key for key, _ in found) == dict.fromkeys([key for key, _ in found], each)
        assert len(sample.answers) == asked * each
        for answer in sample.answers:
            assert str(sample.context).count(answer) == 1
        queried = re.findall(r"[a-z]+-[a-z]+", str(sample.question))
        assert len(queried) == asked
        assert [value for query in queried for key, value in found if key == query] == list(sample.answers)
    short = ask(task, "short", samples=4, length=1024, encode=of_demo)
    for sample in short:
        found = re.findall(r"^(\w+:)( \d{3,4} \d{3,4})$", str(sample.context), re.MULTILINE)
        assert len(found) == keys * each
        queried = re.findall(r"\w+:", str(sample.question))
        assert len(queried) == asked
        assert [value for query in queried for key, value in found if key == query] == list(sample.answers)


ANY_NEEDLE = {
    "short": re.compile(r"^(\w+:)( \d+ \d+)$", re.MULTILINE),
    "natural": re.compile(r"(?:magic numbers for|secret code of the) (.*?) is:? (\S+)\."),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("task", SEVERAL)
def test_questions_about_one_context(task: Task, form: Form) -> None:
    """Each for another needle of the same text, which is as long as the longest of them leaves room for."""
    encode = of_demo if form == "short" else of_words
    samples = ask(task, form, samples=3, length=1000, encode=encode)
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.index, []).append(sample)
    assert list(groups) == [0, 1, 2] and len({group[0].context for group in groups.values()}) == 3
    for group in groups.values():
        assert [sample.asked for sample in group] == list(range(len(samples) // 3)) and len(group) > 1
        (context,) = {sample.context for sample in group}
        hidden = ANY_NEEDLE[form].findall(context)
        assert len(hidden) == len(dict(hidden)) >= len(group)
        assert len({sample.answers for sample in group}) == len(group)
        for sample in group:
            assert [(value,) for key, value in hidden if f"{key} " in sample.question + " "] == [sample.answers]
        assert 780 < 1 + max(len(encode(prompt(sample))) + sample.new for sample in group) <= 1000


@pytest.mark.parametrize("kind", ["words", "uuids"])
def test_a_haystack_of_needles_has_distinct_keys(kind: needles.Kind) -> None:
    sample = ask(retrieval.niah_multikey("needle", kind, "uuids"))[0]
    rows = str(sample.context).splitlines()[1:]
    found = [NEEDLE.fullmatch(row) for row in rows]
    table = {match[1]: match[2] for match in found if match}
    assert len(table) == len(rows) == sample.facts["lines"] and len(rows) > 10
    asked = re.search(r"for (\S+) mentioned", str(sample.question))
    assert asked and (table[asked[1]],) == sample.answers
    assert list(table).index(asked[1]) == round(float(sample.facts["depth"]) * (len(rows) - 1))


@pytest.mark.parametrize("form", FORMS)
def test_needles_are_at_their_depth(form: Form) -> None:
    samples = ask(retrieval.needle(depths=5), form, samples=6, length=6000, encode=of_characters)
    assert [sample.facts["depth"] for sample in samples] == [0, 0.25, 0.5, 0.75, 1, 0]
    for sample in samples:
        text = str(sample.context)
        start = 0 if form == "short" else text.index("\n") + 1
        pattern = re.escape(str(sample.question)[2:]) + ".*" if form == "short" else NEEDLE.pattern
        needle = re.search(pattern, text)
        assert needle
        haystack = len(text) - start - len(needle[0])
        assert abs((needle.start() - start) / haystack - float(sample.facts["depth"])) < 201 / haystack  # a sentence
        assert sample.facts["length"] == 6000
    assert ask(retrieval.needle(depths=1))[0].facts["depth"] == 0.5


@pytest.mark.parametrize("text", ["x" * 5000, "a b " * 900, "One. Two! Three? " * 50, "é" * 399 + " end."])
def test_any_text_is_a_haystack(text: str) -> None:
    pieces = synthetic.essay(np.random.default_rng(0), "natural", text, 40)
    assert max(map(len, pieces)) <= 403 and all(piece.endswith(" ") for piece in pieces)
    assert set("".join(pieces)) - {" "} == set(text) - {" "}


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8), depth=st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_hide_takes_the_nearest_place(lengths: list[int], depth: float) -> None:
    text = synthetic.hide(["." * length for length in lengths], ["x"], [depth])
    places = np.cumsum([0, *lengths])
    assert text.count(".") == sum(lengths) and text.index("x") in places
    off = np.abs(places - depth * sum(lengths))
    assert abs(text.index("x") - depth * sum(lengths)) <= off.min() + 1e-9


ASSIGNMENT = {"natural": r"^VAR (\w+) = (?:(\d+)|VAR (\w+) ?)$", "short": r"^(\w+:)(?:( \d+ \d+)|(\w+:))$"}


def resolve(text: str, value: str, form: Form = "natural") -> list[str]:
    """The variables that have a value, read line by line; a source that is not assigned yet is an error."""
    known: dict[str, str] = {}
    for name, direct, source in re.findall(ASSIGNMENT[form], text, re.MULTILINE):
        assert name not in known
        known[name] = direct or known[source]
    return [name for name, has in known.items() if has == value]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("chains", "hops"), [(1, 4), (3, 2), (2, 12)])
def test_chains_resolve(form: Form, chains: int, hops: int) -> None:
    task = aggregation.variable_tracking(chains, hops, example=False)
    for sample in ask(task, form, samples=3, length=1024, encode=of_demo if form == "short" else of_words):
        text, asked = str(sample.context), re.search(r"\d{5}| \d+ \d+", str(sample.question))
        assert len(re.findall(ASSIGNMENT[form], text, re.MULTILINE)) == chains * (hops + 1)
        assert asked and resolve(text, asked[0], form) == list(sample.answers)
        assert len(sample.answers) == hops + 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("length", "often", "seldom"), [(2048, 6, 1), (4096, 30, 3)])
def test_common_words_are_the_most_frequent(form: Form, length: int, often: int, seldom: int) -> None:
    for sample in ask(aggregation.common_words(example=False), form, length=length):
        pattern = r"\w+:" if form == "short" else r"(?<=\d\. )\w+"
        listed = re.findall(pattern, str(sample.context))
        common, rest = (ranked := collections.Counter(listed).most_common())[:10], ranked[10:]
        assert {word for word, _ in common} == set(sample.answers) and len(sample.answers) == 10
        assert {count for _, count in common} == {often} and {count for _, count in rest} == {seldom}
        if form == "short":
            assert sorted(sample.answers, key=listed.index) == list(sample.answers)


def test_more_common_words_than_single_ones() -> None:
    sample = ask(aggregation.common_words(300, often=4, seldom=1), samples=1, length=80000)[0]
    assert len(set(sample.answers)) == 300 and all("-" in word for word in sample.answers)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [600, 4096])
def test_frequent_words_follow_zipf(form: Form, length: int) -> None:
    for sample in ask(aggregation.frequent_words(), form, length=length):
        text = str(sample.context).removeprefix(FWE[: FWE.index("{")])
        ranked = collections.Counter(
            re.findall(r"\w+:|\." if form == "short" else r"[a-z]{6}|\.\.\.", text)
        ).most_common()
        assert ranked[0][0] in (".", "...") and [word for word, _ in ranked[1:4]] == list(sample.answers)
        assert ranked[3][1] > ranked[4][1] and len(ranked) <= (length - 50) // 50
        for rank, (_, count) in enumerate(ranked[:4], 1):
            assert abs(count - ranked[0][1] / rank**2) <= 1 + 1 / rank**2


def test_zipf_counts_are_rulers() -> None:
    """floor(1000 k^-2 / zeta(2)) with zeta(2) = pi^2 / 6: 607.93, 151.98, 67.55, 37.996, 24.3, 16.9."""
    assert aggregation.zipf_counts(6, 1000, 2.0).tolist() == [607, 151, 67, 37, 24, 16]
    assert aggregation.zipf_counts(6, 42, 2.0).tolist() == [25, 6, 2, 1, 0, 0]  # not 1 for rank 5


# Lengths


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("encode", [of_characters, of_words, of_demo])
def test_samples_fit_and_are_as_long_as_fits(form: Form, encode: Callable[[str], list[int]]) -> None:
    length, piece = 2048 if form == "short" else 4000, 200 if encode is of_words else 450
    for task in TASKS:
        for index, sample in enumerate(ask(task, form, length=length, encode=encode, frame=7)):
            used = 7 + len(encode(sample.context + sample.question + sample.prefix)) + sample.new
            all_keys = sample.facts.get("lines") in (3, vocabulary.NUM_KEYS) or task.name == "common_words"
            assert used <= length and (used > length - piece or all_keys)
            answer = len(encode("".join(sample.answers)))
            assert sample.new == answer if form == "short" else sample.new >= answer
            assert (sample.part, sample.index, sample.chat) == (str(length), index, form == "natural")


@given(least=st.integers(1, 50), most=st.integers(0, 500), length=st.integers(0, 300), frame=st.integers(0, 5))
@settings(deadline=None, max_examples=200)
def test_the_size_is_the_largest_that_fits(least: int, most: int, length: int, frame: int) -> None:
    write = lambda case, size: synthetic.Written("x" * size, "?", [" a"])  # size + 1 + 2 tokens and the frame
    task = synthetic.synthetic("toy", write, lambda form: (least, most), synthetic.match_all)
    expected = min(most, length - frame - 3)
    if expected < least:
        with pytest.raises(InputError, match="task toy"):
            ask(task, "short", length=length, encode=of_characters, frame=frame)
    else:
        assert ask(task, "short", length=length, encode=of_characters, frame=frame)[0].context == "x" * expected


def test_short_lines_are_the_demo_models_prompts() -> None:
    for length in (9, 128, 257, 1024, 4000):
        request = Request(3, 5, (length,), "short", of_demo, 1, "", None)
        for sample in retrieval.lines().samples(request):
            expected = demo_lines.prompt(request.rng("lines", str(length), sample.index), length - 2)
            assert (prompt(sample), *sample.answers) == expected
            assert str(sample.question).startswith("! ") and not sample.chat and sample.new == 2
    assert ask(retrieval.lines(20), "short")[0].facts["lines"] == 20
    assert len(re.findall("^line ", str(ask(retrieval.lines(20))[0].context), re.MULTILINE)) == 20


def test_short_forms_are_tokens_of_the_demo_model() -> None:
    """Nothing but the noise and the text of a haystack falls back to bytes."""
    for task in TASKS:
        for sample in ask(task, "short", length=1024, encode=of_demo):
            text = prompt(sample).replace(synthetic.NOISE + "\n", "")
            rows = [row for row in text.splitlines(keepends=True) if re.match(r"([a-z]+:|\.)+\n|[a-z]+: \d|!", row)]
            odd = [token for row in rows for token in of_demo(row) if token < vocabulary.ASK]
            assert rows and set(odd) <= {vocabulary.NEWLINE, vocabulary.BYTE + ord(".")}


# What a sample depends on


@pytest.mark.parametrize("form", FORMS)
def test_samples_depend_on_seed_and_index_only(form: Form) -> None:
    for task in TASKS:
        ten, three = ask(task, form, samples=10, length=700 if form == "short" else 3000), None
        three = ask(task, form, samples=3, length=700 if form == "short" else 3000)
        assert ten[:3] == three
        assert len({prompt(sample) for sample in ten}) == 10
        assert prompt(ask(task, form, 1, 700 if form == "short" else 3000, seed=1)[0]) != prompt(ten[0])


def test_no_seed_is_shared_with_the_demo_model() -> None:
    request = Request(1, 0, (128,), "short", of_demo, 1, TEXT, None)
    entropy = lambda rng: rng.bit_generator.seed_seq.entropy[0]
    seeds = [
        request.rng("lines", "128", 0),
        data.training_rng(0, 0),
        data.held_out_rng(0, 0),
        demo_lines.scoring_rng(0),
    ]
    assert len({entropy(rng) for rng in seeds}) == 4


# Scores


def sample_with(*answers: str, chat: bool = True) -> Sample:
    return Sample("1", 0, "", answers=answers, chat=chat)


@pytest.mark.parametrize(
    ("text", "answers", "score"),
    [
        (" 123, 456 and 789.", ("123", "456", "000", "789"), 0.75),
        ("ABCDE fghij", ("abcde", "FGHIJ"), 1),
        ("", ("1",), 0),
        ("it is\n7654321", ("7654321",), 1),
    ],
)
def test_ruler_scores_the_fraction_found(text: str, answers: tuple[str, ...], score: float) -> None:
    """RULER's string_match_all, by hand."""
    for task in (retrieval.niah_multivalue(), aggregation.variable_tracking(), aggregation.frequent_words()):
        assert callable(task.metric) and task.metric(text, sample_with(*answers)) == score


def test_numbers_are_parsed_as_published() -> None:
    """LongEval takes the last number of the output, the pass key is the first."""
    lines, passkey, sample = retrieval.lines().metric, retrieval.passkey().metric, sample_with("2416")
    assert callable(lines) and callable(passkey)
    cases = {"<2416>": (1, 1), "In line 7 it is 2416.": (1, 0), "2416, not 7": (0, 1), "none": (0, 0), "24160": (0, 0)}
    for text, expected in cases.items():
        assert (lines(text, sample), passkey(text, sample)) == expected


def test_short_answers_are_exact_or_counted() -> None:
    one, two = sample_with(" 217 130", chat=False), sample_with(" 217 130", " 305 111", chat=False)
    for task in TASKS:
        assert callable(task.metric)
        cases = {" 217 130": 1, " 217 130\nriver:": 1, " 217 131": 0, " 217 130 305": 0, "\n 217 130": 0, "": 0}
        assert {text: task.metric(text, one) for text in cases} == cases
        cases = {" 217 130 305 111": 1, " 217 130 305 112": 0.5, " 217 130\n 305 111": 0.5, " 217": 0}
        assert {text: task.metric(text, two) for text in cases} == cases


# Words and errors


def test_words_are_distinct() -> None:
    lists = [*words.ADJECTIVES, *words.VERBS, *words.nouns()]
    assert len(set(lists)) == len(lists) and all(re.fullmatch("[a-z]+", word) for word in lists)
    single = words.single()
    assert not [(a, b) for a in single for b in single if a != b and a in b]
    rng = np.random.default_rng(0)
    for drawn in (words.pairs(rng, 5000), words.letters(rng, 5000, 3)):
        assert len(set(drawn)) == 5000
    assert set("".join(words.letters(rng, 500, 6))) == set("abcdefghijklmnopqrstuvwxyz")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: retrieval.needle(depths=0), "needle: depths=0"),
        (lambda: retrieval.lines(-1), "count=-1"),
        (lambda: retrieval.lines(10**6), "count=1000000"),
        (lambda: retrieval.niah_multikey(needles=41), "41 needles"),
        (lambda: retrieval.niah_multikey(questions=5), "questions=5 is more than needles=4"),
        (lambda: facts(0), "facts: count=0"),
        (lambda: facts(3, 4), "3 facts and 4 questions"),
        (lambda: retrieval.niah_multiquery(queries=0), "queries=0"),
        (lambda: synthetic.one_of("needle", "haystack", "hay", needles.Haystack), "haystack=hay is not one of noise"),
        (lambda: retrieval.niah_multivalue(needles=0), "needles=0"),
        (lambda: aggregation.variable_tracking(chains=0), "chains=0"),
        (lambda: aggregation.variable_tracking(hops=1100), "1101 variables"),
        (lambda: aggregation.common_words(often=2, seldom=2), "often=2"),
        (lambda: aggregation.common_words(often=10**9), "often=1000000000 or seldom=0 is too large"),
        (lambda: aggregation.frequent_words(alpha=1.0), "alpha=1.0"),
        (lambda: ask(retrieval.lines(1100), "short"), "1100 is more than the 1024 keys"),
        (lambda: ask(retrieval.needle(), text=" "), "empty"),
        (lambda: ask(retrieval.passkey(), length=20), "passkey does not fit into 20 tokens"),
    ],
)
def test_errors_are_one_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
