"""The inspection of a cache: what it shows is what the cache holds, what it plans is what a run allocates."""

import importlib.util
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import kvjax
from kvjax import compilation
from kvjax.checkpoint import convert
from kvjax.cli import command
from kvjax.generation.generate import cached_positions
from kvjax.inspect import main
from kvjax.inspection import cache_map
from kvjax.inspection.cache_map import HeldTokens
from kvjax.plan import dry_run
from tests import golden

PROG = "kvjax.inspect"
TEXT = "clay: 475 472\nsnow: 102 243\nstation: 227 361\nsapphire: 499 428\nsilver: 445 278\n! snow:"
STREAMING = ["--method", "streaming_llm", "--budget", "9"]  # the first 4 tokens and the 5 newest
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="draws")


@pytest.fixture(scope="module")
def model():
    return kvjax.load()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A checkpoint of 2 layers without a tokenizer."""
    return golden.write_checkpoint("llama_gqa", tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(autouse=True)
def no_cache_folder(monkeypatch):
    monkeypatch.setattr(compilation, "enable_compilation_cache", lambda: None)


def run(capsys, *argv) -> str:
    main([*map(str, argv)])
    return capsys.readouterr().out


def run_json(capsys, *argv) -> dict:
    """What `--json` prints, and that it prints nothing else."""
    lines = run(capsys, *argv, "--json").splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


def sample(held: np.ndarray, prompt: int) -> HeldTokens:
    layers, heads, length = held.shape
    budget = np.full((layers, heads), 3)
    return HeldTokens(
        held,
        np.zeros_like(held),
        ("dense",),
        budget,
        tuple(range(layers)),
        tuple(range(heads)),
        list(range(length)),
        prompt,
    )


def random_sample(layers=3, heads=2, length=50, prompt=40) -> HeldTokens:
    return sample(np.random.default_rng(0).random((layers, heads, length)) < 0.4, prompt)


def test_streaming_llm_keeps_sinks_and_the_newest_tokens(capsys):
    out = run_json(capsys, "--prompt-tokens", ",".join(map(str, range(2, 32))), *STREAMING, "--max-new-tokens", 6)
    assert (out["prompt_tokens"], out["tokens"][:30], len(out["tokens"])) == (30, list(range(2, 32)), 35)
    assert out["positions"] == [[[0, 1, 2, 3, *range(30, 35)]] * 2] * 6
    assert out["slots"] == [[9, 9]] * 6
    assert (out["method"], out["budget"], out["model"], out["dtype"]) == ("streaming_llm", 9, "demo", "float32")
    assert set(out) == {
        *("method", "budget", "model", "dtype", "weights", "prompt_tokens", "tokens", "layers", "heads"),
        *("positions", "tiers", "slots", "cache"),
    }


def test_full_keeps_everything(capsys):
    out = run_json(capsys, "--method", "full", "--prompt", TEXT * 3, "--max-new-tokens", 5)
    seen = len(out["tokens"])
    assert seen > out["prompt_tokens"] and out["budget"] is None
    assert out["positions"] == [[list(range(seen))] * 2] * 6


@needs_matplotlib
def test_a_second_tier_is_shown_apart(model, capsys, tmp_path):
    """Every token is kept; a fifth as it is, the others in few bits."""
    path = tmp_path / "kept.png"
    flags = ["--method", "mikv", "--budget", "20%", "--max-new-tokens", 3, "--prompt", TEXT * 2]
    shown = run_json(capsys, *flags, "--out", path)
    everything, (dense, low) = list(range(len(shown["tokens"]))), [tier["positions"] for tier in shown["tiers"]]
    assert [tier["store"] for tier in shown["tiers"]] == ["dense", "balanced int2"] and path.stat().st_size > 0
    for layer, one, other in zip(shown["positions"], dense, low, strict=True):
        for head, mine, rest in zip(layer, one, other, strict=True):
            assert head == everything == sorted(mine + rest)
            assert len(mine) == len(everything) // 5
    out = model.generate([TEXT * 2], kvjax.METHODS["mikv"](), max_new_tokens=3)
    (positions,) = cached_positions(model, out, tier=0)
    assert [[sorted(row[row >= 0].tolist()) for row in layer] for layer in positions] == dense
    said = run(capsys, *flags)
    assert "tokens kept dense" in said and "kept balanced int2" in said


def in_half(out: kvjax.Generation) -> dict[str, float]:
    return {"cache": out.compared.cache, "full": out.compared.full, "share": out.compared.cache / out.compared.full}


@pytest.mark.parametrize("method", ["h2o", "pyramidkv"])
def test_what_is_shown_is_what_the_cache_holds(method, model, capsys):
    """Against `cached_positions`, row by row, with and without `--layer` and `--head`."""
    flags = ["--method", method, "--budget", "40%", "--max-new-tokens", 4, "--prompt", TEXT]
    flags += [] if method == "h2o" else ["--set", "window=4", "--set", "kernel=1"]
    shown = run_json(capsys, *flags)
    arguments = {} if method == "h2o" else {"window": 4, "kernel": 1}
    out = model.generate([TEXT], kvjax.METHODS[method](budget="40%", **arguments), max_new_tokens=4)
    (rows,) = cached_positions(model, out)
    want = [[sorted(p for p in row.tolist() if p >= 0) for row in layer] for layer in rows]
    assert shown["positions"] == want and len({str(row) for layer in want for row in layer}) > 1
    size = {"bytes": out.bytes._asdict(), "full_bytes": out.full_bytes}
    assert shown["cache"] == size | {"share": out.compared.share, "compared": in_half(out)}
    assert np.mean(shown["slots"], axis=1).tolist() == out.slots[0]

    one = run_json(capsys, *flags, "--layer", 2, "--head", 1)
    assert (one["layers"], one["heads"], one["positions"]) == ([2], [1], [[want[2][1]]])
    head = run_json(capsys, *flags, "--head", 1)
    assert (head["layers"], head["positions"]) == ([0, 1, 2, 3, 4, 5], [[layer[1]] for layer in want])

    mine = cache_map.read(model, out, model.tokenizer.encode(TEXT))
    assert mine.budget.shape == mine.slots.shape == (6, 2)
    if method == "pyramidkv":  # of the prompt; the generated tokens that were read come on top
        read = len(mine.tokens) - mine.prompt
        assert (mine.slots == mine.budget + read).all() and len(set(mine.budget[:, 0].tolist())) > 1


def test_without_a_prompt_the_demo_model_reads_its_list(capsys):
    out = run_json(capsys, "--budget", 40)
    assert out["method"] == "snapkv" and out["prompt_tokens"] == len(out["tokens"]) > 900
    assert out["slots"] == [[40, 40]] * 6


@pytest.mark.parametrize("text", [TEXT, "clay: 475\n\n\n! clay:", " snow", "naïve 日本語 🙂‍↕️ x", "\t\x1b[31m"])
def test_pieces_join_to_the_prompt(text, model):
    ids = model.tokenizer.encode(text)
    pieces = cache_map.pieces(model.tokenizer, ids)
    assert len(pieces) == len(ids)
    assert pieces[0] == "<|begin|>" and "".join(pieces[1:]) == model.tokenizer.decode(ids)
    if text == TEXT:
        assert "".join(pieces[1:]) == text


def test_a_character_of_several_tokens_is_complete_with_the_last(model):
    """Or where a special token cuts it short."""
    (begin,), word = model.tokenizer.encode(""), model.tokenizer.encode("日", special=False)
    assert cache_map.pieces(model.tokenizer, word) == ["", "", "日"]
    cut = cache_map.pieces(model.tokenizer, [word[0], begin, *word, begin])
    assert cut == ["\ufffd", "<|begin|>", "", "", "日", "<|begin|>"]
    assert list(cache_map.marked(["", "", "日"], [3, 1, 2], width=80)) == ["日", ".."]  # the least of its levels
    assert cache_map.pieces(None, [5, 7]) == ["5 ", "7 "]


def test_levels_count_rows():
    held = np.zeros((2, 2, 5), bool)
    for position, rows in enumerate([0, 1, 2, 3, 4]):
        held.reshape(4, 5)[:rows, position] = True
    assert sample(held, 5).levels() == [0, 1, 2, 2, 3]
    assert cache_map.only(sample(held, 5), 0, 1).levels() == [0, 0, 3, 3, 3]


def test_marks_stand_below_the_letters_that_they_mark():
    lines = list(cache_map.marked(["ab", "", "\n", "日", "c", "\x1b"], [3, 1, 2, 1, 0, 2], width=80))
    assert lines == ["ab↵", "##.", "日c\\x1b", ".. ++++"]
    assert list(cache_map.marked(["abcdef"], [1], width=4)) == ["abcd", "....", "ef", ".."]
    assert list(cache_map.marked(["ab", "cd"], [0, 0], width=80)) == ["abcd"]


def test_styles_and_marks_say_the_same():
    pieces, levels = list("abcdefgh"), [0, 1, 2, 3, 3, 2, 1, 0]
    text, (line, marks) = cache_map.styled(pieces, levels), cache_map.marked(pieces, levels, width=80)
    styles = {i: str(span.style) for span in text.spans for i in range(span.start, span.end)}
    mark = {"bold underline": "#", "bold": "+", "": ".", "dim": " "}
    assert text.plain == line == "abcdefgh"
    assert "".join(mark[styles.get(i, "")] for i in range(8)).rstrip() == marks == " .+##+."


def test_the_terminal_shows_text_slots_and_bytes(capsys):
    out = run(capsys, "--prompt", TEXT, *STREAMING, "--max-new-tokens", 3)
    lines = out.splitlines()
    assert "streaming_llm 9" in lines[0] and "3" in lines[0]
    first = lines.index("<|begin|>clay: 475 472↵")
    assert lines[first + 1] == "#" * len("<|begin|>clay: 475 472")  # four sinks; the line's end is none
    assert lines[first + 2] == "snow: 102 243↵" and lines[first + 3] == "station: 227 361↵"
    assert "--- generated" in lines
    for name in ("payload", "statistics", "full cache", "of the full cache, both in 16 bits", "bytes (float32)"):
        assert name in out


def test_a_terminal_gets_styles(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    out = run(capsys, "--prompt", TEXT, *STREAMING, "--head", 1, "--layer", 3)
    assert "\x1b[1;4m<|begin|>\x1b[0m" in out and "\x1b[2msnow:\x1b[0m" in out and "no mark" not in out


@needs_matplotlib
def test_the_picture_shows_every_row_and_position():
    shown = random_sample()
    axes = cache_map.picture(shown, "title").axes[0]
    (image,) = axes.images
    np.testing.assert_array_equal(image.get_array(), shown.held.reshape(6, 50))
    assert image.get_extent() == [-0.5, 49.5, 5.5, -0.5]
    assert axes.get_title(loc="left") == "title"
    lines = [line.get_xydata() for line in axes.lines]
    assert [line[0][1] for line in lines[:2]] == [1.5, 3.5]  # between layers
    assert lines[2][0][0] == 39.5 and axes.texts[0].get_text() == "generated: 10"
    dark, light = image.cmap(1.0), image.cmap(0.0)
    assert sum(dark[:3]) < 1 < sum(light[:3])
    assert not cache_map.picture(shown._replace(prompt=50), "").axes[0].texts


def test_bins_hold_the_kept_fraction():
    shown = random_sample(length=103)
    image, size = cache_map.heat(shown, columns=10)
    assert size == 11 and image.shape == (6, 10)
    for row, held in zip(image, shown.held.reshape(6, 103), strict=True):
        np.testing.assert_allclose(row, [held[i : i + 11].mean() for i in range(0, 103, 11)])
    exact, size = cache_map.heat(shown, columns=103)
    assert size == 1 and (exact == shown.held.reshape(6, 103)).all()


@needs_matplotlib
def test_out_writes_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--prompt", TEXT, *STREAMING]
    run_json(capsys, *flags)
    assert not list(tmp_path.iterdir())
    assert "kept.png" in run(capsys, *flags, "--out")
    run_json(capsys, *flags, "--out", "other.png")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["kept.png", "other.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in tmp_path.iterdir())


@pytest.mark.parametrize("method", ["full", "snapkv"])
def test_a_dry_run_plans_what_a_run_allocates(method, model, capsys):
    flags = ["--method", method, "--max-new-tokens", 5, "--prompt", TEXT * 3]
    flags += [] if method == "full" else ["--budget", "30%"]
    real, planned = run_json(capsys, *flags)["cache"], run_json(capsys, *flags, "--dry-run")
    codes = real["bytes"].pop("payload") + real["bytes"].pop("slack")
    assert planned["cache"] == real | {"bytes": {"codes": codes, **real["bytes"]}}
    assert planned["context"] == len(model.tokenizer.encode(TEXT * 3))


def test_a_dry_run_plans_batches(model, capsys):
    prompts, recipe = [[3] * 70] * 3, kvjax.methods.pyramidkv(budget="30%")
    out = model.generate(prompts, recipe, max_new_tokens=2)
    flags = ["--method", "pyramidkv", "--budget", "30%", "--context", 70, "--max-new-tokens", 2, "--batch", 3]
    planned = run_json(capsys, "--dry-run", *flags)
    assert planned["cache"]["bytes"]["total"] == out.bytes.total
    assert planned["cache"]["full_bytes"] == out.full_bytes
    assert planned["cache"]["compared"] == in_half(out)
    assert planned["slots"] == [recipe.slots(i, 6, 70) for i in range(6)]


def test_a_dry_run_says_what_is_in_force(capsys):
    planned = run_json(capsys, "--dry-run", "--method", "streaming_llm", "--set", "sinks=2", "--context", 100)
    assert planned["arguments"] == {"sinks": 2, "positions": "cache", "decode_budget": "", "store": "dense"}
    assert (planned["stores"], planned["fold"], planned["rotate"]) == (["dense"], "identity", "when read")
    assert planned["slots"] == [20] * 6
    assert run_json(capsys, "--dry-run", "--method", "full", "--kernels", "auto")["arguments"] == {"store": "dense"}
    out = run(capsys, "--dry-run", "--method", "pyramidkv", "--context", 100)
    for words in ("--set beta", "identity", "dense", "100 prompt", "payload and slack", "when written"):
        assert words in out


def test_a_dry_run_beyond_what_a_model_is_made_for_says_so(directory, capsys):
    flags = ("--dry-run", "--model", directory, "--method", "full", "--max-new-tokens", 2, "--context")
    note = "the model is made for 128 tokens: planned as if it read {} and 2 new ones"
    want = [[], [note.format(127)], [note.format("1,280")]]
    assert [run_json(capsys, *flags, n)["notes"] for n in (126, 127, 1280)] == want
    size = lambda n: run_json(capsys, *flags, n)["cache"]["full_bytes"]
    assert size(1278) == 10 * size(126)
    assert note.format("1,280") in run(capsys, *flags, 1280)


def test_a_dry_run_of_a_large_model_needs_no_memory(tmp_path, capsys):
    """70 billion parameters, 131,072 tokens: the full cache alone would take 40 GiB."""
    config = {
        **{"model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "num_hidden_layers": 80},
        **{"num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 28672},
        **{"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0},
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    before = sum(x.nbytes for x in jax.live_arrays())
    flags = ["--dry-run", "--dtype", "bfloat16", "--context", 131071, "--method"]
    full = run_json(capsys, *flags, "full", "--model", file)["cache"]
    assert full["full_bytes"] == 2 * 80 * 8 * 128 * 2 * 131072
    assert full["bytes"]["codes"] == full["full_bytes"]  # 131072 slots are a rung of the ladder
    small = run_json(capsys, *flags, "snapkv", "--budget", 1024, "--model", tmp_path)["cache"]["bytes"]
    assert 1 <= small["codes"] / (full["full_bytes"] * 1025 / 131072) < 1.1
    assert sum(x.nbytes for x in jax.live_arrays()) - before < 2**20


def test_a_dry_run_reads_a_converted_checkpoint(directory, tmp_path, capsys):
    convert.convert(str(directory), tmp_path / "orbax", None, ())
    flags = ["--dry-run", "--context", 50, "--model"]
    plans = [run_json(capsys, *flags, path) for path in (directory, directory / "config.json", tmp_path / "orbax")]
    assert len({str(each["cache"]) for each in plans}) == 1
    (tmp_path / "orbax" / "params").rename(tmp_path / "elsewhere")
    assert run_json(capsys, *flags, tmp_path / "orbax")["cache"] == plans[0]["cache"]


def test_a_config_file_and_flags_over_it(tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text('method = "snapkv"\nbudget = 9\nmax_new_tokens = 3\nout = "x.png"\n[arguments]\nwindow = 4\n')
    with pytest.raises(kvjax.InputError, match="dry run"):
        main(["--config", str(file), "--dry-run"])
    file.write_text(file.read_text().replace('out = "x.png"\n', ""))
    planned = run_json(capsys, "--config", file, "--dry-run", "--budget", 7)
    assert (planned["budget"], planned["max_new_tokens"], planned["arguments"]["window"]) == (7, 3, 4)


MODEL = object()  # stands for `--model` and the directory
BAD = {
    "unrecognized arguments: --bogus": ["--bogus"],
    "unknown method 'nope'": ["--method", "nope"],
    "has no argument 'depth'": ["--method", "h2o", "--set", "depth=3"],
    "takes no budget": ["--method", "full", "--budget", "5"],
    "give a prompt: --prompt": [MODEL],
    "the prompt is empty": ["--prompt", ""],
    "the prompt is empty ": [MODEL, "--prompt-tokens", ""],
    "2 prompts are given": ["--prompt", "a", "--prompt-tokens", "1"],
    "--chat wraps text": ["--chat", "--prompt-tokens", "1"],
    "no such directory": ["--model", "./nowhere", "--prompt", "x"],
    "a dry run downloads nothing": ["--model", "some/model", "--dry-run"],
    "tests: has no config.json": ["--model", "tests", "--dry-run"],
    "pyproject.toml is not JSON": ["--model", "pyproject.toml", "--dry-run"],
    "model.safetensors is not UTF-8 text: give the directory of a checkpoint, or its config.json": [
        *("--model", "kvjax/demo/model.safetensors", "--dry-run"),
    ],
    "cannot read missing.txt": ["--prompt-file", "missing.txt"],
    "has no tokenizer.json": [MODEL, "--prompt", "hello"],
    "has no tokenizer.json ": [MODEL, "--prompt", "hello", "--dry-run"],
    "the prompt has 129 tokens, the context limit is 128": [MODEL, "--prompt-tokens", ",".join(["1"] * 129)],
    "the prompt has 129 tokens, the context limit is 128 ": [
        *(MODEL, "--prompt-tokens", ",".join(["1"] * 129), "--dry-run"),
    ],
    "token id 97 is not in": [MODEL, "--prompt-tokens", "1,97", "--dry-run"],
    "--layer 6 is out of range: this model has layers 0 to 5": ["--layer", "6", "--prompt", "x"],
    "--layer -1 is out of range": ["--layer", "-1", "--prompt", "x"],
    "--head 2 is out of range: this model has heads 0 to 1": ["--head", "2", "--prompt", "x"],
    "max-new-tokens 0": ["--max-new-tokens", "0", "--prompt", "x"],
    "batch 0": ["--dry-run", "--batch", "0"],
    "context 0": ["--dry-run", "--context", "0"],
    "--context: only a dry run": ["--context", "5", "--prompt", "x"],
    "--context: the prompt says": ["--context", "5", "--prompt", "x", "--dry-run"],
    "--out: a dry run": ["--dry-run", "--out"],
    "--head: a dry run": ["--dry-run", "--head", "0"],
    "pictures are PNG": ["--prompt", "x", "--out", "kept.pdf"],
    "cannot write missing/folder/kept.png: No such file or directory": [
        "--prompt",
        "x",
        "--out",
        "missing/folder/kept.png",
    ],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line_and_exit_code_2(message, directory, capsys, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    argv = [part for flag in BAD[message] for part in (["--model", str(directory)] if flag is MODEL else [flag])]
    with pytest.raises(SystemExit) as exit:
        command.run(PROG, lambda: main(argv))
    out = capsys.readouterr()
    assert exit.value.code == 2 and out.out == ""
    assert out.err.startswith(f"{PROG}: error: ") and out.err.count("\n") == 1
    assert message.strip() in out.err


def test_without_matplotlib_a_picture_is_refused_and_the_rest_works(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    flags = ["--prompt", TEXT, *STREAMING]
    with pytest.raises(kvjax.InputError, match=r"pip install 'kvjax\[eval\]'"):
        main([*flags, "--out", str(tmp_path / "x.png")])
    assert run_json(capsys, *flags)["slots"] == [[9, 9]] * 6


def test_a_cache_with_too_many_pages_is_refused():
    model = dry_run.abstract_model(None)
    with pytest.raises(kvjax.InputError, match="pages"):
        dry_run.plan_cache(model, kvjax.methods.full(), context=2**20, new=1, batch=2**16)


def test_the_program_itself_plans(tmp_path):
    argv = [sys.executable, "-m", PROG, "--dry-run", "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and json.loads(done.stdout)["method"] == "snapkv"
