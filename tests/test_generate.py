"""Text in, text out: the command line and the library against golden files, and what they say to bad input."""

import dataclasses
import errno
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import TypeCheckError

import kvjax
from kvjax import compilation
from kvjax.checkpoint.convert import convert
from kvjax.cli import command
from kvjax.errors import InputError, say_once
from kvjax.files import output
from kvjax.generate import main
from kvjax.generation import sampling
from kvjax.generation.generate import cached_positions, read_prompts
from kvjax.generation.model import Model
from kvjax.generation.sampling import Sampling, chooser
from kvjax.models.hf_config import parse_config
from tests import golden
from tests.lib.matrix import quick

PROG = "kvjax.generate"
optimized = pytest.mark.usefixtures("optimized")  # as it is used
pytestmark = pytest.mark.usefixtures("shallow_demo")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A checkpoint without a tokenizer."""
    return golden.write_checkpoint("llama_gqa", tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def model(directory):
    return kvjax.load(directory)


@pytest.fixture(autouse=True)
def no_cache_folder(monkeypatch):
    monkeypatch.setattr(compilation, "enable_compilation_cache", lambda: None)


def run_json(capsys, *argv) -> dict:
    """What `--json` prints, and that it prints nothing else."""
    main([*map(str, argv), "--json"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


def ids(tokens) -> str:
    return ",".join(str(int(i)) for i in tokens)


SOME = ("falcon_7b", "gemma2", "llama3_scaling", "phi3_partial", "qwen2_window", "qwen3")


@optimized
@pytest.mark.parametrize("name", quick(golden.NAMES, SOME))
def test_greedy_tokens_and_logits_are_those_of_transformers(name, tmp_path, capsys):
    want = golden.load(name)
    checkpoint = golden.write_checkpoint(name, tmp_path / "hf")
    dump = tmp_path / "cache.npz"
    argv = ["--model", checkpoint, "--prompt-tokens", ids(want.prompt), "--temperature", 0, "--dump-cache", dump]
    out = run_json(capsys, *argv, "--max-new-tokens", len(want.greedy))
    assert out["sequences"][0]["tokens"] == want.greedy.tolist()
    with np.load(dump) as file:
        np.testing.assert_allclose(file["logits"][0], want.logits, atol=1e-4)
        kept = file["positions"][0]
    t = len(want.prompt) + len(want.greedy) - 1
    spec = parse_config(want.config)
    assert kept.shape[:2] == (spec.num_layers, spec.num_rows)
    for layer, rows in enumerate(kept):
        newest = list(range(max(t - (spec.window(layer) or t), 0), t))
        assert all(sorted(row[row >= 0].tolist()) == newest for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.NAMES)
def test_methods_run_on_every_family(name, tmp_path):
    """Prompts of unequal lengths: a budget above them keeps all, and Orbax holds the same model."""
    want, model = golden.load(name), kvjax.load(golden.write_checkpoint(name, tmp_path / "hf"))
    prompts = [want.prompt.tolist(), want.prompt[3:20].tolist()]
    run = lambda model, method="full", budget=None: model.generate(prompts, method, budget, max_new_tokens=6).sequences
    full = run(model)
    assert full[0].tokens == want.greedy[:6].tolist()
    assert [one.tokens for one in run(model, "h2o", 64)] == [one.tokens for one in full]
    assert [len(one.tokens) for one in run(model, "h2o", "25%")] == [6, 6]
    assert [len(one.tokens) for one in run(model, kvjax.methods.full(store="int8"))] == [6, 6]
    convert(str(tmp_path / "hf"), tmp_path / "orbax", None, ())
    assert [one.tokens for one in run(kvjax.load(tmp_path / "orbax", dtype="float32"))] == [one.tokens for one in full]


def test_an_orbax_checkpoint_generates_the_same(directory, tmp_path, capsys):
    convert(str(directory), tmp_path / "orbax", None, ())
    want = golden.load("llama_gqa")
    flags = ["--prompt-tokens", ids(want.prompt), "--max-new-tokens", 12]
    out = run_json(capsys, "--model", tmp_path / "orbax", *flags)
    assert out["sequences"][0]["tokens"] == want.greedy.tolist()


def test_sixteen_bits_of_either_kind_generate(directory, capsys):
    want = golden.load("llama_gqa")
    flags = ["--model", directory, "--prompt-tokens", ids(want.prompt), "--max-new-tokens", 4]
    for dtype in ("float16", "bfloat16"):
        out = run_json(capsys, *flags, "--dtype", dtype)
        assert out["dtype"] == dtype and out["cache"]["bytes"]["payload"] % 2 == 0
        if dtype == "float16":  # three more bits than bfloat16
            assert out["sequences"][0]["tokens"] == want.greedy.tolist()[:4]


def test_json_says_what_was_run(directory, capsys):
    flags = ["--model", directory, "--method", "h2o", "--budget", "25%", "--max-new-tokens", 5]
    out = run_json(capsys, *flags, "--prompt-tokens", ids(range(40)), "--prompt-tokens", ids(range(20)))
    shown = {"method", "stores", "sequences", "cache", "timing", "model", "stop", "dtype", "weights", "budget"}
    assert set(out) == shown
    assert out["stop"] == {"ids": [], "source": None}
    assert (out["method"], out["budget"], out["dtype"]) == ("h2o", "25%", "float32")
    assert [s["prompt_tokens"] for s in out["sequences"]] == [40, 20]
    assert set(out["sequences"][0]) == {"prompt_tokens", "tokens", "text", "finish_reason"}
    assert out["cache"]["slots"] == [[10] * len(out["cache"]["slots"][0]), [5] * len(out["cache"]["slots"][1])]
    half = out["cache"]["compared"]
    assert half["full"] == out["cache"]["full_bytes"] // 2  # of float32
    assert out["cache"]["share"] == half["share"] == half["cache"] / half["full"]
    size = out["cache"]["bytes"]
    assert size["total"] == sum(value for key, value in size.items() if key != "total")
    assert set(out["timing"]) == {"prefill_s", "decode_s", "decode_tokens_per_s", "compile_s"}


def test_a_config_file_and_flags_over_it(directory, tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text('method = "snapkv"\nbudget = 9\nmax_new_tokens = 3\n[arguments]\nwindow = 4\nkernel = 3\n')
    flags = ["--config", file, "--model", directory, "--prompt-tokens", ids(range(30))]
    out = run_json(capsys, *flags)
    assert (out["method"], out["budget"], len(out["sequences"][0]["tokens"])) == ("snapkv", 9, 3)
    assert run_json(capsys, *flags, "--max-new-tokens", 2, "--budget", 7)["budget"] == 7


CONFIGS = {
    "is not a number of tokens": "method = 'h2o'\nbudget = 0.5",
    "keeps nothing": "method = 'h2o'\nbudget = 0",
    "argument --dtype": "dtype = 'float64'",
    "argument --max-new-tokens: invalid int value: '2.5'": "max_new_tokens = 2.5",
    "argument --temperature: invalid float value: 'hot'": "temperature = 'hot'",
    "temperature = True is not a string or a number": "temperature = true",
    "method = ['h2o'] is not a string": "method = ['h2o']",
    "prompt = 'abc' is not a list of strings": "prompt = 'abc'",
    "json = 'false' is not true or false": "json = 'false'",
    "unknown option 'methods'": "methods = 'h2o'",
    "'arguments' is a table": "arguments = 3",
    "is not TOML": "method = ",
    "prompt_file has a null character": 'prompt_file = ["a\\u0000b"]',
}


@pytest.mark.parametrize("message", CONFIGS)
def test_a_bad_config_is_one_line_and_exit_code_2(message, directory, tmp_path, capsys):
    file = tmp_path / "bad.toml"
    file.write_text(CONFIGS[message])
    with pytest.raises(SystemExit) as exit:
        command.run(PROG, lambda: main(["--model", str(directory), "--prompt-tokens", "1", "--config", str(file)]))
    out = capsys.readouterr()
    assert exit.value.code == 2 and out.out == "" and out.err.count("\n") == 1
    assert message in out.err


def test_prompts_on_the_command_line_replace_those_of_a_config(directory, tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text("prompt_tokens = ['1,2']\nmax_new_tokens = 1")
    out = run_json(capsys, "--model", directory, "--config", file, "--prompt-tokens", "3")
    assert [s["prompt_tokens"] for s in out["sequences"]] == [1]


def test_a_dump_has_the_name_that_was_asked_for_and_an_error_leaves_none(directory, tmp_path, capsys):
    flags = ["--model", str(directory), "--prompt-tokens", "1", "--max-new-tokens"]
    run_json(capsys, *flags, 1, "--dump-cache", tmp_path / "a.b")
    with pytest.raises(kvjax.InputError, match="max-new-tokens"):
        main([*flags, "0", "--dump-cache", str(tmp_path / "c")])
    assert [file.name for file in tmp_path.iterdir()] == ["a.b"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_dump_that_cannot_be_written_is_one_line_and_the_rest_is_there(directory, tmp_path, capsys):
    flags = ["--model", str(directory), "--prompt-tokens", "1", "--max-new-tokens", "1", "--json", "--dump-cache"]
    with pytest.raises(SystemExit) as exit:
        command.run(PROG, lambda: main([*flags, "/dev/full"]))
    out = capsys.readouterr()
    assert exit.value.code == 2 and len(json.loads(out.out)["sequences"]) == 1
    assert out.err == f"{PROG}: error: cannot write /dev/full: No space left on device\n"


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "link").symlink_to("old")
    output.write(tmp_path / "link", b"new")
    assert (tmp_path / "old").read_bytes() == b"new" and (tmp_path / "link").is_symlink()

    def fill(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fill)
    with pytest.raises(InputError, match=r"cannot write .*old: No space left"):
        output.write(tmp_path / "old", b"other")
    assert (tmp_path / "old").read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 2


def test_too_little_memory_and_a_failing_disk_are_one_line(capsys):
    for error, words in (
        (MemoryError(), "not enough memory"),
        (OSError(28, "No space left", "a.txt"), "a.txt: No space"),
    ):

        def fail(error=error):
            raise error

        with pytest.raises(SystemExit) as exit:
            command.run(PROG, fail)
        err = capsys.readouterr().err
        assert exit.value.code == 2 and words in err and err.count("\n") == 1


BAD = {
    "unrecognized arguments: --bogus": ["--bogus"],
    "unknown method 'nope'": ["--method", "nope", "--prompt-tokens", "1"],
    "(did you mean snapkv?)": ["--method", "snap-kv", "--prompt-tokens", "1"],
    "store is given twice: by a flag and by --method": ["--method", "h2o+store=int4", "--store", "int8"],
    "store is given twice: by --set and by --method": ["--method", "h2o+store=int4", "--set", "store=int8"],
    "keeps nothing": ["--method", "h2o", "--budget", "0", "--prompt-tokens", "1"],
    "budget -3 tokens keeps nothing": ["--method", "h2o", "--budget=-3", "--prompt-tokens", "1"],
    "more than the whole prompt": ["--method", "h2o", "--budget", "101%", "--prompt-tokens", "1"],
    "takes no budget": ["--method", "full", "--budget", "5", "--prompt-tokens", "1"],
    "not a number of tokens": ["--method", "h2o", "--budget", "many", "--prompt-tokens", "1"],
    "has no argument 'depth'": ["--method", "h2o", "--set", "depth=3", "--prompt-tokens", "1"],
    "is not key=value": ["--method", "h2o", "--set", "recent", "--prompt-tokens", "1"],
    "is not a float": ["--method", "h2o", "--set", "recent=x", "--prompt-tokens", "1"],
    "recent=2.0 is not a share": ["--method", "h2o", "--set", "recent=2", "--prompt-tokens", "1"],
    "is not one of avg, max": ["--method", "snapkv", "--set", "pooling=sum", "--prompt-tokens", "1"],
    "kernel=4 is not an odd": ["--method", "snapkv", "--set", "kernel=4", "--prompt-tokens", "1"],
    "the prompt is empty": ["--prompt-tokens", ""],
    "not a list of ids": ["--prompt-tokens", "1,b"],
    "token id 97 is not in the vocabulary (0 to 96)": ["--prompt-tokens", "1,97"],
    "token id -1 is not in": ["--prompt-tokens", "1,-1"],
    "has no tokenizer.json": ["--prompt", "hello"],
    "the prompt is empty ": ["--prompt", ""],
    "cannot read missing.txt": ["--prompt-file", "missing.txt"],
    "cannot read missing.toml": ["--config", "missing.toml"],
    "cannot write missing/folder/x.npz: No such file or directory": [
        *("--prompt-tokens", "1", "--dump-cache", "missing/folder/x.npz"),
    ],
    "cannot write /: Is a directory": ["--prompt-tokens", "1", "--dump-cache", "/"],
    "cannot write /dev/null/x.npz: Not a directory": ["--prompt-tokens", "1", "--dump-cache", "/dev/null/x.npz"],
    "the context limit is 128": ["--prompt-tokens", ids([1] * 129)],
    "ask for at most 8 new tokens": ["--prompt-tokens", ids([1] * 120)],
    "max-new-tokens 0": ["--prompt-tokens", "1", "--max-new-tokens", "0"],
    "more than any cache holds": ["--method", "h2o", "--budget", str(2**31), "--prompt-tokens", "1"],
    "budget '' is not": ["--method", "h2o", "--budget", "", "--prompt-tokens", "1"],
    "standard input can be read once": ["--prompt", "-", "--prompt", "-"],
    "is not UTF-8 text": ["--prompt", "\udcff"],
    "--chat wraps text": ["--chat", "--prompt-tokens", "1"],
    "temperature -1.0": ["--prompt-tokens", "1", "--temperature", "-1"],
    "top-p 0.0": ["--prompt-tokens", "1", "--top-p", "0"],
    "top-k -2": ["--prompt-tokens", "1", "--top-k", "-2"],
    "repetition-penalty 1e-50 is not from 1e-06 to 1e+06": ["--prompt-tokens", "1", "--repetition-penalty", "1e-50"],
    "repetition-penalty 1e+50": ["--prompt-tokens", "1", "--repetition-penalty", "1e50"],
    "repetition-penalty nan": ["--prompt-tokens", "1", "--repetition-penalty", "nan"],
    "repetition-penalty 0.0": ["--prompt-tokens", "1", "--repetition-penalty", "0"],
    "repetition-penalty 1e-50": ["--prompt-tokens", "1", "--repetition-penalty", "1e-50"],
    "no such directory": ["--model", "./nowhere", "--prompt-tokens", "1"],
    "give a prompt": [],
    "xxxx: File name too long": ["--model", "x" * 300, "--prompt-tokens", "1"],
    "xxx: File name too long": ["--prompt-file", "x" * 300],
    "yyy: File name too long": ["--prompt-tokens", "1", "--dump-cache", "y" * 300],
    "argument --set: -- is no value": ["--prompt-tokens", "1", "--set=--"],
    "is not a number of tokens (512)": ["--prompt-tokens", "1", "--method", "h2o", "--budget", "9" * 5000],
    "is not of the form data=2": ["--prompt-tokens", "1", "--mesh", "data=" + "9" * 5000],
    "is not HOST:PORT,COUNT,INDEX": ["--prompt-tokens", "1", "--distributed", f"a:1,{'9' * 5000},0"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line_and_exit_code_2(message, directory, capsys):
    argv = BAD[message] if "--model" in BAD[message] else ["--model", str(directory), *BAD[message]]
    with pytest.raises(SystemExit) as exit:
        command.run(PROG, lambda: main(argv))
    out = capsys.readouterr()
    assert exit.value.code == 2 and out.out == ""
    assert out.err.startswith(f"{PROG}: error: ") and out.err.count("\n") == 1
    assert message.strip() in out.err


def test_the_program_itself_exits_with_2_and_without_a_traceback(tmp_path):
    argv = [sys.executable, "-m", PROG, "--model", "./nowhere", "--prompt", "x"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_importing_the_command_does_not_hide_the_function(model):
    assert model.generate([[1, 2]], max_new_tokens=1).sequences[0].prompt_tokens == 2


def test_a_stop_token_ends_its_sequence_alone(model):
    free = model.generate([[1, 2, 3], [4, 5, 6, 7]], max_new_tokens=20)
    first = free.sequences[0].tokens
    stop = next(t for i, t in enumerate(first) if i > 1 and t not in first[:i])
    stopping = Model(model.decoder, None, (stop,), model.name)
    out = stopping.generate([[1, 2, 3], [4, 5, 6, 7]], max_new_tokens=20)
    assert out.sequences[0].tokens == first[: first.index(stop) + 1]
    assert out.sequences[0].finish_reason == "stop"
    assert free.sequences[0].finish_reason == "length"


def test_tokens_appear_in_order(model):
    seen = []
    out = model.generate([[1, 2], [3]], max_new_tokens=18, on_token=lambda i, token: seen.append((i, token)))
    for i, sequence in enumerate(out.sequences):
        assert [token for j, token in seen if j == i] == sequence.tokens


def test_same_seed_same_text_and_another_seed_another(model):
    draw = lambda seed: model.generate([[1, 2, 3]], max_new_tokens=16, sampling=Sampling(temperature=2.0, seed=seed))
    assert draw(1).sequences[0].tokens == draw(1).sequences[0].tokens
    assert draw(1).sequences[0].tokens != draw(2).sequences[0].tokens


def test_a_sequence_draws_in_a_batch_what_it_draws_alone_with_its_own_seed(model):
    prompts = [[1, 2, 3], [1, 2, 3], [4, 5, 6, 7, 8]]
    draw = lambda prompts, seed: [
        s.tokens
        for s in model.generate(prompts, max_new_tokens=12, sampling=Sampling(temperature=2.0, seed=seed)).sequences
    ]
    batch = draw(prompts, 2**32 - 2)
    assert batch == [draw([prompt], 2**32 - 2 + i)[0] for i, prompt in enumerate(prompts)]
    assert batch[0] != batch[1]


def test_every_bit_of_a_seed_counts():
    draw = lambda seed: jax.random.bits(chooser(Sampling(seed=seed), 2).key[1], (), np.uint32).item()
    seeds = (0, 7, 2**32 - 2, 2**32 - 1, 2**32, 2**32 + 7, 2**62, 2**63 - 1, -(2**63), -1, -2)
    drawn = {seed: draw(seed) for seed in seeds}
    assert len(set(drawn.values())) == len(seeds)
    for seed in (0, 7, 2**32 - 2):
        assert drawn[seed] == jax.random.bits(jax.random.key(np.uint32(seed + 1)), (), np.uint32).item()


def damaged(model, change) -> Model:
    """The model with one parameter changed."""
    decoder = nnx.clone(model.decoder)
    change(decoder)
    return dataclasses.replace(model, decoder=decoder)


def test_logits_that_are_not_finite_are_refused(model):
    """Also those of later tokens, and of one sequence alone; they would all look like token 0."""
    free, recipe = model.generate([[1, 2, 3]], max_new_tokens=4).sequences[0].tokens, kvjax.methods.full()

    def overflow(decoder):  # what follows the first token
        decoder.embedding[...] = decoder.embedding[...].at[free[0]].set(3e38)

    def head(decoder):
        decoder.head.kernel[...] = jnp.full_like(decoder.head.kernel[...], 3e38)

    later, whole, seen = damaged(model, overflow), damaged(model, head), []
    with pytest.raises(InputError, match=r"the logits of sequence 1 are not finite.*too large for float32"):
        later.generate([[1, 2, 3]], max_new_tokens=4, on_token=lambda i, token: seen.append(token))
    assert seen == free[:1]
    with pytest.raises(InputError, match="sequence 2 are not finite"):
        later.generate([[1, 2, 4], [1, 2, free[0]]], max_new_tokens=1)
    with pytest.raises(InputError, match="sequence 1 are not finite"):
        whole.generate([[1, 2, 3]], max_new_tokens=4)
    prompts, judged = [[1, 2, 3], [1, 2]], [[4, 5], [free[0], 5]]
    reference = model.references(prompts, judged)
    for fails in (
        lambda: later.log_likelihood(prompts, judged),
        lambda: later.references(prompts, judged),
        lambda: later.divergence(prompts, judged, recipe, reference=reference),
    ):
        with pytest.raises(InputError, match="sequence 2 are not finite"):
            fails()
    later.log_likelihood(prompts, [[4, 5], [5, free[0]]])  # the last token is not read
    with pytest.raises(InputError, match="sequence 1 are not finite"):
        whole.divergence(prompts, judged, recipe, reference=reference)


def test_filters_that_cannot_act_are_named(model, capsys):
    say_once.cache_clear()
    run = lambda **given: model.generate([[1, 2, 3]], max_new_tokens=1, sampling=Sampling(**given))
    for silent in ({}, {"seed": 3}, {"repetition_penalty": 1.5}, {"temperature": 1.0, "top_k": 5, "min_p": 0.1}):
        run(**silent)
    assert capsys.readouterr().err == ""
    for _ in range(2):
        run(top_k=5000000, top_p=0.9, seed=3)
    said = "top-k 5000000, top-p 0.9: without effect, for at temperature 0 decoding is greedy\n"
    assert capsys.readouterr().err == said


def test_new_sampling_numbers_do_not_recompile(model):
    hot = lambda t: model.generate([[1, 2, 3]], max_new_tokens=4, sampling=Sampling(temperature=t, top_k=5))
    hot(1.0)
    assert hot(0.3).timing.compile_s == 0


def allowed(logits: np.ndarray, how: Sampling, seen: set[int]) -> set[int]:
    """Tokens that may be drawn, straight from the definitions of the filters."""
    x = logits.astype(np.float64).copy()
    for i in seen:
        x[i] = x[i] * how.repetition_penalty if x[i] < 0 else x[i] / how.repetition_penalty
    x /= how.temperature
    order = np.argsort(-x, kind="stable")[: how.top_k or None]
    p = np.exp(x[order] - x[order].max())
    p /= p.sum()
    before = np.cumsum(p) - p
    return {int(i) for i, q, b in zip(order, p, before, strict=True) if b < how.top_p and q >= how.min_p * p[0]}


@pytest.mark.parametrize(
    "how",
    [
        Sampling(temperature=0.7, top_k=5),
        Sampling(temperature=1.3, top_p=0.6),
        Sampling(temperature=1.0, min_p=0.2),
        Sampling(temperature=2.0, top_k=12, top_p=0.9, min_p=0.05, repetition_penalty=1.7),
    ],
)
def test_only_allowed_tokens_are_drawn_and_all_of_them(how):
    rng = np.random.default_rng(0)
    logits, seen = rng.normal(size=30).astype(np.float32) * 2, {0, 5, 7}
    marks = jnp.zeros((1, 30), jnp.int32).at[0, jnp.asarray(sorted(seen))].set(1)
    chooser = sampling.chooser(how, 1)
    draw = jax.jit(lambda step: sampling.choose(jnp.asarray(logits)[None], chooser, step, marks)[0])
    drawn = {int(draw(jnp.asarray([step]))) for step in range(3000)}
    assert drawn == allowed(logits, how, seen)


def test_biases_and_penalties():
    """Tokens 1 and 2 are in the prompt; 2 was generated twice, 3 once."""
    penalties = {"repetition_penalty": 2.0, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    how = Sampling(**penalties, logit_bias=((3, 1.0), (0, 9.0)))
    logits, seen = jnp.asarray([[1.0, 2.0, -3.0, 4.0, 0.5]]), jnp.asarray([[0, 1, 3, 2, 0]])
    found = sampling.adjusted(logits, sampling.chooser(how, 1), seen)[0]
    assert found.tolist() == [10.0, 1.0, -6.0 - 0.5 - 2 * 0.25, 2.5 - 0.5 - 0.25, 0.5]


def test_generated_tokens_are_counted_apart_from_the_prompt(model):
    out = model.generate([[1, 2, 3]], max_new_tokens=24).sequences[0].tokens
    shy = model.generate([[1, 2, 3]], max_new_tokens=24, sampling=Sampling(presence_penalty=1e6)).sequences[0].tokens
    assert out[0] == shy[0] and len(set(shy)) == 24 > len(set(out))
    for wrong in ({"presence_penalty": 1e7}, {"frequency_penalty": math.nan}, {"logit_bias": ((-1, 0.0),)}):
        with pytest.raises(InputError, match=r"penalty|logit-bias"):
            model.generate([[1]], max_new_tokens=1, sampling=Sampling(**wrong))


def test_the_repetition_penalty_applies_to_greedy_decoding_and_to_the_prompt(model):
    plain = model.generate([[1, 2, 3]], max_new_tokens=24).sequences[0].tokens
    how = Sampling(repetition_penalty=1e6)
    out = model.generate([[1, 2, 3]], max_new_tokens=24, sampling=how).sequences[0].tokens
    assert len(set(plain)) < len(plain)
    assert len(set(out) | {1, 2, 3}) == len(out) + 3


def test_what_is_no_model_and_no_number_format_is_refused():
    for dtype in ("fp16", "int8", "float64"):
        with pytest.raises(InputError, match="is not one of float32, bfloat16, float16"):
            kvjax.load(dtype=dtype)
    with pytest.raises((InputError, TypeCheckError), match=r"is not a name or a path|name"):
        kvjax.load(5)  # pyright: ignore[reportArgumentType]


def test_arguments_of_a_method_may_stand_in_its_name(directory, capsys):
    flags = ["--model", directory, "--prompt-tokens", ids(range(1, 60)), "--max-new-tokens", 4, "--budget", "50%"]
    one = run_json(capsys, *flags, "--method", "h2o+store=int8+recent=0.25")
    other = run_json(capsys, *flags, "--method", "h2o", "--store", "int8", "--set", "recent=0.25")
    assert one["stores"] == ["int8"] and one["sequences"] == other["sequences"] and one["cache"] == other["cache"]


@pytest.mark.parametrize("prompts", ["one text", 5, b"abc", [b"abc"], [1, 2], [["a"]], [], [[1.5]]])
def test_prompts_of_the_wrong_kind_are_refused(model, prompts):
    with pytest.raises((kvjax.InputError, TypeCheckError), match="prompt"):  # or the type checker, if it is on
        model.generate(prompts)


@pytest.mark.parametrize("new", [2.5, True, 2**31])
def test_a_number_of_new_tokens_that_is_none_is_refused(model, new):
    with pytest.raises((kvjax.InputError, TypeCheckError), match=r"whole number|max_new_tokens"):
        model.generate([[1]], max_new_tokens=new)


@pytest.mark.parametrize("how", [Sampling(temperature=1e-38), Sampling(temperature=1, top_p=1e-46)])
def test_vanishing_temperature_and_top_p_are_greedy(model, how):
    greedy = model.generate([[1, 2, 3]], max_new_tokens=4).sequences[0].tokens
    assert model.generate([[1, 2, 3]], max_new_tokens=4, sampling=how).sequences[0].tokens == greedy


def test_places_in_the_cache_stay_within_the_context_limit(model):
    limit = model.spec.max_position
    recipe = kvjax.methods.streaming_llm
    out = model.generate([list(range(60))], recipe(budget=20), max_new_tokens=2 * limit)
    assert len(out.sequences[0].tokens) == 2 * limit
    with pytest.raises(kvjax.InputError, match="context limit"):
        model.generate([list(range(60))], recipe(budget=2 * limit), max_new_tokens=2 * limit)


@optimized
def test_the_cache_is_there_once_while_decoding(model):
    """Buffers that are alive, not only those that are counted."""
    prompt, alive = [list(range(90))], []

    def look(sequence, token):
        alive.append(sum(x.nbytes for x in jax.live_arrays() if x.shape == pool.shape and not x.is_deleted()))

    pool = jax.tree.leaves(model.generate(prompt, max_new_tokens=20).cache[0][0].k)[0]
    shape_bytes = pool.nbytes
    pool = np.empty(pool.shape, np.int8)
    model.generate(prompt, max_new_tokens=20, on_token=look)
    assert max(alive) == 2 * shape_bytes  # keys and values


@pytest.mark.parametrize("chunk", [1, 100])
def test_a_prompt_is_the_same_in_parts(model, chunk):
    """Also where a part would be less than a token of each, and where it does not divide them."""
    prompts, recipe = [list(range(90)), list(range(2, 60))], kvjax.methods.h2o(24)
    whole = model.generate(prompts, recipe, max_new_tokens=4, prefill_chunk=2**20)
    parts = model.generate(prompts, recipe, max_new_tokens=4, prefill_chunk=chunk)
    np.testing.assert_allclose(parts.logits, whole.logits, atol=1e-4)
    assert [s.tokens for s in parts.sequences] == [s.tokens for s in whole.sequences]
    with pytest.raises(InputError, match="prefill-chunk 0"):
        model.generate(prompts, recipe, max_new_tokens=4, prefill_chunk=0)


def test_equal_arguments_give_the_same_recipe():
    h2o = kvjax.methods.h2o
    assert h2o() is h2o("20%") is h2o(budget="20%", recent=0.5)
    assert h2o(256) is h2o("256") is kvjax.methods.make("h2o", "256") is h2o(np.int64(256))
    assert h2o(256) is not h2o(257)


def test_the_command_line_takes_a_total_length(capsys):
    flags = ["--prompt-tokens", "1,2,3", "--method", "h2o", "--budget", "20%", "--max-new-tokens", "4", "--json"]
    main([*flags, "--max-length", "64"])
    roomy = json.loads(capsys.readouterr().out)
    main(flags)
    exact = json.loads(capsys.readouterr().out)
    assert roomy["sequences"] == exact["sequences"]
    assert roomy["cache"]["full_bytes"] == exact["cache"]["full_bytes"] // 7 * 64


def test_a_sequence_does_not_outgrow_the_frequencies_of_its_cached_keys(tmp_path):
    model = kvjax.load(golden.write_checkpoint("phi3_longrope", tmp_path))  # others beyond 32 tokens
    run = lambda tokens, new, **kwargs: model.generate([[1] * tokens], max_new_tokens=new, **kwargs)
    run(28, 5)
    run(33, 5)
    with pytest.raises(InputError, match=r"frequencies beyond 32 tokens.*of 28.*not 33"):
        run(28, 6)
    with pytest.raises(InputError, match="frequencies beyond 32"):
        run(28, 1, questions=[[1] * 5])
    model.log_likelihood([[1] * 28], [[1] * 5], kvjax.methods.full())  # the last token is not read
    with pytest.raises(InputError, match="frequencies beyond 32"):
        model.log_likelihood([[1] * 28], [[1] * 6], kvjax.methods.full())
    run(28, 6, method=kvjax.methods.streaming_llm(12))  # rotates keys when it reads them
    read_prompts(model, kvjax.methods.full(), [[1] * 28, [1] * 8], new=25)  # of which the first may read 5


def test_a_cache_is_not_made_for_a_loop_that_outgrows_the_frequencies_of_its_keys(tmp_path):
    model = kvjax.load(golden.write_checkpoint("phi3_longrope", tmp_path)).decoder
    init = lambda *prompt, new, recipe: kvjax.init_cache(model, recipe, kvjax.Lengths(prompt, new, 64))
    full = kvjax.methods.full()
    init(28, new=5, recipe=full)
    init(33, new=20, recipe=full)
    init(28, new=20, recipe=kvjax.methods.streaming_llm(12))
    with pytest.raises(InputError, match=r"frequencies beyond 32 tokens.*of 28.*not 33"):
        init(40, 28, new=6, recipe=full)


@pytest.mark.parametrize("name", ["mistral_window", "llama_dynamic"])
def test_sinks_by_place_are_seen_whatever_lies_between(name, tmp_path):
    """StreamingLLM, one layer: with the same sinks and newest tokens, what came between changes nothing."""
    model = kvjax.load(golden.write_checkpoint(name, tmp_path))
    one = dataclasses.replace(model.spec, num_layers=1, windows=model.spec.windows[:1], max_position=256)
    model.decoder.spec, model.decoder.layers = one, nnx.List([model.decoder.layers[0]])
    rng, step = np.random.default_rng(0), jax.jit(kvjax.decode_step, static_argnames="recipe")
    sinks, other, newest = (rng.integers(0, 97, n).tolist() for n in (4, 4, 30))

    def logits(first, between):
        prompt = [*first, *rng.integers(0, 97, between).tolist(), *newest]
        recipe, lengths = kvjax.methods.streaming_llm(12), kvjax.Lengths((len(prompt),), 4, 128)
        tokens = jnp.zeros((1, 128), jnp.int32).at[0, : len(prompt)].set(jnp.asarray(prompt, jnp.int32))
        cache = kvjax.init_cache(model.decoder, recipe, lengths)
        length = jnp.asarray(lengths.prompt, jnp.int32)
        _, cache = kvjax.prefill(model.decoder, recipe, tokens, length, cache)
        return step(model.decoder, recipe, cache, jnp.asarray([5], jnp.int32), length)[0]

    near, far, changed = logits(sinks, 10), logits(sinks, 70), logits(other, 70)
    np.testing.assert_allclose(near, far, atol=1e-4)
    assert np.abs(np.asarray(far - changed)).max() > 1e-3


def test_cached_positions_are_those_that_the_method_keeps(model):
    out = model.generate([list(range(50))], kvjax.methods.streaming_llm(budget=12), max_new_tokens=6)
    kept = cached_positions(model, out)
    assert {tuple(sorted(row[row >= 0])) for row in kept.reshape(-1, kept.shape[-1])} == {(0, 1, 2, 3, *range(47, 55))}


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, Sampling()),
        ({"temperature": 0.6, "top_k": 50, "repetition_penalty": 1.1}, Sampling(repetition_penalty=1.1)),
        ({"do_sample": False, "temperature": 0.6}, Sampling()),
        ({"do_sample": True}, Sampling(temperature=1.0)),
        ({"do_sample": True, "top_k": -1, "top_p": None, "min_p": 0.1}, Sampling(temperature=1.0, min_p=0.1)),
        ({"do_sample": True, "temperature": 0.6, "top_k": 40.0, "top_p": 1}, Sampling(temperature=0.6, top_k=40)),
    ],
)
def test_how_a_checkpoint_samples(config, wanted):
    assert sampling.of_config(config, "a.json") == wanted


@pytest.mark.parametrize(
    "wrong", [{"temperature": "1"}, {"top_p": 2}, {"top_k": 1.5}, {"min_p": True}, {"temperature": math.nan}]
)
def test_how_no_checkpoint_samples(wrong):
    with pytest.raises(InputError, match=r"^a.json: "):
        sampling.of_config({"do_sample": True} | wrong, "a.json")
