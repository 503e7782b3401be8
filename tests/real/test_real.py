"""Real models from GGUF files say what transformers says; `make_expected.py` has asked it.

The files are in the folder `$KVJAX_REAL_MODELS`; those that are not there are skipped.
"""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import pytest

import kvjax
from kvjax.checkpoint.convert import convert
from kvjax.generation.chat import Chat
from tests.real.make_expected import FILE, NEW, PROMPTS

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("optimized")]
EXPECTED = json.loads(FILE.read_text())
TEXTS = [
    "Hello world, it's 12345 tokens; WE'LL see!",
    " two  spaces ",
    "naïve café",
    "你好，世界 한국어 مرحبا",
    "🙂 👩‍👩‍👧",
    "a\nb\tc\n\n\n   d",
    "def f(x):\n    return x**2 # $3.14\n",
    "<|im_start|>user\nhi<|im_end|>",
]


@pytest.fixture(scope="module", params=PROMPTS)
def file(request) -> Path:
    path = Path(os.environ.get("KVJAX_REAL_MODELS", "")) / request.param
    if not path.is_file():
        pytest.skip(f"{request.param} is not in the folder $KVJAX_REAL_MODELS")
    return path


@pytest.fixture(scope="module")
def model(file) -> kvjax.Model:
    return kvjax.load(file, dtype=jnp.float32)


def greedy(model: kvjax.Model, name: str, method: str, budget=None) -> list[list[int]]:
    """What the model says to the prompts, all of them in one batch."""
    prompts = [case["ids"] for case in EXPECTED[name]]
    out = model.generate(prompts, method, budget, max_new_tokens=NEW, max_length=128)
    return [sequence.tokens for sequence in out.sequences]


def test_prompts_are_cut_as_transformers_cuts_them(file, model):
    chat, _ = PROMPTS[file.name]
    for case in EXPECTED[file.name]:
        messages = [{"role": "user", "content": case["prompt"]}]
        ids = model.tokenizer.chat(messages) if chat else model.tokenizer.encode(case["prompt"])
        assert ids == case["ids"]


def test_greedy_tokens_are_those_of_transformers(file, model):
    expected = [case["tokens"] for case in EXPECTED[file.name]]
    assert greedy(model, file.name, "full") == expected
    assert greedy(model, file.name, "h2o", 128) == expected  # nothing has to leave


def test_compressed_caches_are_close_to_the_full_one(file, model):
    cases = EXPECTED[file.name]
    prompts, said = ([case[what] for case in cases] for what in ("ids", "tokens"))
    divergence, _ = model.divergence(prompts, said, "full+store=int8")
    assert max(kl.mean() for kl in divergence) < 2e-3
    assert all(len(tokens) > 1 for tokens in greedy(model, file.name, "h2o", "50%"))


def test_ten_turns_are_one_long_prompt(file, model, tmp_path):
    """Each reads what is new and compiles nothing; a conversation that was saved goes on with the same tokens."""
    if not model.tokenizer.has_template:
        pytest.skip("no chat model")
    words = [case["prompt"] for case in EXPECTED[file.name]]
    chat, loaded = Chat(model, max_length=512), None
    for turn, said in enumerate([*words, *reversed(words)]):
        before = 0 if chat.context is None else len(chat.context.tokens)
        out, chat = chat.say(said, max_new_tokens=12)
        assert before + chat.read == out.sequences[0].prompt_tokens and chat.context is not None
        assert turn == 0 or (chat.read < 40 and out.timing.compile_s == 0)
        if turn == 4:
            chat.save(tmp_path / "talk.kv")
            loaded = Chat.load(model, tmp_path / "talk.kv")
        elif loaded is not None:
            same, loaded = loaded.say(said, max_new_tokens=12)
            assert same.sequences == out.sequences
        answer = out.sequences[0].tokens
        whole = model.generate([chat.context.tokens[: -len(answer)]], max_new_tokens=12, max_length=512)
        assert whole.sequences[0].tokens == answer


def test_the_converted_checkpoint_says_the_same(file, model, tmp_path):
    convert(str(file), tmp_path / "dst")
    found = kvjax.load(tmp_path / "dst", dtype=jnp.float32)
    assert found.stop == model.stop
    assert greedy(found, file.name, "full") == [case["tokens"] for case in EXPECTED[file.name]]
    assert [found.tokenizer.encode(text) for text in TEXTS] == [model.tokenizer.encode(text) for text in TEXTS]


def test_texts_are_cut_as_transformers_cuts_them(file, model):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in TEXTS:
        assert model.tokenizer.encode(text) == tokenizer(text)["input_ids"], text
