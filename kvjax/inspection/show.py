"""What `kvjax.inspect` does once its flags are read: what was kept, or what a cache would cost, as tables and JSON."""

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from kvjax.cli import showcase
from kvjax.cli.console import to_stdout
from kvjax.cli.flags import CONTEXT, numbers
from kvjax.cli.tables import SHARE, dtype_of, sizes
from kvjax.errors import InputError
from kvjax.generation.checks import check_texts
from kvjax.generation.model import Model, encode_text, load
from kvjax.generation.results import Generation
from kvjax.inspection import cache_map
from kvjax.inspection.cache_map import HeldTokens
from kvjax.methods import arguments_of, label_of
from kvjax.plan.dry_run import abstract_model, plan_cache
from kvjax.plotting import save_figure
from kvjax.policies.base import Recipe


def run(args: argparse.Namespace, recipe: Recipe, texts: list[str], ids: list[list[int]]) -> None:
    """Show what a method keeps of one prompt, or with `--dry-run` what its cache would cost."""
    console = to_stdout()
    if args.dry_run:
        report = dry_run(args, recipe, texts, ids)
        print(json.dumps(report)) if args.json else _print_plan(console, report)
        return
    model = load(args.model, **numbers(args), ignore_config=args.ignore_config)
    _check_range("layer", args.layer, model.spec.num_layers)
    _check_range("head", args.head, model.spec.num_rows)
    if not texts and not ids:
        texts = showcase.prompts().texts[:1]
    (prompt,) = [encode_text(model, text, args.chat) for text in texts] + ids
    out = model.generate([prompt], recipe, max_new_tokens=args.max_new_tokens)
    shown = cache_map.only(cache_map.read(model, out, prompt), args.layer, args.head)
    report = describe(args, model, out, shown)
    print(json.dumps(report), flush=True) if args.json else _print_kept(console, model, shown, report)
    if args.out is not None:
        _draw(args.out, shown, report)
    if args.out is not None and not args.json:
        console.print(f"drawn in {args.out}", highlight=False, markup=False)


def _check_range(name: str, value: int | None, size: int) -> None:
    if value is not None and not 0 <= value < size:
        raise InputError(f"--{name} {value} is out of range: this model has {name}s 0 to {size - 1}")


def describe(args: argparse.Namespace, model: Model, out: Generation, shown: HeldTokens) -> dict[str, Any]:
    """What was kept, as plain data; `positions` and `slots` are lists over `layers` of lists over `heads`.

    `positions` are those of all tiers, `tiers` of each, the best one first; `slots` are those of the best one.
    """
    return {
        **_named(args, model),
        "prompt_tokens": shown.prompt,
        "tokens": shown.tokens,
        "layers": shown.layers,
        "heads": shown.heads,
        "positions": _positions(shown.held | shown.low),
        "tiers": [
            {"store": name, "positions": _positions(held)}
            for name, held in zip(shown.stores, (shown.held, shown.low), strict=False)
        ],
        "slots": shown.slots.tolist(),
        "cache": sizes(out.bytes._asdict(), out.full_bytes, out.compared),
    }


def dry_run(args: argparse.Namespace, recipe: Recipe, texts: list[str], ids: list[list[int]]) -> dict[str, Any]:
    """The recipe in force and the bytes of its cache, as plain data."""
    model = abstract_model(args.model, ignore=args.ignore_config, **numbers(args))
    prompts = [encode_text(model, text, args.chat) for text in texts] + ids
    if prompts:
        check_texts(model.spec, recipe, prompts, [[]])
        context = len(prompts[0])
    else:
        limit = model.spec.max_position
        context = args.context or min(CONTEXT, limit - args.max_new_tokens if args.max_new_tokens < limit else limit)
    batch = args.batch or 1
    planned = plan_cache(model, recipe, context, args.max_new_tokens, batch)
    return {
        **_named(args, model),
        "arguments": arguments_of(args.method, args.arguments),
        "context": context,
        "max_new_tokens": args.max_new_tokens,
        "batch": batch,
        **{name: getattr(planned, name) for name in ("decided", "stores", "fold", "rotate", "notes")},
        "slots": planned.budget,
        "cache": sizes(planned.bytes, planned.full_bytes, planned.compared),
    }


def _named(args: argparse.Namespace, model: Model) -> dict[str, Any]:
    budget = args.budget
    return {
        "method": args.method,
        "budget": int(budget) if isinstance(budget, str) and budget.isdecimal() else budget,
        "model": model.name,
        "dtype": dtype_of(model),
        "weights": model.spec.weights,
    }


def _positions(held: np.ndarray) -> list[list[list[int]]]:
    return [[np.flatnonzero(row).tolist() for row in layer] for layer in held]


def _title(report: Mapping[str, Any]) -> str:
    return label_of(report["method"]) + (f" {report['budget']}" if report["budget"] is not None else "")


def _kept(shown: HeldTokens) -> str:
    generated = len(shown.tokens) - shown.prompt
    tokens = f"{shown.prompt:,} + {generated:,} generated" if generated else f"{shown.prompt:,}"
    best, rest = cache_map.how_kept(shown)
    return f"{shown.held.mean():.1%} of {tokens} tokens {best}" + (
        f", {shown.low.mean():.1%} {rest}" if shown.low.any() else ""
    )


def _draw(path: Path, shown: HeldTokens, report: Mapping[str, Any]) -> None:
    """Write the heat map."""
    total, share = report["cache"]["bytes"]["total"], report["cache"]["share"]
    title = f"{_title(report)}: {_kept(shown)}, {total:,} bytes in {report['dtype']}, {share:.1%} {SHARE}"
    save_figure(cache_map.picture(shown, title), path)


def _print_kept(console: Console, model: Model, shown: HeldTokens, report: Mapping[str, Any]) -> None:
    """The text with what was kept, slots by layer, bytes by part."""
    console.print(f"{_title(report)}, {report['model']} in {report['dtype']}: {_kept(shown)}\n", highlight=False)
    console.print(cache_map.legend(shown, marks=not _has_styles(console)), "\n", sep="")
    pieces, levels = cache_map.pieces(model.tokenizer, shown.tokens), shown.levels()
    _print_text(console, pieces[: shown.prompt], levels[: shown.prompt])
    if len(pieces) > shown.prompt:
        print("--- generated")
        _print_text(console, pieces[shown.prompt :], levels[shown.prompt :])
    print()
    console.print(_slots(shown))
    console.print(_bytes(report))


def _has_styles(console: Console) -> bool:
    return console.color_system is not None


def _print_text(console: Console, pieces: list[str], levels: list[int]) -> None:
    if _has_styles(console):
        console.print(cache_map.styled(pieces, levels))
    else:
        print(*cache_map.marked(pieces, levels, shutil.get_terminal_size().columns), sep="\n")


def _slots(shown: HeldTokens) -> Table:
    """Budget and kept slots of each layer."""
    numbers = [Column(name, justify="right") for name in ("budget", "kept: mean", "min", "max")]
    table = Table(
        "layer",
        *numbers,
        title="slots, over heads" if len(shown.stores) == 1 else f"{shown.stores[0]} slots, over heads",
        title_justify="left",
    )
    for layer, budget, slots in zip(shown.layers, shown.budget, shown.slots, strict=True):
        table.add_row(
            str(layer), f"{budget.mean():,.10g}", f"{slots.mean():,.10g}", f"{slots.min():,}", f"{slots.max():,}"
        )
    return table


def _bytes(report: Mapping[str, Any]) -> Table:
    """Bytes by part, and what a full cache needs."""
    cache = report["cache"]
    *parts, (_, total) = cache["bytes"].items()
    table = Table("cache", Column(f"bytes ({report['dtype']})", justify="right"))
    for name, size in parts:
        table.add_row("payload and slack" if name == "codes" else name, f"{size:,}")
    table.add_section()
    table.add_row("total", f"{total:,}")
    table.add_row("full cache", f"{cache['full_bytes']:,}")
    table.add_row(SHARE, f"{cache['share']:.1%}")
    return table


def _print_plan(console: Console, report: Mapping[str, Any]) -> None:
    """The recipe in force and the bytes by part."""
    table = Table("dry run", _title(report))
    slots = report["slots"]
    rows = {
        "model": f"{report['model']} in {report['dtype']}",
        "lengths": f"{report['batch']} x ({report['context']:,} prompt + {report['max_new_tokens']:,} new tokens)",
        "budget [slots per row]": "any" if slots is None else _by_layer(slots),
        "budget decided": report["decided"],
        "stores": "; ".join(report["stores"]),
        "fold": report["fold"],
        "keys rotated": report["rotate"],
    }
    rows |= {f"--set {name}": str(value) for name, value in report["arguments"].items()}
    for name, value in rows.items():
        table.add_row(name, Text(value))
    console.print(table)
    console.print(_bytes(report))
    for note in report["notes"]:
        console.print(note, highlight=False, markup=False)


def _by_layer(slots: list[int]) -> str:
    if len(set(slots)) == 1:
        return f"{slots[0]:,} in each of {len(slots)} layers"
    return f"by layer {' '.join(map(str, slots))}"
