"""lm-evaluation-harness with kvjax as its model, against a pass without cache and kvjax without lm_eval."""

import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import kvjax
from kvjax import methods
from kvjax.checkpoint import shipped
from kvjax.errors import InputError
from kvjax.evaluation.harness_arguments import GenerationArguments, cut_at, read_generation_arguments
from kvjax.generation.sampling import Sampling
from kvjax.policies.base import Recipe
from kvjax.tasks import lines
from tests.lib.later import Later
from tests.lib.matrix import reference

lm_eval, harness = Later("lm_eval"), Later("kvjax.evaluation.harness")

ROOT = Path(__file__).parent.parent
DOCS, TOKENS, CHOICES = 5, 70, 3
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ '\n! ' if add_generation_prompt }}"
REQUESTS = {
    "choice": """
        output_type: multiple_choice
        doc_to_text: "{{prompt}}"
        doc_to_target: "{{label}}"
        doc_to_choice: "{{choices}}"
        metric_list: [{metric: acc}]""",
    "generate": """
        output_type: generate_until
        doc_to_text: "{{prompt}}"
        doc_to_target: "{{choices[label]}}"
        generation_kwargs: {until: ["\\n"], max_gen_toks: 5, do_sample: false, temperature: 0.0}
        metric_list: [{metric: exact_match}]
        filter_list: [{name: strip, filter: [{function: remove_whitespace}, {function: take_first}]}]""",
    "rolling": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{prompt}}"
        metric_list: [{metric: byte_perplexity}]""",
}


@functools.cache
def model() -> kvjax.Model:
    return kvjax.load(dtype=jnp.float32)


def encode(text: str, special: bool = True) -> list[int]:
    tokenizer = model().tokenizer
    assert tokenizer is not None
    return tokenizer.encode(text, special)


@functools.cache
def docs() -> list[dict]:
    """Prompts of different lengths with answers among which the right one is at different places."""
    out = []
    for seed in range(DOCS):
        rng = lines.scoring_rng(seed)
        prompt, right = lines.prompt(rng, TOKENS - 10 * (3 * seed % DOCS))
        wrong = [" ".join(map(str, rng.integers(100, 500, 2))) for _ in range(CHOICES - 1)]
        choices = [*wrong[: seed % CHOICES], right.strip(), *wrong[seed % CHOICES :]]
        out.append({"prompt": prompt, "choices": choices, "label": seed % CHOICES})
    return out


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs()), encoding="utf-8")
    kwargs = json.dumps({"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")})
    for name, request in REQUESTS.items():
        head = f"task: kvjax_{name}\ndataset_path: json\ndataset_kwargs: {kwargs}\ntest_split: test"
        body = "\n".join(line.removeprefix(" " * 8) for line in request.splitlines())
        (folder / f"{name}.yaml").write_text(head + body + "\n", encoding="utf-8")
    return folder


def evaluate(tasks: Path, model_args: str, *names: str) -> dict:
    """lm_eval's results for all tasks, in batches that do not come out even."""
    assert harness.HarnessModel  # once it is imported, lm_eval knows the name
    found = lm_eval.simple_evaluate(
        "kvjax", f"dtype=float32,{model_args}", [f"kvjax_{name}" for name in names or REQUESTS], batch_size=8,
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False), bootstrap_iters=0,
    )  # fmt: skip
    assert found is not None
    return found


@pytest.fixture(scope="module")
def full(tasks):
    return evaluate(tasks, "max_length=32")


def answers(results: dict, name: str) -> list:
    samples = sorted(results["samples"][f"kvjax_{name}"], key=lambda sample: sample["doc_id"])
    return [[x[0] for x in sample["resps"]] for sample in samples]


def forward(tokens: list[int], start: int) -> tuple[float, bool]:
    """Log-probability of `tokens[start:]` given what is before them and whether they are the likeliest: no cache."""
    logits = reference(model().decoder, tokens)[start - 1 : -1].astype(np.float64)
    target = np.asarray(tokens[start:])
    logprobs = scipy.special.log_softmax(logits, axis=-1)[np.arange(len(target)), target]
    return logprobs.sum(), bool((logits.argmax(axis=-1) == target).all())


def pairs() -> list[tuple[list[int], list[int]]]:
    """Contexts and continuations of all choices of all documents."""
    return [(encode(d["prompt"]), encode(" " + choice, special=False)) for d in docs() for choice in d["choices"]]


def of_documents(values: list) -> list[list]:
    return [values[i : i + CHOICES] for i in range(0, len(values), CHOICES)]


def judged(recipe: Recipe) -> list[list[tuple[float, bool]]]:
    """What `log_likelihood` says of all choices, in one batch."""
    contexts, continuations = [a for a, _ in pairs()], [b for _, b in pairs()]
    judgements, _ = model().log_likelihood(contexts, continuations, recipe)
    return of_documents([(float(j.logprobs.sum()), j.greedy) for j in judgements])


def texts(prompts: list, recipe: Recipe) -> list[str]:
    """First lines of what `kvjax.generate` makes of prompts, in one batch."""
    sequences = model().generate(prompts, recipe, max_new_tokens=5).sequences
    assert any("\n" in str(sequence.text) for sequence in sequences)
    return [str(sequence.text).split("\n")[0] for sequence in sequences]


def assert_equal_pairs(found: list, expected: list) -> None:
    np.testing.assert_allclose(np.asarray(found, float), np.asarray(expected, float), atol=2e-3)


def test_the_full_caches_choices_are_those_of_a_pass_without_cache(tasks):
    results = evaluate(tasks, "method=full", "choice")
    expected = of_documents([forward(context + choice, len(context)) for context, choice in pairs()])
    assert_equal_pairs(answers(results, "choice"), expected)
    best = [max(range(CHOICES), key=lambda i: row[i][0]) for row in expected]
    accuracy = np.mean([i == doc["label"] for i, doc in zip(best, docs(), strict=True)])
    assert results["results"]["kvjax_choice"]["acc,none"] == accuracy == 1.0
    assert {greedy for row in expected for _, greedy in row} == {True, False}


def test_long_contexts_are_cut_from_the_left(full):
    whole = [context + choice for context, choice in pairs()]
    assert max(map(len, whole)) > 33 > min(map(len, whole))
    expected = of_documents([forward(tokens[-33:], len(tokens[-33:]) - 2) for tokens in whole])
    assert_equal_pairs(answers(full, "choice"), expected)


def test_generation_is_cut_at_the_stop_string_and_its_prompt_from_the_left(full):
    expected = texts([encode(doc["prompt"])[-27:] for doc in docs()], methods.full())  # 32 - 5 new tokens
    assert [row[0] for row in answers(full, "generate")] == expected
    right = [text.strip() == doc["choices"][doc["label"]] for text, doc in zip(expected, docs(), strict=True)]
    assert full["results"]["kvjax_generate"]["exact_match,strip"] == np.mean(right)


def test_rolling_likelihood_is_that_of_windows_without_cache(full):
    size, total, length = 32, 0.0, 0
    for doc, row in zip(docs(), answers(full, "rolling"), strict=True):
        tokens, expected = encode(doc["prompt"]), 0.0
        for done in range(0, len(tokens) - 1, size):
            end = min(done + size, len(tokens) - 1)
            window = tokens[max(0, end - size) : end + 1]
            expected += forward(window, len(window) - (end - done))[0]
        assert row[0] == pytest.approx(expected, abs=2e-3)
        total, length = total + expected, length + len(doc["prompt"].encode())
    assert full["results"]["kvjax_rolling"]["byte_perplexity,none"] == pytest.approx(np.exp(-total / length), rel=1e-4)


def test_a_compressed_cache_scores_as_without_the_harness(tasks):
    results, recipe = evaluate(tasks, "method=tova,budget=8", "choice", "generate"), methods.tova(budget=8)
    expected, exact = judged(recipe), judged(methods.full())
    assert_equal_pairs(answers(results, "choice"), expected)
    assert np.abs(np.subtract(expected, exact, dtype=float)[..., 0]).max() > 0.1
    assert [row[0] for row in answers(results, "generate")] == texts([doc["prompt"] for doc in docs()], recipe)
    cache = results["config"]["kv_cache"]
    assert (cache["method"], cache["budget"]) == ("tova", 8)
    assert 0 < cache["cache_bytes"] < cache["full_bytes"]
    assert results["config"]["model_dtype"] == "float32"


@pytest.mark.slow
def test_the_command_line(tasks, tmp_path):
    command = [sys.executable, "-m", "kvjax.evaluation.harness"]
    model = ["--model", "kvjax", "--model_args", "method=snapkv,budget=50%,window=4", "--batch_size", "8"]
    task = ["--tasks", "kvjax_choice", "--include_path", str(tasks), "--output_path", str(tmp_path)]
    folders = {"HF_HOME": str(tmp_path / "hf"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment = os.environ | folders | {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, *model, *task], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "kvjax_choice" in done.stdout
    assert "of full ones" in done.stderr
    (found,) = tmp_path.rglob("results_*.json")
    cache = json.loads(found.read_text())["config"]["kv_cache"]
    assert (cache["method"], cache["budget"], cache["window"]) == ("snapkv", "50%", 4)


def request(kind: str, *arguments) -> list:
    return [lm_eval.api.instance.Instance(kind, {}, arguments, 0)]


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """The demo model with a chat template."""
    folder, source = tmp_path_factory.mktemp("chat"), Path(shipped.directory())
    for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).symlink_to(source / name)
    config = json.loads((source / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return harness.HarnessModel(str(folder), dtype="float32")


def test_a_chat_template_writes_the_first_token_itself(chat):
    history = [{"role": "user", "content": "acorn: 217 130"}, {"role": "assistant", "content": "acorn:"}]
    text = chat.apply_chat_template(history[:1])
    assert text == "<|begin|>acorn: 217 130\n! "
    assert chat.tok_encode(text) == encode("acorn: 217 130\n! ")
    assert chat.apply_chat_template([*history[:1], {"role": "assistant", "content": "acorn:"}], False).endswith(
        "! acorn:"
    )
    assert "/" not in chat.tokenizer_name


def test_an_empty_context_is_the_first_token(chat):
    ((found, greedy),) = chat.loglikelihood(request("loglikelihood", "", "acorn: 217"))
    tokens = encode("acorn: 217")
    expected, likeliest = forward(tokens, 1)
    assert (found, greedy) == (pytest.approx(expected, abs=1e-3), likeliest)
    (text,) = chat.generate_until(request("generate_until", "", {"max_gen_toks": 3}))
    assert text == model().generate([tokens[:1]], max_new_tokens=3).sequences[0].text


def test_repeats_of_a_sampled_request_differ_and_the_run_can_be_repeated_in_other_batches():
    asked = {"do_sample": True, "temperature": 3.0, "max_gen_toks": 4}
    requests = request("generate_until", "acorn: 217 130\n! ", asked) * 3
    models = harness.HarnessModel(dtype="float32"), harness.HarnessModel(dtype="float32", batch_size=2)
    first, second = (model.generate_until(requests, disable_tqdm=True) for model in models)
    assert first == second
    assert len(set(first)) > 1


@pytest.mark.parametrize(
    "arguments, how",
    [
        ({}, Sampling()),
        ({"do_sample": False, "temperature": 0.7, "num_beams": 1}, Sampling()),
        ({"temperature": 0.7, "top_p": 0.9}, Sampling(temperature=0.7, top_p=0.9)),
        ({"do_sample": True, "top_k": 5}, Sampling(temperature=1.0, top_k=5)),
        ({"do_sample": True, "temperature": 0, "seed": 3}, Sampling(seed=3)),
    ],
)
def test_generation_arguments(arguments, how):
    assert read_generation_arguments(arguments, 256) == GenerationArguments((), 256, how)


def test_the_first_name_of_the_most_tokens_and_the_first_stop_string_count():
    asked = read_generation_arguments({"max_tokens": 3, "max_new_tokens": 2, "until": ["b", "", "a"]}, 256)
    assert (asked.new, asked.until) == (2, ("b", "", "a"))
    assert cut_at("xxaxb", asked.until) == "xx"
    assert cut_at("xx", asked.until) == "xx"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_beams": 4}, "kvjax has no num_beams: it takes until, max_gen_toks, do_sample, temperature"),
        ({"do_sample": "maybe"}, "do_sample=maybe is not true or false"),
        ({"top_k": 1.5}, "top_k=1.5 is not a whole number"),
        ({"temperature": "hot"}, "temperature=hot is not a number"),
        ({"temperature": -1}, "temperature -1.0 is not a number >= 0"),
        ({"max_gen_toks": 0}, "max_gen_toks=0 is not a whole number from 1 to"),
    ],
)
def test_generation_arguments_that_cannot_be_met(arguments, message):
    with pytest.raises(InputError, match=message):
        read_generation_arguments(arguments, 256)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"method": "nope"}, "unknown method 'nope': choose from full"),
        ({"method": "snapkv", "windw": 4}, "method snapkv has no argument 'windw': it takes"),
        ({"budget": "20%"}, "method full keeps everything and takes no budget"),
        ({"batch_size": "auto"}, "batch_size=auto is not a whole number"),
        ({"max_length": 4097}, "max_length=4097 is not a whole number from 1 to 4096"),
        ({"dtype": "int4"}, "dtype=int4 is not one of float32, bfloat16"),
    ],
)
def test_model_arguments_that_cannot_be_met(arguments, message):
    with pytest.raises(InputError, match=message):
        harness.HarnessModel(**arguments)


def test_requests_that_cannot_be_met(chat):
    small = harness.HarnessModel(dtype="float32", max_length=4)
    with pytest.raises(InputError, match="a continuation has 6 tokens, at most 4 can be scored"):
        small.loglikelihood(request("loglikelihood", "acorn:", " 217 130 217 130 217 130"))
    with pytest.raises(InputError, match="max_gen_toks=256 leaves no room for a prompt in 4 tokens"):
        small.generate_until(request("generate_until", "acorn:", {}))
    with pytest.raises(InputError, match="no chat template"):
        small.apply_chat_template([{"role": "user", "content": "acorn:"}])
    with pytest.raises(InputError, match="give --apply_chat_template no name"):
        chat.chat_template("tool_use")


def test_lm_eval_finds_the_class_that_the_package_names():
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lm_eval.models"]["kvjax"]
    assert importlib.metadata.EntryPoint("kvjax", entry, "lm_eval.models").load() is harness.HarnessModel
    assert lm_eval.api.registry.get_model("kvjax") is harness.HarnessModel
