"""`bench peers`: other libraries are given our weights and prompts, and one that is missing is a line."""

import json

import numpy as np
import pytest

from kvjax import compilation
from kvjax.bench import __main__ as bench
from kvjax.bench import llama_cpp, models, rivals, settings, shapes, turns, weights
from kvjax.checkpoint import hf
from kvjax.errors import InputError

# What it printed, with a line of llama.cpp's own before.
ANSWERS = """load: control-looking token was not control-type
{"seconds":0.006290238999999928,"tokens":[215,10,53,220]}
"""
BROKEN = """file:///node_modules/node-llama-cpp/dist/evaluator/LlamaModel/LlamaModel.js:626
                throw new Error("Failed to load model");
                      ^

Error: Failed to load model
    at LlamaModel._create (file:///node_modules/node-llama-cpp/dist/evaluator/LlamaModel/LlamaModel.js:626:23)
    at async file:///kvjax/bench/llama_cpp.mjs:11:15

Node.js v20.20.2
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(turns, "MEASURED", 1 << 16)
    monkeypatch.setattr(turns, "LEAST", 1e-6)
    monkeypatch.setattr(compilation, "enable_compilation_cache", lambda: None)


@pytest.mark.parametrize("peer", ["transformers", "llama.cpp"])
def test_a_peer_says_what_we_say(peer):
    if why := settings.missing(peer):
        pytest.skip(why)
    model = models.load("llama-tiny", "float32")
    prompts = models.prompts(model.spec, 1, 60)
    ours = model.generate(prompts.tolist(), "full", max_new_tokens=9).sequences[0].tokens
    with rivals.opened([peer], model, 100) as (reader,):
        for _ in range(2):  # a second reading begins anew
            assert reader.read(prompts) > 0 and reader.tokens == ours[:1]
            assert reader.go_on(8) > 0 and reader.tokens == ours[1:]


def test_weights_for_llama_cpp_are_ours(tmp_path):
    model = models.load("llama-tiny", "float32")
    read = hf.load(weights.write_gguf(model, tmp_path / "weights.gguf"), np.float32)
    ours, theirs = (hf.by_path(one)[0] for one in (model.decoder, read))
    assert ours.keys() == theirs.keys()
    assert all((np.asarray(ours[path]) == np.asarray(theirs[path])).all() for path in ours)


def test_answers_are_read_among_other_lines():
    assert llama_cpp.parsed(iter(ANSWERS.splitlines())) == (0.006290238999999928, [215, 10, 53, 220])
    with pytest.raises(ValueError):
        llama_cpp.parsed(iter(["llama_model_load: error loading model"]))
    assert llama_cpp.last(BROKEN) == "Error: Failed to load model"


def test_a_missing_peer_is_a_row(capsys, monkeypatch):
    monkeypatch.delenv(shapes.LLAMA_CPP, raising=False)
    flags = "--model llama-tiny --contexts 40 --rounds 1 --steps 2 --against llama.cpp,llama.cpp+q8_0 --json"
    bench.main(["peers", *flags.split()])
    (section,) = json.loads(capsys.readouterr().out)["sections"]
    full, *others = section["rows"]
    assert full["decode per_s"] > 0 and full["prefill seconds"] > 0 and 0 < full["decode of_limit"]
    assert [row["failed"].partition(" ")[0] for row in others] == [shapes.LLAMA_CPP] * 2
    with pytest.raises(InputError, match=r"--against llama\.cpp: KVJAX_LLAMA_CPP does not name"):
        bench.main(["decode", "--model", "llama-tiny", "--against", "llama.cpp"])


def test_weights_of_few_bits_are_not_written():
    with pytest.raises(InputError, match="plain weights"):
        weights.check(models.load("llama-tiny", "float32", None, "int8").spec, "--against transformers")
