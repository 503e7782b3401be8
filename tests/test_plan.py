"""Plans: what fits, what is known of models, and the arithmetic, against sizes that others publish or arrays have."""

import dataclasses
import json

import hypothesis
import hypothesis.strategies as st
import jax
import pytest
from huggingface_hub import constants

import kvjax
from kvjax import methods
from kvjax.checkpoint import shipped
from kvjax.cli import command
from kvjax.engine import capacity
from kvjax.errors import InputError
from kvjax.generation import prefill
from kvjax.generation.allocate import init_cache
from kvjax.models.named import HUB, NAMED, named
from kvjax.plan import aot, compiled, search
from kvjax.plan import estimate as estimates
from kvjax.plan.__main__ import main
from kvjax.plan.chips import CHIPS, find
from kvjax.plan.estimate import Parts, bound, estimate, weights
from kvjax.plan.flags import PROG, parse
from kvjax.plan.settings import Setting, find_model, setting

LLAMA = ["--model", "llama-3-8b", "--chip", "h200", "--estimate"]
# Numbers in all tensors, as the hub shows them beside each checkpoint.
PUBLISHED = {
    "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496, "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496, "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_248_023_552, "qwen2-7b": 7_615_616_512, "qwen3-8b": 8_190_735_360,
    "smollm3-3b": 3_075_098_624, "mixtral-8x7b": 46_702_792_704, "qwen3-30b-a3b": 30_532_122_624,
    "gpt-oss-20b": 20_914_757_184,
}  # fmt: skip


def planned(*flags: object, method: str = "full") -> Setting:
    args = parse([*LLAMA, *map(str, flags), "--all-methods"])  # so that a budget is for methods that take one
    return setting(args, find_model(args.model)[0], find(args.chip), method)


def run_json(capsys, *flags: object) -> dict:
    main([*map(str, flags), "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", NAMED)
def test_the_shapes_of_named_models_have_the_published_numbers_of_weights(name):
    args = parse(["--model", name, "--chip", "h200"])
    assert sum(weights(setting(args, NAMED[name], find("h200"), "full"))) == 2 * PUBLISHED[name]
    assert named(HUB[name]) == name


@pytest.mark.parametrize("entry", ["full", "h2o", "pyramidkv+store=int4", "mikv", "d2o", "fastkvzip"])
def test_an_estimate_counts_the_arrays_of_a_real_model_and_cache(entry):
    model = kvjax.load()
    method, arguments = methods.read_entry(entry)
    recipe = methods.make(method, None if method == "full" else "20%", arguments)
    made = Setting(model.spec, "float32", recipe, 300, 20, 3, "gpu")
    cache = init_cache(model.decoder, recipe, made.lengths)
    parts = estimate(made)
    assert parts.cache == sum(x.nbytes for x in jax.tree.leaves(cache))
    gates = [] if method in methods.GUIDED else [layer.keep for layer in model.decoder.layers]  # beside: not read
    assert parts.weights == sum(x.nbytes for x in jax.tree.leaves(model.decoder)) - sum(
        x.nbytes for x in jax.tree.leaves(gates)
    )


@hypothesis.given(
    st.integers(0, 200), st.integers(1, 20), st.integers(1, 9), st.integers(0, 2), st.integers(1, 400), st.data()
)
def test_the_largest_size_is_that_of_trying_all(first, slope, step, power, most, data):
    """What is needed rises in steps, as on a ladder of shapes, in proportion or faster."""
    needs = lambda n: first + slope * (-(-n // step) * step) ** power
    usable = data.draw(st.integers(0, needs(most) + 10))
    fitting = [n for n in range(1, most + 1) if needs(n) <= usable]
    assert search.largest(needs, usable, most) == max(fitting, default=0)


def test_the_largest_size_takes_few_tries():
    tried = []
    needs = lambda n: (tried.append(n), 16 * 10**9 + 123_456_789 * n)[1]
    assert search.largest(needs, 80 * 10**9, 2**16) == 518
    assert len(tried) <= 8


def test_a_size_is_verified_where_estimate_and_compiler_differ():
    """The compiler wants a tenth more than the estimate, and 7 from a size on that the estimate knows nothing of."""
    compiled_at = []

    def measured(n: int) -> int:
        compiled_at.append(n)
        return 110 * n + (7 if n > 50 else 0)

    found = search.verified(lambda n: 100 * n, measured, 11_000, 1000, (10, 1100))
    assert found == (99, True) and {99, 100} <= set(compiled_at)
    nothing = search.verified(lambda n: 100 * n, lambda n: 110 * n, 50, 1000, (10, 1100))
    assert nothing == (0, True)


def test_steps_of_few_layers_are_continued_to_all():
    line = lambda program, layers, beside, refused=False: {
        "program": program, "layers": layers, "beside": beside, "refused": refused
    }  # fmt: skip
    guess, layers = Parts(1, 2, 3, 4, 5, 600, 700), 32
    lines = [line("embed", 0, 10), line("prefill", 0, 50), line("step", 2, 100), line("step", 4, 110)]
    added = compiled.add_up(lines, guess, layers, exact=False)
    assert added.parts == guess._replace(prefill=50, decode=110 + 28 * 5) and not added.refused
    lines[1] = line("prefill", 0, None, refused=True)
    added = compiled.add_up(lines, guess, layers, exact=False)
    assert added.parts.prefill == 600 and added.refused == added.guessed == ["prefill"]
    added = compiled.add_up([line("prefill", 0, 80, True), line("step", 32, 90)], guess, layers, exact=True)
    assert added.parts == guess._replace(prefill=80, decode=90)
    assert added.refused == ["prefill"] and not added.guessed


def test_the_bound_is_bytes_over_bandwidth_or_products_over_peak():
    """Llama-3-8B: 15.0 GB of weights without the embedding, 131,072 bytes of cache a token; 4.8 TB/s, 989 TFLOP/s."""
    one = bound(planned("--context", 7168, "--new-tokens", 1024), find("h200"))
    assert one.limit == "bandwidth"
    assert one.step_s == pytest.approx((2 * (8_030_261_248 - 128256 * 4096) + 131_072 * 8192) / 4.8e12, rel=1e-3)
    assert one.tokens_per_s == pytest.approx(1 / one.step_s)
    many = bound(planned("--context", 16, "--new-tokens", 16, "--batch", 1024), find("t4"))
    assert many.limit == "compute"
    assert many.step_s == pytest.approx(2 * 1024 * (8_030_261_248 - 128256 * 4096) / 65e12, rel=0.01)


# What compilers say that reading prompts takes beside weights and cache, of JAX 0.10.2, its libtpu and CUDA plug-in:
# python -m kvjax.plan.compiled TARGET FLAGS --program "prefill of layer 0"
COMPILED = [  # chip, context, batch, changes, flags, method, bytes, how near the formula is
    ("v5p", 32768, 4, {}, "", "full", 6_066_149_820, 0.14),
    ("v5p", 32768, 4, {}, "", "mikv", 5_393_137_624, 0.21),
    ("v5p", 32768, 1, {"mlp_dim": 128}, "", "full", 1_585_065_244, 0.14),
    ("v5p", 4096, 2, {"mlp_dim": 128, "num_kv_heads": 32}, "", "full", 655_832_444, 0.14),
    ("v5e", 16384, 1, {}, "", "full", 672_224_764, 0.21),
    ("v5e", 16384, 1, {}, "--store int4", "full", 569_987_580, 0.42),
    ("v5e", 16384, 1, {}, "--model llama-3.2-1b", "full", 321_792_508, 0.26),
    ("v5e", 32768, 2, {}, "--mesh data=2,model=4", "full", 546_711_036, 0.14),
    ("v5e", 131072, 1, {}, "--mesh model=8", "full", 1_564_201_724, 0.14),
    ("v5e", 131072, 1, {}, "--mesh model=8", "mikv", 1_900_176_888, 0.14),
    ("v5e", 131072, 1, {}, "--mesh model=8", "adakv", 1_770_511_484, 0.14),
    ("h200", 32768, 4, {}, "", "full", 4_093_680_044, 0.02),
    ("h200", 32768, 4, {}, "", "h2o", 4_093_644_476, 0.02),
    ("h200", 8192, 2, {"mlp_dim": 128}, "", "full", 598_485_412, 0.02),
    ("h200", 8192, 2, {"mlp_dim": 128, "num_kv_heads": 32}, "", "full", 813_715_876, 0.02),
    ("h200", 131072, 1, {}, "--mesh model=8", "full", 1_543_506_336, 0.02),
]


@pytest.mark.parametrize("chip, context, batch, changes, flags, method, beside, near", COMPILED)
def test_what_prompts_take_is_near_what_compilers_say(chip, context, batch, changes, flags, method, beside, near):
    made = planned(
        "--chip", chip, "--context", context, "--batch", batch, "--budget", "20%", *flags.split(), method=method
    )
    made = made._replace(spec=dataclasses.replace(made.spec, **changes))
    parts = estimate(made)
    assert parts.prefill == pytest.approx(beside, rel=near)
    assert parts.peak == pytest.approx(parts._replace(prefill=beside).peak, rel=0.05)


@pytest.mark.usefixtures("optimized")
def test_a_prompt_in_parts_takes_less_memory():
    """By the stream of the tokens that are read at once, here the widest array: fewer take so much less."""
    made = planned("--context", 8000, "--batch", 1)
    small = dict(num_layers=1, embed_dim=8192, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=256)
    made = made._replace(spec=dataclasses.replace(made.spec, **small))
    args, static = estimates.layer_arguments(made, estimates.abstract_cache(made), 0)
    compile_layer = lambda chunk: prefill._prefill_layer.lower(*args, **static, chunk=chunk).compile()
    temp = lambda chunk: compile_layer(chunk).memory_analysis().temp_size_in_bytes
    padded, width = args[1].shape[1:]
    assert temp(64) + prefill.at_once(1, padded, 8192) * width * args[1].dtype.itemsize < temp(8192)


def test_a_device_of_a_mesh_has_its_part():
    lengths = ["--context", 8192, "--new-tokens", 128, "--batch", 4, "--budget", "20%"]
    one = estimate(planned(*lengths, method="h2o"))
    each = estimate(planned(*lengths, "--mesh", "data=2,model=4", method="h2o"))
    assert each.cache == pytest.approx(one.cache / 8, rel=0.01)
    assert each.weights == pytest.approx(one.weights / 4, rel=0.01)
    lone = estimate(planned(*lengths, "--mesh", "data=1,model=16", method="h2o"))  # two devices a head
    assert lone.cache == pytest.approx(one.cache / 8, rel=0.01)
    assert bound(planned(*lengths, "--mesh", "model=4"), find("h200")).tokens_per_s == pytest.approx(
        4 * bound(planned(*lengths), find("h200")).tokens_per_s, rel=0.02
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(set(methods.METHODS) - set(methods.LEARNED)))
def test_a_long_prompt_fits_on_eight_small_chips(method, capsys):
    if reason := aot.missing("v5e"):
        pytest.skip(reason)
    flags = ["--model", "llama-3-8b", "--context", 131072, "--chip", "v5e", "--mesh", "model=8"]
    budget = [] if method == "full" else ["--budget", "20%"]
    (plan,) = run_json(capsys, *flags, "--method", method, *budget)["plans"]
    assert plan["fits"] and not plan["refused"]
    made = estimate(planned("--chip", "v5e", "--context", 131072, "--mesh", "model=8", *budget, method=method))
    assert 0.95 * plan["bytes"]["peak"] < made.peak < 1.05 * plan["bytes"]["peak"]


def test_a_plan_adds_up_and_its_largest_sizes_fit(capsys):
    lengths = ["--context", 32768, "--batch", 4, "--budget", "20%"]
    found = run_json(capsys, *LLAMA, *lengths, "--method", "h2o")
    (plan,) = found["plans"]
    size, usable = plan["bytes"], found["chip"]["usable"]
    assert size["cache"] == sum(size[part] for part in ("codes", "scales", "statistics", "tables"))
    assert size["peak"] == size["weights"] + size["cache"] + max(size["prefill"], size["decode"])
    assert plan["fits"] and not plan["compiled"]
    for flag, unit in (("batch", 1), ("context", 64)):
        most = plan["largest"][flag]["size"]
        at = [estimate(planned(*lengths, f"--{flag}", n, method="h2o")).peak for n in (most, most + unit)]
        assert at[0] <= usable < at[1]
    assert any("8,192 tokens" in note for note in found["notes"])


ALL = ["--model", str(shipped.directory()), "--chip", "T4", "--estimate", "--context", "500", "--budget", "20%"]
ALL += ["--all-methods", "--store", "int4"]


SERVE = ["--serve", "--model", "llama-3-8b", "--context", 8192, "--new-tokens", 512]


def test_a_plan_of_a_server_has_the_full_cache_beside_it(capsys):
    """Half the memory that is left for the cache is half the requests; without another a chip has its own."""
    rooms = lambda *flags: run_json(capsys, *SERVE, "--method", "h2o", "--budget", "20%", *flags)["serving"]
    full, h2o = rooms("--memory", "64GB")
    assert (full["method"], h2o["method"]) == ("full", "h2o") and 4 < h2o["at_once"] / full["at_once"] < 6
    for each in (full, h2o):
        assert each["weights"] + each["reading"] + each["cache"] < 64e9
        assert all(n * each["at_once"] <= size for n, size in zip(each["promised"], each["pages"], strict=True))
        assert 0.95 * each["seats"] <= each["at_once"] <= each["seats"]
    half = 64e9 - (64e9 - full["weights"] - full["reading"]) / 2
    assert rooms("--memory", f"{int(half)}")[0]["seats"] == pytest.approx(full["seats"] / 2, abs=1)
    assert rooms("--chip", "t4")[0]["seats"] == 0 < rooms("--chip", "h200")[0]["seats"]
    main([*map(str, SERVE), "--memory", "64GB"])
    assert f"{full['seats']} " in capsys.readouterr().out


@pytest.mark.parametrize("method", ["full", "h2o", "mikv"])
def test_as_many_requests_fit_as_an_engine_has_pages_for(method):
    """The formula, and what is counted of an engine's arrays."""
    model, recipe = kvjax.load(), methods.make(method, None if method == "full" else "20%")
    one, size = capacity.kind_of(model.decoder, recipe, 1, 1024), capacity.Asked(600, 100)
    limit = 20 * one.nbytes(one.longest)
    count = capacity.at_once(one, limit, size)
    held = lambda seats: capacity.holds(model.decoder, recipe, seats, 1024, limit, size)
    assert count > 20 and held(count - 1) == count - 1 and held(count + 2) < count + 2


def test_a_table_of_all_methods_and_a_picture(tmp_path, capsys):
    picture = tmp_path / "plan.png"
    found = run_json(capsys, *ALL, "--out", picture)
    assert {plan["method"] for plan in found["plans"]} == set(methods.METHODS) - set(methods.LEARNED)
    assert set(found["left_out"]) == set(methods.LEARNED)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    by_name = {plan["method"]: plan["bytes"]["cache"] for plan in found["plans"]}
    assert by_name["h2o"] < by_name["full"]
    assert any("bfloat16" in note for note in found["notes"])


def test_a_table_in_a_pipe_is_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    main(ALL)
    out = capsys.readouterr().out
    assert "…" not in out and "oracle (frees nothing)" in out and "largest context" in out


def test_a_hub_id_is_looked_up_in_the_cache_then_among_known_shapes(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    spec, source = find_model("meta-llama/Llama-3.1-8B-Instruct")
    assert spec == NAMED["llama-3.1-8b"] and "known shape" in source
    snapshot = tmp_path / "models--meta-llama--Llama-3.1-8B-Instruct" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 3}))
    spec, source = find_model("meta-llama/Llama-3.1-8B-Instruct")
    assert spec.num_layers == 3 and "cache" in source
    with pytest.raises(kvjax.InputError, match="a plan downloads nothing"):
        find_model("some/model")


@pytest.mark.parametrize(
    "message, flags",
    {
        "cannot be split over the devices of --mesh data=2": [*LLAMA, "--mesh", "data=2"],
        "'devices=8' is not of the form data=2,model=4": [*LLAMA, "--mesh", "devices=8"],
        "14336 wide, model must divide it": [*LLAMA, "--mesh", "model=3"],
        "--model is missing": ["--chip", "v5e"],
        "--chip is missing": ["--model", "llama-3-8b"],
        "unknown chip 'v9': choose from v4": ["--model", "llama-3-8b", "--chip", "v9"],
        "nothing compiles for T4 ahead of time: add --estimate": ["--model", "llama-3-8b", "--chip", "t4"],
        "--context 0 is not": [*LLAMA, "--context", "0"],
        "--batch 100000 is not": [*LLAMA, "--batch", "100000"],
        "--all-methods plans --method h2o too": [*LLAMA, "--all-methods", "--method", "h2o"],
        "--estimate compiles nothing: leave --exact out": [*LLAMA, "--exact"],
        "not a shape that is known": ["--model", "gpt-5", "--chip", "v5e", "--estimate"],
        "unknown method 'h3o'": [*LLAMA, "--method", "h3o"],
        "kernels=tpu cannot run on H200": [*LLAMA, "--kernels", "tpu"],
        "pictures are PNG files": [*LLAMA, "--out", "plan.svg"],
        "--memory is for --serve": [*LLAMA, "--memory", "1GB"],
        "--longest 5 is less than": [*LLAMA, "--serve", "--longest", "5"],
        "leave --mesh and --out out": [*LLAMA, "--serve", "--mesh", "data=1"],
        "--seats 0 is not": [*LLAMA, "--serve", "--seats", "0"],
        "this model has no gate": [*LLAMA, "--method", "dmc"],
    }.items(),
)
def test_wrong_flags_are_one_line(message, flags, capsys):
    with pytest.raises(SystemExit) as exit_:
        command.run(PROG, lambda: main(flags))
    out, error = capsys.readouterr()
    assert exit_.value.code == 2 and not out
    assert message in error and error.startswith(f"{PROG}: error: ") and error.count("\n") == 1


def test_chips_that_cannot_be_compiled_for_say_so():
    assert [name for name, chip in CHIPS.items() if chip.target is None] == ["t4"]
    for chip in CHIPS.values():
        assert chip.usable <= chip.memory


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["h200", "v5e"])
@pytest.mark.parametrize("method", ["full", "h2o", "dynamickv"])
def test_a_compiled_plan_is_within_a_twentieth_of_its_estimate(chip, method, tmp_path, capsys):
    """Four layers as wide as Llama-3-8B's: all of a step is compiled, and part by part the estimate is near."""
    if reason := aot.missing(str(find(chip).target)):
        pytest.skip(reason)
    config = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4, "num_key_value_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    flags = ["--model", tmp_path, "--chip", chip, "--context", 8192, "--batch", 2, "--method", method]
    flags += [] if method == "full" else ["--budget", "20%"]
    (real,), (guess,) = (run_json(capsys, *flags, *more)["plans"] for more in ((), ("--estimate",)))
    assert real["compiled"] and not real["refused"]
    assert guess["bytes"]["peak"] == pytest.approx(real["bytes"]["peak"], rel=0.05)
    assert guess["bytes"]["prefill"] == pytest.approx(real["bytes"]["prefill"], rel=0.05)


@pytest.mark.slow
def test_a_program_that_does_not_fit_is_numbers():
    """16 GB for prompts that take 34: the compiler refuses, and says how many bytes it wanted."""
    if reason := aot.missing("v5e"):
        pytest.skip(reason)
    flags = ["--model", "llama-3-8b", "--chip", "v5e", "--context", "131072", "--batch", "4"]
    (line,) = aot.run("v5e", "kvjax.plan.compiled", *flags, "--program", "prefill of layer 0")
    assert line["refused"] and line["beside"] is not None
    args = parse(flags)
    guess = estimate(setting(args, NAMED["llama-3-8b"], find("v5e"), "full"))
    assert line["beside"] == pytest.approx(guess.prefill, rel=0.2)  # what it states is before it has found an order


def test_lines_are_heard_and_a_crash_of_the_compiler_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "crashes.py").write_text('import os\nprint(\'{"program": "embed"}\', flush=True)\nos.abort()\n')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    heard = []
    with pytest.raises(InputError, match=r"the compiler for v5e crashed after 'embed': .*--estimate"):
        aot.run("v5e", "crashes", heard=heard.append)
    assert heard == [{"program": "embed"}]
