"""What low-rank keys and values cost and lose: against numpy's singular values, and costs counted by hand."""

import dataclasses
import importlib.util
import json
import math
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import kvjax.convert
from kvjax import inspect
from kvjax.checkpoint import shipped
from kvjax.cli import command
from kvjax.inspection import lorc_report
from kvjax.spec import LatentSpec, ModelSpec
from tests import golden

LAYERS, N, K, H = 6, 4, 2, 32  # of the demo model
FLAGS = ("--lorc", "keep=50%,rule=energy", "--lorc-groups", "1", "--lorc-hadamard")
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="draws")


def run(capsys, *argv) -> str:
    inspect.main(["lorc", *map(str, argv)])
    return capsys.readouterr().out


def run_json(capsys, *argv) -> dict:
    """What `--json` prints, and that it prints nothing else, nor numbers that JSON has not."""
    lines = run(capsys, *argv, "--json").splitlines()
    assert len(lines) == 1
    return json.loads(lines[0], parse_constant=pytest.fail)


@pytest.fixture(scope="module")
def projections() -> list[list[np.ndarray]]:
    """The demo model's key and value projections [D K*H] of each layer."""
    tensors = load_file(shipped.directory() / "model.safetensors")
    name = "model.layers.{}.self_attn.{}_proj.weight"
    return [[tensors[name.format(i, side)].astype(np.float64).T for side in "kv"] for i in range(LAYERS)]


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """The demo model with a latent per head, turned."""
    target = tmp_path_factory.mktemp("converted") / "narrow"
    kvjax.convert.main([str(shipped.directory()), str(target), *FLAGS, "--lorc-basis", "plain"])
    return target


@pytest.fixture(scope="module")
def plainly_converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    kvjax.convert.main([str(golden.write_checkpoint("llama_gqa", folder / "source")), str(folder / "target")])
    return folder / "target"


# --- what is lost ---


@pytest.mark.parametrize("heads", [1, 2])
def test_spectra_condition_and_energy_are_numpys(heads, projections, capsys):
    flags = ["--lorc-groups", heads, "--lorc", "keep=50%,rule=energy"]
    report = run_json(capsys, *flags)
    assert (report["groups"], report["channels"], report["spectra_of"]) == (K // heads, heads * H, "weights")
    for layer, kernels in zip(report["layers"], projections, strict=True):
        for side, kernel in enumerate(kernels):
            groups = np.split(kernel, K // heads, axis=1)
            singular = np.stack([np.linalg.svd(group, compute_uv=False) for group in groups])
            np.testing.assert_allclose(layer["spectra"][side], singular, rtol=1e-8)
            np.testing.assert_allclose(layer["condition"][side], [np.linalg.cond(group) for group in groups], rtol=1e-8)
            left = [np.linalg.svd(group, full_matrices=False) for group in groups]
            rank = layer["ranks"][side]
            best = [(u[:, :rank] * s[:rank]) @ v[:rank] for u, s, v in left]
            share = sum(np.sum(part**2) for part in best) / np.sum(kernel**2)
            assert layer["energy"][side] == pytest.approx(share, rel=1e-8)


def test_whitened_ranks_are_judged_by_what_the_projections_make_of_the_text(projections, tmp_path, capsys):
    """Layer 0 sees normed embeddings: its keys can be made by hand."""
    text = "".join(map(chr, np.random.default_rng(0).integers(33, 127, 800)))
    (tmp_path / "text.txt").write_text(text)
    flags = ["--lorc-basis", "whiten", "--lorc-text", tmp_path / "text.txt"]
    report = run_json(capsys, *flags)
    assert report["spectra_of"] == "outputs" and report["lorc"]["text"] == "text.txt"
    model = kvjax.load()
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(text)
    assert len(ids) < 1024
    ids = ids[: len(ids) // 64 * 64]  # one sequence, of whole blocks of attention
    x = np.asarray(model.decoder.layers[0].attention_norm(model.decoder.embed(jnp.asarray(ids))), np.float64)
    for side, kernel in enumerate(projections[0]):
        singular = np.linalg.svd(x @ kernel, compute_uv=False)
        np.testing.assert_allclose(report["layers"][0]["spectra"][side][0][:40], singular[:40], rtol=1e-3)
        share = np.sum(singular[: report["layers"][0]["ranks"][side]] ** 2) / np.sum(singular**2)
        assert report["layers"][0]["energy"][side] == pytest.approx(share, rel=1e-4)
        assert report["layers"][0]["condition"][side] == [pytest.approx(np.linalg.cond(kernel), rel=1e-6)]


def test_small_singular_values_are_noise_and_zeros_lose_nothing():
    noise = np.array([[2.0, 1.0, 1e-9], [4.0, 4.0, 4.0]])
    np.testing.assert_allclose(lorc_report.relative(noise), [[1, 0.5, 1e-6], [1, 1, 1]])
    zeros = np.zeros((1, 3))
    assert (lorc_report.relative(zeros) == 1).all() and lorc_report.energy(zeros, 1) == 1.0
    assert lorc_report.energy(np.array([[2.0, 1.0], [1.0, 1.0]]), 1) == pytest.approx(5 / 7)


def test_a_kernel_of_less_rank_has_a_finite_condition_number(tmp_path, capsys):
    source = golden.write_checkpoint("llama_gqa", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    key = tensors["model.layers.0.self_attn.k_proj.weight"]
    key[1:] = key[0]
    tensors["model.layers.0.self_attn.v_proj.weight"][:] = 0
    save_file(tensors, source / "model.safetensors")
    first = run_json(capsys, source)["layers"][0]
    assert first["condition"] == [[pytest.approx(1e6)], [1.0]]
    assert first["energy"] == [pytest.approx(1.0), 1.0]


# --- what it costs ---


def test_costs_by_hand():
    """2 latents of 3 heads of 4 channels, for 12 query heads; ranks 5 and 7."""
    dense = ModelSpec(8, 8, 1, 12, 6, 4, 8, 16)
    assert lorc_report.cost(dense, 0) == (2 * (6 * 4 + 6 * 4), 2 * 12 * 4 + 2 * 12 * 4) == (96, 192)
    latents = dataclasses.replace(dense, latent=LatentSpec(3, ((5, 7),)))
    size, flop = lorc_report.cost(latents, 0)
    assert size == 2 * (2 * 5 + 2 * 7) == 48
    assert flop == 2 * (2 * 5 * 12) + 2 * (12 * 12) + 2 * (12 * 7) == 696


@pytest.mark.parametrize("heads", [1, 2])
def test_costs_of_the_demo_model(heads, capsys):
    report = run_json(capsys, "--lorc-groups", heads)
    groups, n, costs = K // heads, heads * H, []
    for layer in report["layers"]:
        rank, width = layer["ranks"]
        costs.append((2 * groups * (rank + width), 2 * groups * rank * n + 2 * N * n + 2 * N * width))
        assert (layer["bytes"], layer["flop"]) == costs[-1]
    assert tuple(report["total"].values()) == tuple(map(sum, zip(*costs, strict=True)))
    assert report["dense"] == {"bytes": LAYERS * 2 * 2 * K * H, "flop": LAYERS * 4 * N * H}


# --- before and after ---


def test_a_converted_checkpoint_has_the_ranks_costs_and_spectra_that_were_announced(converted, capsys):
    before, after = run_json(capsys, *FLAGS), run_json(capsys, converted)
    about = json.loads((converted / "kvjax.json").read_text())
    for report in (before, after):
        assert (report["latent"], report["lorc"]) == (about["latent"], about["lorc"])
    assert [layer["ranks"] for layer in before["layers"]] == before["latent"]["ranks"]
    assert len({str(layer["ranks"]) for layer in before["layers"]}) > 1
    for name in ("groups", "channels", "total", "dense"):
        assert before[name] == after[name]
    assert (before["spectra_of"], after["spectra_of"]) == ("weights", "kept weights")
    for old, new in zip(before["layers"], after["layers"], strict=True):
        assert new["energy"] is None and (new["bytes"], new["flop"]) == (old["bytes"], old["flop"])
        for side, rank in enumerate(new["ranks"]):
            kept = np.asarray(old["spectra"][side])[:, :rank]
            np.testing.assert_allclose(new["spectra"][side], kept, rtol=5e-3)  # factors are bfloat16
            np.testing.assert_allclose(new["condition"][side], kept[:, 0] / kept[:, -1], rtol=1e-2)


def test_without_flags_the_demo_model_keeps_60_percent(capsys):
    report = run_json(capsys)
    assert report["model"] == "demo" and report == run_json(capsys, "--lorc", "keep=60%", "--lorc-groups", "joint")
    assert report["lorc"]["ranks"] == "keep=60%,rule=lorc"
    assert 0.55 < report["total"]["bytes"] / report["dense"]["bytes"] <= 0.6


def test_ranks_from_a_file(tmp_path, capsys):
    file = tmp_path / "ranks.json"
    file.write_text(json.dumps({"heads": 1, "ranks": [[i + 1, 32 - i] for i in range(LAYERS)]}))
    report = run_json(capsys, "--lorc-ranks", file)
    assert [layer["ranks"] for layer in report["layers"]] == [[i + 1, 32 - i] for i in range(LAYERS)]
    assert report["layers"][0]["energy"][1] == 1.0 and report["lorc"]["ranks"] == "ranks.json"


# --- what is printed and drawn ---


def test_the_table_says_what_json_says(converted, capsys):
    report, lines = run_json(capsys, *FLAGS), run(capsys, *FLAGS).splitlines()
    assert lines[0].strip() == "demo, keep=50%,rule=energy, plain: 2 latents, each for 32 channels"
    cells = lambda name: [
        cell.strip() for line in lines if line.split("│")[0].strip() == name for cell in line.split("│")
    ]
    for index, layer in enumerate(report["layers"]):
        kappas = [f"{np.mean([math.log10(x) for x in side]):.2f}" for side in layer["condition"]]
        shares = [f"{share:.1%}" for share in layer["energy"]]
        costs = [f"{layer['bytes']:,}", f"{layer['flop']:,}"]
        assert cells(str(index)) == [str(index), *map(str, layer["ranks"]), *kappas, *shares, *costs]
    total, dense = report["total"], report["dense"]
    assert cells("total")[-2:] == [f"{total['bytes']:,}", f"{total['flop']:,}"]
    assert cells("dense")[-2:] == ["1,536", "3,072"]
    times, per_byte = total["flop"] / dense["flop"], total["flop"] / total["bytes"]
    said = f"50.0% of the dense bytes, {times:.3g} times the FLOP: {per_byte:.3g} FLOP per byte (dense: 2)"
    assert said in lines and max(map(len, lines)) <= 80
    assert "?" in run(capsys, converted)


@needs_matplotlib
@pytest.mark.parametrize("what", ["source", "converted"])
def test_the_picture_has_a_line_and_a_dot_for_each_layer(what, converted, capsys):
    report = run_json(capsys, *(FLAGS if what == "source" else [converted]))
    keys, values, ranks, _ = lorc_report.picture(report).axes
    for side, axes in enumerate((keys, values)):
        assert axes.get_yscale() == "log" and keys.get_ylim() == axes.get_ylim()
        lines, dots = axes.lines[::2], axes.lines[1::2]
        for layer, line, dot in zip(report["layers"], lines, dots, strict=True):
            spectrum, rank = np.asarray(layer["spectra"][side]), layer["ranks"][side]
            shares = np.sqrt(np.prod(spectrum / spectrum[:, :1], axis=0))  # of two groups
            np.testing.assert_allclose(line.get_ydata(), shares)
            assert line.get_xdata()[0] == 1 and line.get_color() is dot.get_color()
            assert dot.get_xydata().tolist() == [[rank, pytest.approx(shares[rank - 1])]]
    drawn = {line.get_label(): list(line.get_ydata()) for line in ranks.lines}
    keys_ranks, values_ranks = map(list, zip(*report["latent"]["ranks"], strict=True))
    assert drawn == {"keys": keys_ranks, "values": values_ranks, "all 32 channels": [32, 32]}


@needs_matplotlib
def test_out_writes_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "drawn in spectra.png" in run(capsys, "--out")
    run_json(capsys, "--out", "other.png")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["other.png", "spectra.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in tmp_path.iterdir())


# --- errors ---

BAD = {
    "unrecognized arguments: --bogus": ["--bogus"],
    "./nowhere: no such directory": ["./nowhere"],
    "tests: has no config.json": ["tests"],
    "expected keep=60%": ["--lorc", "much"],
    "not allowed with argument": ["--lorc", "keep=50%", "--lorc-ranks", "ranks.json"],
    "cannot read ranks.json": ["--lorc-ranks", "ranks.json"],
    "--lorc-groups 3 does not divide": ["--lorc-groups", "3"],
    "--lorc-text is for --lorc-basis whiten": ["--lorc-text", "text.txt"],
    "was converted without --lorc: inspect the checkpoint that it was made from": ["plainly_converted"],
    "--lorc: CONVERTED has its ranks; inspect what it was made from": ["converted", "--lorc", "keep=50%"],
    "--lorc-groups: CONVERTED has its ranks": ["converted", "--lorc-groups", "1"],
    "--lorc-hadamard: CONVERTED has its ranks": ["converted", "--lorc-hadamard"],
    "pictures are PNG": ["--out", "spectra.pdf"],
    "cannot write missing/folder/spectra.png: No such file or directory": ["--out", "missing/folder/spectra.png"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line_and_exit_code_2(message, request, capsys, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    paths = {name: str(request.getfixturevalue(name)) for name in ("converted", "plainly_converted")}
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        command.run(inspect.PROG, lambda: inspect.main(["lorc", *(paths.get(word, word) for word in BAD[message])]))
    out = capsys.readouterr()
    assert exit.value.code == 2 and out.out == ""
    assert out.err.startswith(inspect.PROG) and out.err.count("\n") == 1
    assert message.replace("CONVERTED", paths["converted"]) in out.err


def test_damaged_parameters_are_one_line(converted, tmp_path, capsys):
    for name in ("kvjax.json", "config.json"):
        (tmp_path / name).write_text((converted / name).read_text())
    for damage in (lambda: None, lambda: (tmp_path / "params").mkdir(), lambda: (tmp_path / "params/head").mkdir()):
        damage()
        with pytest.raises(kvjax.InputError, match="params cannot be read, convert the source again"):
            run(capsys, tmp_path)


def test_without_matplotlib_a_picture_is_refused_and_the_rest_works(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(kvjax.InputError, match=r"pip install 'kvjax\[eval\]'"):
        run(capsys, "--out", tmp_path / "x.png")
    assert len(run_json(capsys)["layers"]) == LAYERS
