"""Stop strings against brute force: decode all tokens so far, and look for the strings."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from kvjax.errors import InputError
from kvjax.generation import stopping
from kvjax.generation.model import Model
from kvjax.generation.sampling import Sampling
from kvjax.generation.steps import drain
from kvjax.generation.stopping import Stops, Text
from tests.lib import oracle
from tests.test_tokenizer import STYLES, write

PROMPTS = [[1, 2, 3], [7], [9, 8, 7, 6]]
DRAWN = Sampling(temperature=3.0, seed=5)


@pytest.fixture(scope="module", params=STYLES)
def model(request, tmp_path_factory):
    """Random weights and a real tokenizer: nonsense, with halves of characters and all kinds of spaces."""
    tokenizer = write(STYLES[request.param](), tmp_path_factory.mktemp(request.param))
    return Model(oracle.random_model(3, num_layers=1, vocab_size=len(tokenizer)), tokenizer, (), request.param)


def brute(tokenizer, tokens, strings) -> tuple[int, str, bool]:
    """Tokens up to the one that completes a stop string, the text before it, and whether there is one."""
    for n in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:n])
        if found := [text.find(string) for string in strings if string in text]:
            return n, text[: min(found)], True
    return len(tokens), tokenizer.decode(tokens), False


def drawn_strings(text: str, seed: int) -> list[str]:
    """Two pieces of a text, one of which may be longer than it, and what it does not have."""
    draw = random.Random(seed)
    pieces = [text[at : at + draw.randint(1, 5)] for at in draw.choices(range(len(text)), k=2)]
    return [pieces[0], pieces[1] + draw.choice(["", "a"]), "hello world"]


def test_texts_end_where_brute_force_says(model):
    free = model.generate(PROMPTS, max_new_tokens=60, sampling=DRAWN)
    model.generate(PROMPTS, max_new_tokens=60, sampling=DRAWN, stop=["warm"])
    ended = 0
    for seed in range(12):
        strings = drawn_strings(free.sequences[seed % 3].text or "", seed)
        texts, shown = [Text(model.tokenizer, Stops((), tuple(strings))) for _ in PROMPTS], [""] * len(PROMPTS)

        def show(i, token, texts=texts, shown=shown):
            shown[i] += texts[i].push(token)

        out = model.generate(PROMPTS, max_new_tokens=60, sampling=DRAWN, stop=strings, on_token=show)
        assert out.timing.compile_s == 0
        for i, sequence in enumerate(out.sequences):
            count, text, stopped = brute(model.tokenizer, free.sequences[i].tokens, strings)
            assert (sequence.tokens, sequence.text) == (free.sequences[i].tokens[:count], text)
            assert sequence.finish_reason == ("stop" if stopped else "length")
            assert shown[i] + texts[i].held == text
            assert out.slots[i] == [len(PROMPTS[i]) + count - 1]  # nothing is read beyond the stop string
            ended += stopped
    assert ended > 12


@settings(max_examples=200)
@given(st.data())
def test_nothing_of_a_stop_string_is_shown(model, data):
    """What is shown at any time is a beginning of the text; and each token that completes a string is looked at."""
    ids = data.draw(st.lists(st.integers(0, len(model.tokenizer) - 1), max_size=30))
    text = model.tokenizer.decode(ids)
    cuts = st.tuples(st.integers(0, max(len(text) - 1, 0)), st.integers(1, 6)).map(lambda c: text[c[0] : sum(c)])
    strings = tuple(data.draw(st.lists(cuts | st.text("ab é\n\ufffd", min_size=1, max_size=3), max_size=3)))
    strings = tuple(string for string in strings if string)
    count, text, stopped = brute(model.tokenizer, ids, strings)
    shown, so_far = Text(model.tokenizer, Stops((), strings)), ""
    for token in ids:
        so_far += shown.push(token)
        assert text.startswith(so_far)
    assert (so_far + shown.held, shown.stopped) == (text, stopped)
    if stopped:
        assert stopping.completing(model, strings)[ids[count - 1]]


def test_contexts_and_questions_stop_too(model):
    context = model.read(PROMPTS[2], "h2o", 16)
    free, _ = context.generate(max_new_tokens=40, sampling=DRAWN)
    tokens = free.sequences[0].tokens
    string = free.sequences[0].text[8:11]
    count, text, _ = brute(model.tokenizer, tokens, [string])
    out, after = context.generate(max_new_tokens=40, sampling=DRAWN, stop=[string])
    assert (out.sequences[0].tokens, out.sequences[0].text) == (tokens[:count], text)
    assert after.tokens == (*PROMPTS[2], *tokens[:count])
    free = context.ask([[3], [4]], max_new_tokens=40, sampling=DRAWN)
    string = free.sequences[1].text[4:6]
    asked = context.ask([[3], [4]], max_new_tokens=40, sampling=DRAWN, stop=[string])
    for sequence, whole in zip(asked.sequences, free.sequences, strict=True):
        count, text, _ = brute(model.tokenizer, whole.tokens, [string])
        assert (sequence.tokens, sequence.text) == (whole.tokens[:count], text)


def test_streams_join_to_the_text(model):
    """And return what `generate` does."""
    whole = model.generate([PROMPTS[0]], max_new_tokens=40, sampling=DRAWN).sequences[0]
    for stop in ([], [whole.text[9:12]]):
        out = model.generate([PROMPTS[0]], max_new_tokens=40, sampling=DRAWN, stop=stop)
        pieces = []
        same = drain(model.stream(PROMPTS[0], max_new_tokens=40, sampling=DRAWN, stop=stop), pieces.append)
        assert "".join(pieces) == out.sequences[0].text and all(pieces)
        assert same.sequences == out.sequences
    context = model.read(PROMPTS[0])
    asked = context.ask([[5]], max_new_tokens=40, sampling=DRAWN).sequences[0].text
    assert "".join(context.stream([5], max_new_tokens=40, sampling=DRAWN)) == asked
    bare = Model(model.decoder, None, (), "bare")
    ids = [int(piece) for piece in bare.stream(PROMPTS[0], max_new_tokens=40, sampling=DRAWN)]
    assert ids == whole.tokens


def test_a_special_token_is_a_stop_token(model):
    """Texts do not show it."""
    free = model.generate([[1]], max_new_tokens=3000, max_length=4096, sampling=DRAWN).sequences[0]
    special = model.tokenizer._backend.token_to_id("</s>")
    assert special in free.tokens
    out = model.generate([[1]], max_new_tokens=3000, max_length=4096, sampling=DRAWN, stop=["</s>"]).sequences[0]
    assert out.tokens == free.tokens[: free.tokens.index(special) + 1] and out.finish_reason == "stop"


def test_what_is_no_stop_string(model):
    for stop, message in (("a", "give a list"), ([""], "empty"), ([3], "stop")):
        with pytest.raises((InputError, TypeCheckError), match=message):  # or the type checker, if it is on
            model.generate([[1]], stop=stop)
    with pytest.raises(InputError, match="no tokenizer"):
        Model(model.decoder, None, (), "bare").generate([[1]], stop=["a"])
