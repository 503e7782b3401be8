"""The evaluation's grid: what is written, that it resumes, what it refuses."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import kvjax
from kvjax import METHODS, evaluate, methods
from kvjax.checkpoint import shipped
from kvjax.checkpoint.convert import convert
from kvjax.checkpoint.lorc import ranks
from kvjax.cli import command
from kvjax.evaluation import grid, runner
from kvjax.generation.model import Model
from kvjax.tasks.task import Sample
from tests.lib.matrix import reference
from tests.test_tokenizer import STYLES, byte_level, write

pytestmark = pytest.mark.usefixtures("shallow_demo")
SMALL = ["--lengths", "128", "--samples", "3", "--batch", "2"]


def run(out: Path, *flags: str) -> list[dict]:
    evaluate.main([*SMALL, "--out", str(out), *flags])
    return lines(out)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def results(out: Path) -> list[str]:
    """Everything but the time it took, in the order of the grid."""
    return sorted(json.dumps({k: v for k, v in line.items() if k != "timing"}, sort_keys=True) for line in lines(out))


def test_every_sample_of_the_grid_has_one_line(tmp_path):
    found = run(tmp_path, "--tasks", "lines,kl", "--methods", "full,h2o", "--budgets", "10%,32")
    keys = [runner.key(line) for line in found]
    points = [("full", None), ("h2o", "10%"), ("h2o", "32")]
    assert keys == [(t, "128", i, 0, *point) for point in points for t in ("lines", "kl") for i in range(3)]
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["arguments"]["methods"] == ["full", "h2o"]
    assert record["versions"]["kvjax"] == "0.1.0"
    assert "--tasks lines,kl" in record["command"]


def test_a_line_says_what_generation_says(tmp_path):
    (line, *_) = run(tmp_path, "--tasks", "lines", "--methods", "streaming_llm", "--budgets", "50%")
    model, recipe = kvjax.load(), methods.streaming_llm(budget="50%")
    sample = samples_of("lines", model)[0]
    out = model.generate([sample.context + sample.question], recipe, max_new_tokens=2)
    (sequence,) = out.sequences
    assert line["prediction"] == sequence.text
    assert line["score"] == float(sequence.text == line["answers"][0])
    assert line["prompt_tokens"] == sequence.prompt_tokens <= 126
    assert line["full_bytes"] == out.compared.full
    assert line["cache_bytes"] == pytest.approx(out.compared.cache, rel=1e-3)  # free pages are listed per batch
    assert line["kept"] == pytest.approx(sum(out.slots[0]) / len(out.slots[0]) / (sequence.prompt_tokens + 1))
    assert line["timing"]["decoded"] == 2


def samples_of(task: str, model: kvjax.Model):
    request = runner.request(model, samples=3, lengths=(128,), form="short")
    return evaluate.make_task(task).samples(request)


def test_an_unseen_question_is_read_after_compression(tmp_path):
    flags = "--tasks", "lines", "--methods", "snapkv", "--budgets", "20%", "--set", "snapkv.window=4"
    found = run(tmp_path, *flags, "--question", "unseen")
    model, recipe = kvjax.load(), methods.snapkv(budget="20%", window=4)
    samples = samples_of("lines", model)
    out = model.generate(
        [s.context for s in samples], recipe, questions=[s.question for s in samples], max_new_tokens=2
    )
    assert [line["prediction"] for line in found] == [sequence.text for sequence in out.sequences]
    seen = run(tmp_path / "seen", *flags)
    assert [line["prompt_tokens"] for line in seen] == [line["prompt_tokens"] for line in found]
    assert [line["kept"] for line in seen] != [line["kept"] for line in found]


@pytest.mark.parametrize("method", ["snapkv+window=4", "h2o+store=int8"])
def test_questions_about_one_context_are_asked_of_one_reading(method, tmp_path, monkeypatch):
    """Answers are those of each question alone, and a line's bytes those of the context with its one question."""
    reads, original = [], Model.read
    monkeypatch.setattr(Model, "read", lambda self, *given: reads.append(1) or original(self, *given))
    flags = "--tasks", "facts", "--methods", method, "--budgets", "20%", "--question", "unseen"
    found = run(tmp_path, *flags, "--set", "facts.questions=3")
    assert [(line["index"], line["asked"]) for line in found] == [(i, j) for i in range(3) for j in range(3)]
    assert len(reads) == 3  # though a batch has two
    model = kvjax.load()
    request = runner.request(model, samples=3, lengths=(128,), form="short")
    for line, sample in zip(found, evaluate.make_task("facts", {"questions": "3"}).samples(request), strict=True):
        ids, question = runner.encode(model, sample, chat=False, unseen=True)
        out = original(model, ids, method, "20%").ask([question], max_new_tokens=2)
        (sequence,) = out.sequences
        assert line["prediction"] == sequence.text and line["score"] == float(sequence.text == sample.answers[0])
        assert line["prompt_tokens"] == sequence.prompt_tokens == len(ids + question)
        assert line["full_bytes"] == out.compared.full
        assert line["cache_bytes"] == pytest.approx(out.compared.cache, rel=5e-3)  # free pages are listed per batch
        alone = original(model, ids, method, "20%").footprint.compared
        assert (line["context_bytes"], line["context_full_bytes"]) == alone and alone.cache < line["cache_bytes"]
        assert line["kept"] == pytest.approx(np.mean(out.slots) / (sequence.prompt_tokens + 1))
    before, path = results(tmp_path), tmp_path / "samples.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:7]))  # as if killed while writing a context
    run(tmp_path, *flags, "--set", "facts.questions=3")
    assert results(tmp_path) == before and len(reads) == 4


def test_each_question_that_is_seen_ends_a_prompt(tmp_path):
    flags = "--tasks", "facts", "--methods", "snapkv+window=4", "--budgets", "30%", "--samples", "2", "--batch", "3"
    found = run(tmp_path, *flags, "--set", "facts.count=2")
    assert [(line["index"], line["asked"]) for line in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    model = kvjax.load()
    request = runner.request(model, samples=2, lengths=(128,), form="short")
    samples = evaluate.make_task("facts", {"count": "2"}).samples(request)
    prompts = [sample.context + sample.question for sample in samples]
    out = model.generate(prompts, "snapkv+window=4", "30%", max_new_tokens=2)
    assert [line["prediction"] for line in found] == [sequence.text for sequence in out.sequences]


def test_a_line_of_an_earlier_version_is_of_the_first_question(tmp_path):
    flags = "--tasks", "lines", "--methods", "full"
    before = run(tmp_path, *flags)
    path = tmp_path / "samples.jsonl"
    path.write_text(path.read_text().replace('"asked": 0, ', ""))
    assert len(lines(tmp_path)) == len(run(tmp_path, *flags)) == len(before)
    with pytest.raises(kvjax.InputError, match='holds a run with question "seen", not "unseen"'):
        run(tmp_path, *flags, "--question", "unseen")


CONFIG = 'method = "snapkv"\nbudget = "20%"\nstore = "int8"\n[arguments]\nwindow = 4\nkernel = 5\n'


def test_a_config_is_a_method_with_its_budget(tmp_path):
    (tmp_path / "snapkv.toml").write_text(CONFIG)
    (tmp_path / "full.toml").write_text('method = "full"')
    configs = "--config", str(tmp_path / "snapkv.toml"), "--config", str(tmp_path / "full.toml")
    found = run(tmp_path / "a", "--tasks", "lines", *configs)
    assert {(x["method"], x["budget"]) for x in found} == {("snapkv+window=4+store=int8", "20%"), ("full", None)}
    run(tmp_path / "b", "--tasks", "lines", "--methods", "snapkv+window=4+store=int8,full", "--budgets", "20%")
    assert results(tmp_path / "a") == results(tmp_path / "b")


def test_flags_take_precedence_over_a_config(tmp_path):
    (tmp_path / "a.toml").write_text(CONFIG)
    settings, stores = {"snapkv": {"window": "8"}}, {"store": "int4"}
    entries = [("h2o", None), grid.configured(tmp_path / "a.toml", settings, stores)]
    found = grid.points(entries, None, settings, stores)
    named = [(point.method, point.budget) for point in found]
    assert named == [("h2o+store=int4", "20%"), ("snapkv+store=int4", "20%")]
    assert found[1].recipe is methods.snapkv(budget="20%", window=8, store="int4")
    assert [point.budget for point in grid.points(entries, ["32"])] == ["32", "32"]


def test_teacher_forced_tasks_measure_the_continuation(tmp_path):
    found = run(tmp_path, "--tasks", "perplexity,kl", "--methods", "full,tova", "--budgets", "25%")
    model, recipe = kvjax.load(), methods.tova(budget="25%")
    samples = samples_of("kl", model)
    texts = [s.context for s in samples], [s.question for s in samples]
    judged, _ = model.log_likelihood(*texts, recipe)
    values, _ = model.divergence(*texts, recipe, reference=model.references(*texts))
    by_task = {name: [x for x in found if (x["task"], x["method"]) == (name, "tova")] for name in ("perplexity", "kl")}
    for i in range(3):
        assert by_task["perplexity"][i]["tokens"] == pytest.approx((-judged[i].logprobs[1:]).tolist(), rel=1e-3)
        assert by_task["kl"][i]["tokens"] == pytest.approx(values[i].tolist(), rel=1e-5, abs=1e-6)
    assert all(line["score"] == 0 for line in found if (line["task"], line["method"]) == ("kl", "full"))


TEMPLATE = "{% for m in messages %}<s>[{{ m.role }}] {{ m.content | trim }}{% endfor %}</s>"


@pytest.mark.parametrize("style", STYLES.values())
def test_a_chat_template_surrounds_the_prompt(style, tmp_path):
    tokenizer = write(style(), tmp_path, chat_template=TEMPLATE)
    model = Model(kvjax.load().decoder, tokenizer, (), "chat")
    sample = Sample("", 0, "\nthe hello world\n", "who?\n", prefix=" it is")
    context, rest = runner.encode(model, sample, chat=True)
    assert context + rest == tokenizer.encode("<s>[user] the hello world\nwho?</s> it is", special=False)
    assert tokenizer.decode(context).strip() == "[user] the hello world"
    plain = runner.encode(model, sample._replace(chat=False), chat=True)
    assert plain == runner.encode(model, sample, chat=False)
    assert [*plain[0], *plain[1]] == tokenizer.encode("\nthe hello world\nwho?\n it is")
    for chat, n in ((True, len(context + rest)), (False, len(plain[0] + plain[1]))):
        request = runner.request(model, samples=1, lengths=(64,), form="natural", chat=chat)
        assert n <= request.tokens(sample) <= n + 4  # the template strips some


def test_a_template_that_rewrites_messages_is_refused(tmp_path):
    tokenizer = write(byte_level(), tmp_path, chat_template="{{ messages[0].content | upper }}")
    model = Model(kvjax.load().decoder, tokenizer, (), "chat")
    with pytest.raises(kvjax.InputError, match="give --no-chat"):
        runner.encode(model, Sample("", 0, "hello"), chat=True)


def test_a_reference_is_another_models_full_cache(tmp_path):
    """Of a model with half of the keys and values: its divergence from the model that it was made from."""
    options = ranks.LowRankOptions(ranks.parse("keep=50%,rule=uniform"), basis="plain")
    convert(str(shipped.directory()), tmp_path / "low", low_rank=options)
    flags = "--model", str(tmp_path / "low"), "--tasks", "kl", "--methods", "full", "--form", "short"
    alone = run(tmp_path / "alone", *flags)
    assert all(line["score"] == 0 for line in alone)
    whole, low = kvjax.load(), kvjax.load(str(tmp_path / "low"))
    found = run(tmp_path / "against", *flags, "--reference", str(shipped.directory()))
    samples = samples_of("kl", whole)
    prompts = [runner.encode(whole, sample, chat=False, unseen=True) for sample in samples]
    ids, after = zip(*prompts, strict=True)
    p, q = (_next_tokens(model, ids, after) for model in (whole, low))
    for line, before, following in zip(found, p, q, strict=True):
        expected = np.sum(np.exp(before) * (before - following), axis=-1)
        np.testing.assert_allclose(line["tokens"], expected, rtol=2e-3, atol=1e-5)


def test_a_reference_has_the_weights_that_few_bits_stand_for(tmp_path):
    flags = "--model", "demo", "--tasks", "kl", "--methods", "full", "--form", "short", "--reference", "demo"
    exact, coarse, coarser = (
        [line["score"] for line in run(tmp_path / name, *flags, *more)]
        for name, more in (("float", ()), ("int8", ("--weights", "int8")), ("int4", ("--weights", "int4")))
    )
    assert max(map(abs, exact)) < 1e-6
    assert 0 < np.mean(coarse) < np.mean(coarser) / 4  # 16 times finer steps


def _next_tokens(model, ids, after):
    """Log-probabilities after each token of the continuations, without a cache."""
    tokens = [[*before, *following] for before, following in zip(ids, after, strict=True)]
    logits = [reference(model.decoder, text) for text in tokens]
    return [np.asarray(jax.nn.log_softmax(x))[len(before) :] for x, before in zip(logits, ids, strict=True)]


@pytest.fixture
def few_methods():
    """Two methods and a new one, for the others take their time; then all again, in their order."""
    every = dict(METHODS)
    METHODS.clear()
    METHODS.update(full=every["full"], h2o=every["h2o"])
    METHODS["newest"] = lambda budget="20%": methods.streaming_llm(budget=budget)
    yield
    METHODS.clear()
    METHODS.update(every)


@pytest.mark.usefixtures("few_methods")
def test_a_new_method_appears_without_further_ado(tmp_path):
    found = run(tmp_path, "--tasks", "lines", "--budgets", "20%", "--samples", "1", "--batch", "1")
    assert [line["method"] for line in found] == list(METHODS)
    assert found[-1]["method"] == "newest"


def test_an_interrupted_run_continues_where_it_stopped(tmp_path, monkeypatch):
    flags = "--tasks", "lines,kl", "--methods", "full,streaming_llm", "--budgets", "20%"
    run(tmp_path / "whole", *flags)
    ran, stop_after = [], 3
    original = runner.Evaluation.run

    def interrupted(self, task, point, batch):
        if len(ran) == stop_after:
            raise KeyboardInterrupt
        ran.append((task.name, point.method, batch.number))
        return original(self, task, point, batch)

    monkeypatch.setattr(runner.Evaluation, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", *flags)
    with (tmp_path / "cut" / "samples.jsonl").open("r+") as file:  # as if killed while writing the last batch
        file.truncate(len(file.read()) - 7)
    stop_after = -1
    run(tmp_path / "cut", *flags)
    assert results(tmp_path / "cut") == results(tmp_path / "whole")
    assert len(ran) == 8 + 1  # the batch whose line was torn ran twice


def test_it_says_what_it_runs_and_runs_no_copies(tmp_path, monkeypatch, capsys):
    sizes, original = [], Model.generate
    monkeypatch.setattr(
        Model, "generate", lambda self, ids, *a, **k: sizes.append(len(ids)) or original(self, ids, *a, **k)
    )
    run(tmp_path, "--tasks", "lines", "--methods", "full", "--batch", "64")
    said = capsys.readouterr().err
    assert sizes == [3] and "3 samples to run, in 1 methods and budgets\nlines full: 3 of 3 in " in said
    run(tmp_path, "--tasks", "lines", "--methods", "full", "--batch", "64")
    assert sizes == [3] and "0 samples to run" in capsys.readouterr().err


def test_more_samples_continue_a_run(tmp_path):
    flags = "--tasks", "lines", "--methods", "full"
    before = run(tmp_path, *flags)
    after = run(tmp_path, *flags, "--samples", "5")
    assert after[:3] == before
    assert [line["index"] for line in after] == [0, 1, 2, 3, 4]


def test_ends_of_lines_that_an_editor_has_changed_lose_nothing(tmp_path):
    flags = "--tasks", "lines", "--methods", "full"
    before = run(tmp_path, *flags)
    path = tmp_path / "samples.jsonl"
    for change in (lambda raw: raw.replace(b"\n", b"\r\n"), lambda raw: raw.rstrip()):  # the last line has no end
        path.write_bytes(change(path.read_bytes()))
        assert run(tmp_path, *flags) == before
    assert run(tmp_path, *flags, "--samples", "5")[:3] == before


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(tmp_path):
    resource = pytest.importorskip("resource")
    flags = "--tasks", "lines", "--methods", "full"
    whole = run(tmp_path / "whole", *flags)
    with runner.results(tmp_path) as (done, file):
        runner.append(file, whole[:1], done)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (os.fstat(file.fileno()).st_size + 40, limits[1]))
        try:
            with pytest.raises(
                kvjax.InputError, match=r"cannot write .*samples\.jsonl: File too large; what is finished"
            ):
                runner.append(file, whole[1:], done)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with runner.results(tmp_path) as (done, file):  # the line that the disk had no room for is torn
        assert done.keys() == set(map(runner.key, whole[:1]))
        runner.append(file, whole, done)
    assert lines(tmp_path) == whole


QUESTION = {"context": "Question: Who is it?\nType: Person", "input": "Question: Where?\nType:", "answers": ["Place"]}


def test_a_data_file_that_has_changed_is_another_run(tmp_path):
    write = lambda line: (tmp_path / "trec.jsonl").write_text(json.dumps(line | {"all_classes": ["Place", "Person"]}))
    flags = "--tasks", "longbench", "--set", "longbench.sets=trec", "--data", str(tmp_path), "--form", "short"
    flags += "--methods", "full", "--lengths", "256"
    write(QUESTION)
    before = run(tmp_path / "out", *flags)
    assert run(tmp_path / "out", *flags) == before
    write(QUESTION | {"answers": ["Person"]})
    with pytest.raises(
        kvjax.InputError, match="task longbench, part trec, sample 0: the results are of another prompt"
    ):
        run(tmp_path / "out", *flags)


def copy_of_the_demo_model(model: Path) -> Path:
    return shutil.copytree(shipped.directory(), model, ignore=shutil.ignore_patterns("*.py", "dmc", "__pycache__"))


def scale_norm(model: Path, factor: float) -> None:
    weights = load_file(model / "model.safetensors")
    scaled = {"model.norm.weight": (weights["model.norm.weight"] * factor).astype(weights["model.norm.weight"].dtype)}
    save_file(weights | scaled, model / "model.safetensors")


def test_logits_that_are_not_finite_have_no_score(tmp_path):
    scale_norm(model := copy_of_the_demo_model(tmp_path / "model"), 1e38)
    flags = "--model", str(model), "--form", "short", "--methods", "full", "--samples", "1", "--batch", "1"
    for task in ("lines", "perplexity", "kl"):
        with pytest.raises(kvjax.InputError, match=f"{task} full: .*not finite"):
            run(tmp_path / task, "--tasks", task, *flags)
        assert lines(tmp_path / task) == []


def test_weights_that_have_changed_are_another_run(tmp_path):
    model = copy_of_the_demo_model(tmp_path / "model")
    flags = "--tasks", "kl", "--methods", "full", "--form", "short", "--reference", str(model)
    flags += "--samples", "1", "--batch", "1"
    for name, others in (("weights", ("--model", str(model))), ("reference_weights", ())):
        run(tmp_path / name, *flags, *others)
    scale_norm(model, 2)
    for name, others in (("weights", ("--model", str(model))), ("reference_weights", ())):
        with pytest.raises(kvjax.InputError, match=f"holds a run with {name} .*: choose another --out"):
            run(tmp_path / name, *flags, *others)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_results(tmp_path):
    flags = "--tasks", "lines,needle,kl", "--methods", "full,streaming_llm,h2o", "--budgets", "10%,20%", *SMALL
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    begin = lambda out: subprocess.Popen(
        [sys.executable, "-m", "kvjax.evaluate", *flags, "--samples", "8", "--out", out], cwd=tmp_path, env=environment
    )
    start = time.monotonic()
    assert begin("whole").wait() == 0
    took, rng = time.monotonic() - start, random.Random(0)
    kills = 0
    while kills < 5:
        process = begin("cut")
        try:
            process.wait(rng.uniform(0.1, 0.6) * took)
            (tmp_path / "cut" / "samples.jsonl").unlink()  # finished too early: begin anew
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    assert begin("cut").wait() == 0
    assert results(tmp_path / "cut") == results(tmp_path / "whole")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tasks", "lines,sudoku"], "unknown task 'sudoku': choose from lines, needle"),
        (["--tasks", "lines", "--methods", "h2p"], "unknown method 'h2p': choose from full"),
        (["--tasks", "lines", "--budgets", "120%"], "120%"),
        (["--tasks", "lines", "--lengths", "4097"], "--lengths 4097 is more than 4096, the model's context limit"),
        (["--tasks", "lines", "--lengths", "8"], "task lines does not fit into 8 tokens"),
        (["--tasks", "lines", "--lengths", "a"], "is not a list of lengths"),
        (["--tasks", "longbench"], "--data"),
        (["--tasks", "gsm8k", "--data", "nowhere"], "--data nowhere is not a folder"),
        (["--tasks", "kl", "--text", "nowhere"], "cannot read nowhere"),
        (["--tasks", "lines", "--samples", "0"], "--samples 0 is not a whole number from 1 to 10000"),
        (["--tasks", "lines", "--samples", "999999999999"], "--samples 999999999999 is not a whole number from 1"),
        (["--tasks", "lines", "--batch", "999999999999"], "--batch 999999999999 is not a whole number from 1"),
        (["--tasks", "lines", "--methods", "full", "--budgets", "x"], "--budgets 'x' is not a number of tokens"),
        (["--tasks", "lines", "--methods", "full", "--budgets", "20%"], "no method of this run takes a budget"),
        (["--tasks", "lines", "--budgets", ","], "--budgets names none"),
        (["--tasks", "lines", "--set", "needle.depths=3"], "--set needle: no such task or method in this run"),
        (["--tasks", "needle", "--set", "needle.depth=3"], "task needle has no argument 'depth'"),
        (["--tasks", "needle", "--set", "depths=3"], "name the task or method"),
        (["--tasks", "needle", "--set", "needle.depths=x"], "is not an int"),
        (["--model", "nowhere", "--tasks", "lines"], "nowhere"),
        (["--form", "poem"], "invalid choice"),
        (["--tasks", "lines", "--config", "nowhere.toml"], "cannot read nowhere.toml"),
        (["--tasks", "lines", "--methods", ""], "--methods names none"),
        (["--tasks", "lines", "--reference", "nowhere"], "--reference nowhere is for the task kl"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command.run(evaluate.PROG, lambda: evaluate.main(["--out", "out", *flags]))
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error and error.count("\n") == 1


def test_a_folder_holds_one_run(tmp_path):
    run(tmp_path, "--tasks", "lines", "--methods", "full")
    with pytest.raises(kvjax.InputError, match="holds a run with seed 0, not 1: choose another --out"):
        run(tmp_path, "--tasks", "lines", "--methods", "full", "--seed", "1")


def test_two_processes_do_not_share_a_folder(tmp_path):
    pytest.importorskip("fcntl")
    (tmp_path / "samples.jsonl").touch()
    with runner.results(tmp_path), pytest.raises(kvjax.InputError, match="another run is writing"):
        with runner.results(tmp_path):
            pass


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"task": "lines"}\n')
    with pytest.raises(kvjax.InputError, match=r"samples\.jsonl:1: 'part' is not"), runner.results(tmp_path):
        pass
