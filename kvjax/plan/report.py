"""A plan as plain data, as tables and as a picture."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from kvjax.methods import label_of
from kvjax.plan.chips import GIB, Chip
from kvjax.plan.dry_run import beyond
from kvjax.plan.search import MOST
from kvjax.plotting import save_figure
from kvjax.spec import ModelSpec

NAMES = {
    "weights": "weights",
    "codes": "cache: payload and slack",
    "scales": "cache: scales",
    "statistics": "cache: statistics",
    "tables": "cache: tables",
    "prefill": "beside them, reading the prompts",
    "decode": "beside them, a step",
}
SHADES = {"weights": "#999999", "cache": "#0072B2", "temporaries": "#E69F00"}
Plan = Mapping[str, Any]


def described(
    args: argparse.Namespace,
    chip: Chip,
    spec: ModelSpec,
    source: str,
    plans: Sequence[Plan],
    left_out: Mapping[str, str],
) -> dict[str, Any]:
    """What was planned, for what, and what to know when reading it."""
    return {
        "model": args.model,
        "shape": source,
        "dtype": args.dtype,
        "weights": spec.weights,
        "context": args.context,
        "new_tokens": args.new_tokens,
        "batch": args.batch,
        "budget": args.budget,
        "mesh": args.mesh,
        "chip": chip._asdict(),
        "plans": list(plans),
        "left_out": dict(left_out),
        "notes": notes(args, chip, spec, plans),
    }


def notes(args: argparse.Namespace, chip: Chip, spec: ModelSpec, plans: Sequence[Plan]) -> list[str]:
    """What a reader must know."""
    found = [f"{chip.name}: {chip.note}"] if chip.note else []
    if chip.platform == "gpu":
        found.append("JAX takes 75% of a GPU's memory: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 for what is usable here")
    if args.context + args.new_tokens > spec.max_position:
        found.append(beyond(spec, args.context, args.new_tokens))
    if spec.gate is not None:
        found.append("how many slots the model's gate asks for is not known: bytes are those while the prompt is read")
    if args.estimate:
        found.append("by formula, nothing was compiled")
    elif not args.exact and spec.num_layers > 4:
        found.append("a step was compiled with 2 and 4 layers and continued to all; --exact compiles all")
    if not args.estimate and (args.all_methods or not args.verify):
        found.append("largest batch and context are estimated, from what was compiled at the given ones")
    for plan in plans:
        if plan["refused"]:
            where = ", ".join(plan["refused"])
            how = "bytes are the compiler's own count" if not plan["guessed"] else "bytes are estimated"
            found.append(f"{plan['method']}: the compiler refused {where} for want of memory; {how}")
    return found


def named(found: Mapping[str, Any]) -> str:
    """A model and where its shape comes from, if its name does not say so.

    >>> named({"model": "DIR", "shape": "DIR"}), named({"model": "org/name", "shape": "the known shape llama-3-8b"})
    ('DIR', 'org/name (the known shape llama-3-8b)')
    """
    return found["model"] if found["shape"].endswith(found["model"]) else f"{found['model']} ({found['shape']})"


def show(console: Console, found: Plan) -> None:
    """Print tables."""
    chip, plans = found["chip"], found["plans"]
    lengths = f"{found['batch']} x ({found['context']:,} + {found['new_tokens']:,} tokens)"
    chips = (
        chip["name"] if found["mesh"] is None else f"{chip['name']}, {found['mesh']}: bytes are those of each device"
    )
    title = f"{named(found)} in {found['dtype']}, {lengths} on {chips}"
    console.print(title, highlight=False, markup=False)
    if len(plans) == 1:
        console.print(one(found, plans[0]))
    elif plans:
        console.print(several(found, plans))
    for method, why in found["left_out"].items():
        console.print(f"{method}: left out, {why}", highlight=False, markup=False)
    for note in found["notes"]:
        console.print(note, highlight=False, markup=False)


def one(found: Plan, plan: Plan) -> Table:
    """A plan's parts, what fits, and the bound."""
    budget = "" if found["budget"] is None else f" {found['budget']}"
    table = Table(label_of(plan["method"]) + budget, Column("bytes", justify="right"), Column("GiB", justify="right"))
    add = lambda name, size: table.add_row(name, f"{size:,}", f"{size / GIB:.2f}")
    for part, name in NAMES.items():
        add(name, plan["bytes"][part])
    table.add_section()
    add("most at one time", plan["bytes"]["peak"])
    add("usable", found["chip"]["usable"])
    table.add_section()
    table.add_row("fits", "yes" if plan["fits"] else "no", "")
    for name, size in plan["largest"].items():
        table.add_row(f"largest {name}", _largest(name, size), "compiled" if size["verified"] else "estimated")
    bound = plan["bound"]
    table.add_section()
    table.add_row("at best, tokens/s", f"{bound['tokens_per_s']:,.1f}", bound["limit"])
    table.add_row("at best, ms a step", f"{1e3 * bound['step_s']:,.2f}", "")
    table.add_row("at best, s for the prompts", f"{bound['prefill_s']:,.2f}", "")
    return table


def _largest(name: str, size: Plan) -> str:
    return f"{size['size']:,}" + (" or more" if size["size"] >= MOST[name] else "")


def several(found: Plan, plans: Sequence[Plan]) -> Table:
    """A row for each method."""
    columns = ("cache GiB", "most GiB", "of usable", "fits", "largest batch", "largest context", "at best tokens/s")
    table = Table("method", *(Column(name, justify="right") for name in columns))
    for plan in plans:
        held = plan["bytes"]
        table.add_row(
            label_of(plan["method"]),
            f"{held['cache'] / GIB:.2f}",
            f"{held['peak'] / GIB:.2f}",
            f"{held['peak'] / found['chip']['usable']:.0%}",
            "yes" if plan["fits"] else "no",
            *(_largest(name, size) for name, size in plan["largest"].items()),
            f"{plan['bound']['tokens_per_s']:,.0f}",
        )
    return table


def draw(path: Path, found: Plan) -> None:
    """A bar for each method, made of its parts, against what is usable."""
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    plans, chip = found["plans"], found["chip"]
    figure = Figure(figsize=(8, 1.6 + 0.36 * len(plans)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(plans)
    for name, shade in SHADES.items():
        sizes = [_part(plan["bytes"], name) / GIB for plan in plans]
        axes.barh(range(len(plans)), sizes, left=left, color=shade, label=name)
        left = [before + size for before, size in zip(left, sizes, strict=True)]
    axes.axvline(chip["usable"] / GIB, color="black", linestyle="--", label=f"usable on {chip['name']}")
    axes.set_yticks(range(len(plans)), [label_of(plan["method"]) for plan in plans])
    axes.invert_yaxis()
    axes.set_xlabel("GiB, the most at one time")
    budget = "" if found["budget"] is None else f", budget {found['budget']}"
    axes.set_title(f"{found['model']}: {found['batch']} x {found['context']:,} tokens{budget}", fontsize="medium")
    figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    save_figure(figure, path)


def _part(size: Mapping[str, int], name: str) -> int:
    return max(size["prefill"], size["decode"]) if name == "temporaries" else size[name]
