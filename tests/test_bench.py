"""The bench at tiny sizes: counted bytes, other libraries' results, tables, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import compilation
from kvjax.bench import __main__ as bench
from kvjax.bench import cases, kernels, memory, models, prefill, report, rivals, turns
from kvjax.bench.cases import Shape
from kvjax.cli import command
from kvjax.errors import InputError
from kvjax.methods import make
from pallas_kernels import tuning

TINY = Shape("llama-tiny", 64, 2)


def run(capsys, *flags: str) -> dict:
    bench.main([*flags, "--rounds", "1", "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(turns, "MEASURED", 1 << 16)
    monkeypatch.setattr(turns, "LEAST", 1e-6)
    monkeypatch.setattr(compilation, "enable_compilation_cache", lambda: None)


def test_the_other_libraries_attend_to_the_same_numbers():
    case = cases.attention(TINY, "dense", jnp.float32)
    want = np.asarray(case.run(*case.args, implementation="xla")).reshape(-1)
    for name in ("jax.nn", "torch"):
        if rivals.DECODE[name].reason("cpu") is None:
            call, _ = case.rivals[name]()
            np.testing.assert_allclose(np.asarray(call()).reshape(-1), want, rtol=1e-4, atol=1e-5)


def test_bytes_of_a_dense_cache_are_counted():
    k, g, h = TINY.heads
    case = cases.attention(TINY, "dense", jnp.bfloat16)
    cache = 2 * 2 * 2 * k * 64 * h
    assert cache <= case.bytes <= cache + 10 * 2 * k * g * h + 4 * 2 * k * (64 // 8 + 1)


def test_kernels(capsys, tmp_path):
    found = run(capsys, "kernels", "--shapes", "llama-tiny:64:1", "--stores", "int4", "--out", str(tmp_path))
    assert [s["title"].split()[0] for s in found["sections"]] == list(cases.KERNELS)
    for section in found["sections"]:
        assert section["rows"][0]["name"] == "xla" and section["rows"][0]["x xla"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"kernels.json", "kernels.md", "kernels.png"}


def test_the_limit_is_the_slower_of_bytes_and_products():
    limits = turns.Limits(copy=10.0, read=20.0, product=100.0)
    assert limits.seconds(40, 100) == 2.0 and limits.seconds(40, 500) == 5.0


@pytest.mark.parametrize("command", ["decode", "prefill", "kernels"])
def test_every_row_says_what_share_of_the_limit_it_reaches(command, capsys):
    flags = ["--model", "llama-tiny", "--contexts", "70", "--methods", "full,snapkv:50%"]
    flags = (
        ["--shapes", "llama-tiny:64:1", "--kernels", "decode_attention,column_sums"] if command == "kernels" else flags
    )
    for section in run(capsys, command, *flags)["sections"]:
        assert min(section["copy"], section["read"], section["product"]) > 0
        assert all(row["of_limit"] > 0 for row in section["rows"] if "failed" not in row)


def test_the_products_of_a_prompt_are_counted():
    spec = models.SHAPES["llama-tiny"]
    model = models.load("llama-tiny", "float32")
    matrices = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128  # of a layer: q and o, k and v, the MLP's
    seen = sum(range(1, 101)) * 2 * spec.num_heads * spec.head_dim
    want = 2 * spec.num_layers * (100 * matrices + seen)
    counted = prefill.contestant(model, "full", make("full"), 1, 100).flop
    assert counted == pytest.approx(want, rel=0.02)  # the diagonal of attention counts half


def test_wrong_results_are_no_times():
    case = cases.attention(TINY, "dense", jnp.float32)
    wrong = case._replace(
        run=lambda *args, implementation: case.run(*args, implementation="xla") * (1 + (implementation != "xla"))
    )
    right, bad = kernels.checked(wrong, ["xla", "cpu"], jnp.float32)
    assert right == {"name": "xla", "off": 0.0} and bad["failed"].startswith("wrong: ")


def test_a_report_that_cannot_be_written_is_one_line(tmp_path):
    seconds = report.Column("s", "seconds")
    (tmp_path / "decode.json").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*decode\.json: Is a directory"):
        report.tell(report.Report("decode", {}, [seconds], seconds, []), as_json=False, out=tmp_path)


def test_decode_with_an_imposed_gate(capsys):
    found = run(
        capsys, "decode", "--model", "llama-tiny", "--methods", "full,dmc", "--impose-cr", "4", "--contexts", "512",
        "--steps", "2", "--prefill", "cheap",
    )  # fmt: skip
    full, dmc = found["sections"][0]["rows"]
    assert full["tokens_per_slot"] == 1 and 2 < dmc["tokens_per_slot"] < 8


def test_the_table_is_read(monkeypatch, tmp_path, capsys):
    table = tmp_path / "table.json"
    flags = ("--kernels", "column_sums", "--shapes", "llama-tiny:256", "--table", str(table))
    run(capsys, "tune", *flags)
    (entry,) = tuning.read(table)
    assert entry["kernel"] == "column_sums" and entry["device"] == jax.devices()[0].device_kind
    tuning.write(table, [entry | {"settings": {"block": 64}}])
    monkeypatch.setenv(tuning.VARIABLE, str(table))
    near = entry["shape"] | {"tokens": 512}
    assert tuning.settings("column_sums", "xla", near, {"block": None}) == {"block": 64}
    assert tuning.settings("column_sums", "xla", near, {"block": 32}) == {"block": 32}
    assert tuning.settings("column_sums", "xla", near | {"width": 32}, {}) == {}


def test_the_largest_batch_is_the_last_that_fits():
    model, recipe = models.load("llama-tiny", "float32"), make("full")
    sizes = [memory.needed(model, recipe, 512, 8, batch, model.spec) for batch in (3, 4)]
    limit = int((sizes[0] + 1) / memory.USABLE) + 1
    assert limit * memory.USABLE < sizes[1]
    assert memory.largest_batch(model, recipe, 512, 8, limit, model.spec) == 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["fly"], "no command 'fly'"),
        (["kernels", "--kernels", "nothing"], "--kernels nothing: choose from"),
        (["kernels", "--shapes", "llama-tiny"], "give model:context"),
        (["decode", "--batch", "many"], "--batch many"),
        (["decode", "--batch", "max"], "give --memory"),
        (["decode", "--impose-cr", "8"], "--impose-cr is for dmc and dms"),
        (["--against", "rival"], "--against rival"),
        (["--contexts", "long"], "--contexts 'long'"),
        (["convert", "--dtypes", "int8"], "--dtypes int8"),
        (["--rounds", "0"], "--rounds 0"),
    ],
)
def test_wrong_flags_are_one_line(flags, said, capsys):
    with pytest.raises(SystemExit) as left:
        command.run(bench.PROG, lambda: bench.main(flags))
    error = capsys.readouterr().err
    assert left.value.code == 2 and said in error and error.count("\n") == 1
