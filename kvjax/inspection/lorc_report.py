"""What low-rank keys and values (LoRC) cost and lose, before a checkpoint is converted and after."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from kvjax.checkpoint import hf, orbax, shipped
from kvjax.checkpoint.lorc import lorc, low_rank, ranks
from kvjax.cli.console import to_stdout
from kvjax.errors import InputError
from kvjax.models.hf_config import read_config
from kvjax.plotting import save_figure
from kvjax.spec import ModelSpec

ITEMSIZE = 2  # bytes of a cached number: bfloat16
NOTES = {  # what singular values are of -> how to read the table
    "weights": "energy: share of squared singular values; κ: condition number",
    "outputs": "energy: of what the projections make of the text; κ: condition number of these",
    "kept weights": "κ: condition number of what was kept; its energy: inspect the source",
}


class Cost(NamedTuple):
    """What a cached token costs."""

    bytes: int  # of the cache, in bfloat16
    flop: int  # of a decode step; a multiply-add is 2


class LowRankModel(NamedTuple):
    """A model with low-rank keys and values, or what would be one; singular values of each layer's keys and values."""

    spec: ModelSpec  # with latents
    how: dict[str, Any]  # how the ranks were chosen, as a converted checkpoint notes it
    weights: list[list[Float[np.ndarray, "C n"]]]  # of the projections; once converted, the R of a latent
    outputs: list[list[Float[np.ndarray, "C n"]]] | None = None  # of what they make of a text, where that is cut
    converted: bool = False


def cost(spec: ModelSpec, layer: int) -> Cost:
    """What a cached token costs in one layer.

                  numbers      FLOP of a decode step
        dense     2 K H        2 N H for scores + 2 N H for means of values
        latents   C (R + W)    2 C R n to expand keys + 2 N n for scores + 2 N W for means of latents

    with C = K / heads latents of n = heads H channels each, N query heads, and ranks R and W of keys and values. Every
    query is spread over its group's n channels (`kvjax.attention.decode.spread`). Rotation and softmax are not counted,
    nor what a step does once however many tokens are cached: projections, and expanding the means of latents.
    """
    rank, width = spec.widths(layer)
    n = spec.num_kv_heads // spec.num_rows * spec.head_dim
    expand = spec.num_rows * rank * n if spec.latent else 0
    return Cost(ITEMSIZE * spec.num_rows * (rank + width), 2 * (expand + spec.num_heads * (n + width)))


def relative(spectrum: Float[np.ndarray, "C n"]) -> Float[np.ndarray, "C n"]:
    """Singular values as shares of their group's largest, at least `ranks.FLOOR`; 1 where all are zero."""
    first = spectrum[:, :1]
    return np.maximum(np.divide(spectrum, first, out=np.ones_like(spectrum), where=first > 0), ranks.FLOOR)


def energy(spectrum: Float[np.ndarray, "C n"], rank: int) -> float:
    """Share of the sum of squared singular values, over all groups, that a rank keeps; 1 where all are zero."""
    squares = spectrum**2
    return float(squares[:, :rank].sum() / squares.sum()) if squares.any() else 1.0


def measure(src: Path, options: ranks.LowRankOptions, ignore: Sequence[str], report: lorc.Report) -> LowRankModel:
    """What a checkpoint would be converted to; reads keys' and values' projections beside `lorc.plan`."""
    weights, found = hf.locate(src, read_config(src, ignore)), []
    made = lorc.plan(weights, src, options, report)
    for moments in lorc.grams(weights, made.n):
        found.append(list(lorc.spectra(moments)))
        report("measuring", len(found), weights.spec.num_layers)
    outputs = None if made.moments is None else [list(lorc.spectra(moments)) for moments in made.moments]
    return LowRankModel(replace(weights.spec, latent=made.latent), lorc.about(made, options)["lorc"], found, outputs)


def measure_converted(path: Path, ignore: Sequence[str]) -> LowRankModel:
    """What a converted checkpoint holds. As the rows of `up` are orthonormal, its singular values are those of `down`.

    Cost: reads `down` of all layers, and holds those of a part (`kvjax.checkpoint.orbax`) at a time.
    """
    spec = orbax.read_spec(path, ignore)
    if spec.latent is None:
        raise InputError(f"{path}: was converted without --lorc: inspect the checkpoint that it was made from")
    names = [[f"layers.{layer}.attention.{side}.down" for side in "kv"] for layer in range(spec.num_layers)]
    spectrum = lambda down: low_rank.spectrum(low_rank.gram(down.reshape(len(down), -1), down.shape[-1]))
    chosen = orbax.read(path, [name for both in names for name in both])
    found = {name: spectrum(down) for name, down in chosen}
    spectra = [[found[name] for name in both] for both in names]
    return LowRankModel(spec, orbax.read_about(path).get("lorc", {}), spectra, converted=True)


def describe(name: str, found: LowRankModel) -> dict[str, Any]:
    """All of it as plain data: `latent` and `lorc` as in kvjax.json; `total` and `dense` are sums over layers.

    Of a layer's keys and values: `ranks`; `energy`, null once converted; `condition` and `spectra` of each group. The
    condition numbers end at 1 / `ranks.FLOOR`.
    """
    spec, spectra = found.spec, found.outputs or found.weights
    assert spec.latent is not None
    costs, dense = ([cost(each, i) for i in range(spec.num_layers)] for each in (spec, replace(spec, latent=None)))
    total = lambda each: Cost(*map(sum, zip(*each, strict=True)))._asdict()
    layer = lambda i: {
        "ranks": list(spec.widths(i)), **costs[i]._asdict(),
        "energy": None if found.converted else [*map(energy, spectra[i], spec.widths(i))],
        "condition": [(1 / relative(side)[:, -1]).tolist() for side in found.weights[i]],
        "spectra": [side.tolist() for side in spectra[i]],
    }  # fmt: skip
    return {
        "model": name, "latent": asdict(spec.latent), "lorc": found.how, "groups": spec.num_rows,
        "channels": spec.latent.heads * spec.head_dim,
        "spectra_of": "kept weights" if found.converted else "outputs" if found.outputs else "weights",
        "layers": [layer(i) for i in range(spec.num_layers)], "total": total(costs), "dense": total(dense),
    }  # fmt: skip


def heading(report: Mapping[str, Any]) -> str:
    """What was measured."""
    words = (Path(report["model"]).name, *(report["lorc"].get(word) for word in ("ranks", "basis")))
    latents = "a latent" if report["groups"] == 1 else f"{report['groups']} latents, each"
    return f"{', '.join(filter(None, words))}: {latents} for {report['channels']} channels"


def table(report: Mapping[str, Any]) -> Table:
    """A row per layer: ranks, what they lose, what they cost. κ is a geometric mean over groups."""
    names = [f"{head}\n{side}" for head in ("rank", "log10\nκ", "energy") for side in ("keys", "values")]
    numbers = [Column(name, justify="right") for name in (*names, "bytes\nper\ntoken", "FLOP\nper cached\ntoken")]
    rows = Table("layer", *numbers, show_edge=False, pad_edge=False)
    rows.title, rows.title_justify = Text(heading(report)), "left"
    costs = lambda each: (f"{each['bytes']:,}", f"{each['flop']:,}")
    for index, layer in enumerate(report["layers"]):
        kappas = [f"{np.log10(side).mean():.2f}" for side in layer["condition"]]
        shares = ["?", "?"] if layer["energy"] is None else [f"{share:.1%}" for share in layer["energy"]]
        rows.add_row(str(index), *map(str, layer["ranks"]), *kappas, *shares, *costs(layer))
    rows.add_section()
    shares = [f"{np.mean(side) / report['channels']:.0%}" for side in zip(*report["latent"]["ranks"], strict=True)]
    rows.add_row("total", *shares, *[""] * 4, *costs(report["total"]))
    rows.add_row("dense", *[""] * 6, *costs(report["dense"]))
    return rows


def summary(report: Mapping[str, Any]) -> str:
    """The totals against the dense cache, in a line."""
    (size, flop), (full, base) = report["total"].values(), report["dense"].values()
    times, per_byte, dense = (f"{x:.3g}" for x in (flop / base, flop / size, base / full))
    return f"{size / full:.1%} of the dense bytes, {times} times the FLOP: {per_byte} FLOP per byte (dense: {dense})"


def picture(report: Mapping[str, Any]) -> Any:
    """A matplotlib `Figure`: singular values, a line per layer (over groups, the geometric mean), and the ranks."""
    from kvjax.evaluation import pictures

    figure, panels = pictures.blank(3, 3, (4.4, 3.6), 0.7, heading(report))
    from matplotlib import cm, colormaps, colors, ticker

    layers, n, of = (report[key] for key in ("layers", "channels", "spectra_of"))
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    panels[0].set_ylabel("share of the largest")
    panels[1].sharey(panels[0])
    dots: dict[str, Any] = {"markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.7}
    for side, (axes, name) in enumerate(zip(panels, ("keys", "values"), strict=False)):
        for layer, colour in zip(layers, colours, strict=True):
            line = np.exp(np.log(relative(np.asarray(layer["spectra"][side]))).mean(axis=0))
            axes.plot(np.arange(1, len(line) + 1), line, color=colour, linewidth=1)
            axes.plot(layer["ranks"][side], line[layer["ranks"][side] - 1], "o", color=colour, zorder=3, **dots)
        pictures.logarithmic(axes, "y", lambda value, _: f"{value:g}")
        axes.set(title=f"{name}: singular values of {of}", xlabel="place (dot: rank)", xlim=(0, 1.02 * n))
    shades = cm.ScalarMappable(colors.Normalize(-0.5, len(layers) - 0.5), colors.ListedColormap(colours))
    figure.colorbar(shades, ax=panels[1], ticks=ticker.MaxNLocator(8, integer=True)).ax.set_title("layer", fontsize=9)
    keys, values = zip(*report["latent"]["ranks"], strict=True)
    lines = {"keys and values": keys} if keys == values else {"keys": keys, "values": values}
    for index, (name, each) in enumerate(lines.items()):
        panels[2].plot(each, label=name, **(pictures.style(index) | dots))
    panels[2].axhline(n, color="0.4", linestyle=(0, (6, 4)), linewidth=1, label=f"all {n} channels")
    panels[2].set(title="ranks", xlabel="layer", ylim=(0, 1.05 * n))
    panels[2].xaxis.set_major_locator(ticker.MaxNLocator(8, integer=True))
    panels[2].legend(frameon=False, fontsize=9)
    for axes in panels:
        axes.title.set_fontsize(10)
        axes.grid(color="0.92", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def run(args: argparse.Namespace, options: ranks.LowRankOptions | None, given: Sequence[str]) -> None:
    """Measure and print; `given` are the names of the flags about ranks that were given."""
    console, source = to_stdout(), str(shipped.find(args.checkpoint))
    if orbax.is_orbax(Path(source)):
        if given:
            raise InputError(f"--{given[0].replace('_', '-')}: {source} has its ranks; inspect what it was made from")
        found = measure_converted(Path(source), args.ignore_config)
    else:
        assert options is not None
        with Console(stderr=True).status("reading") as status:
            say = lambda what, done, total: status.update(f"{what}: layer {done} of {total}")
            found = measure(hf.resolve(source), options, args.ignore_config, say)
    report = describe(args.checkpoint or "demo", found)
    if args.out is not None:
        save_figure(picture(report), args.out)
    text = (table(report), summary(report), NOTES[report["spectra_of"]])
    print(json.dumps(report)) if args.json else console.print(*text, sep="\n", highlight=False)
    if args.out is not None and not args.json:
        console.print(f"drawn in {args.out}", highlight=False, markup=False)
