"""Show which tokens of a prompt each layer and head keeps, or what a cache would cost without running anything.

Without a prompt, the demo model reads a long list and a question about it. `lorc CHECKPOINT` shows what low-rank keys
and values cost and lose.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from kvjax import compilation
from kvjax.cache.pages import LARGEST
from kvjax.cli import command, showcase
from kvjax.cli.console import to_stdout
from kvjax.cli.flags import SHOWCASE_METHOD, add_shared_flags, numbers
from kvjax.cli.prompts import read_ids, read_texts
from kvjax.cli.tables import SHARE, dtype_of, sizes
from kvjax.errors import InputError
from kvjax.generation.checks import check_texts
from kvjax.generation.model import Model, encode_text, load
from kvjax.generation.results import Generation
from kvjax.inspection import cache_map, lorc_report
from kvjax.inspection.cache_map import HeldTokens
from kvjax.methods import default_budget, label_of, make
from kvjax.plan.dry_run import abstract_model, arguments, plan_cache
from kvjax.plotting import save_figure
from kvjax.policies.base import Recipe

PROG = "kvjax.inspect"
CONTEXT = 4096  # tokens of a dry run without a prompt


def parser() -> command.Parser:
    """The command line's flags; those that `kvjax.generate` has too mean the same."""
    p = command.Parser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_flags(p, method=SHOWCASE_METHOD)
    p.add_argument("--max-new-tokens", type=int, default=1, metavar="N", help="the last is not cached (default: 1)")
    p.add_argument("--layer", type=int, metavar="L", help="show this layer only, counted from 0")
    p.add_argument("--head", type=int, metavar="H", help="show this key/value head only, counted from 0")
    p.add_argument(
        "--out",
        type=Path,
        nargs="?",
        const=Path("kept.png"),
        metavar="FILE.png",
        help="draw it (default: kept.png)",
    )
    p.add_argument("--dry-run", action="store_true", help="no weights: what the method does, and the cache's bytes")
    p.add_argument("--context", type=int, metavar="N", help=f"prompt tokens of a dry run (default: up to {CONTEXT})")
    p.add_argument("--batch", type=int, metavar="N", help="sequences of a dry run (default: 1)")
    return p


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Flags, and the defaults that depend on the method."""
    args = command.parse(parser(), argv)
    args.method = args.method or SHOWCASE_METHOD
    args.budget = args.budget if args.budget is not None else default_budget(args.method)
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["lorc"]:
        lorc_report.main(argv[1:])
        return
    args, console = parse(argv), to_stdout()
    recipe = make(args.method, args.budget, args.arguments)
    _check(args)
    texts, ids = read_texts(args), [read_ids(text) for text in args.prompt_tokens or ()]
    if args.dry_run:
        report = dry_run(args, recipe, texts, ids)
        print(json.dumps(report)) if args.json else _print_plan(console, report)
        return
    compilation.enable_compilation_cache()
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


def _check(args: argparse.Namespace) -> None:
    """Raise `InputError` for flags that cannot be followed, before anything is loaded."""
    given = sum(len(prompts or ()) for prompts in (args.prompt, args.prompt_file, args.prompt_tokens))
    if given > 1:
        raise InputError(f"{given} prompts are given: one is shown at a time")
    if not given and not args.dry_run and (args.model is not None or args.chat):
        raise InputError("give a prompt: --prompt TEXT, --prompt-file FILE or --prompt-tokens 1,2,3")
    if args.chat and not (args.prompt or args.prompt_file):
        raise InputError("--chat wraps text: give --prompt TEXT or --prompt-file FILE")
    if args.dry_run:
        _refuse("a dry run keeps no tokens to show", out=args.out, layer=args.layer, head=args.head)
        _refuse("the prompt says how long the context is", context=args.context if given else None)
    else:
        _refuse("only a dry run counts without a prompt: add --dry-run", context=args.context, batch=args.batch)
    command.check_numbers(args, context=LARGEST, batch=command.MOST_SEQUENCES, max_new_tokens=LARGEST)
    if args.out is not None:
        cache_map.check_picture(args.out)


def _refuse(why: str, **flags: object) -> None:
    for name, value in flags.items():
        if value is not None:
            raise InputError(f"--{name}: {why}")


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
        "arguments": arguments(args.method, args.arguments),
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


if __name__ == "__main__":
    command.run(PROG, main)
