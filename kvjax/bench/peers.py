"""Methods beside transformers and llama.cpp: the same weights and prompts, decoding and reading, in turns."""

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kvjax import compilation
from kvjax.bench import decode, models, prefill, report, rivals, settings, turns
from kvjax.bench.decode import Contest
from kvjax.bench.report import Column, Report, Section
from kvjax.bench.rivals import Reader
from kvjax.bench.turns import Contestant
from kvjax.generation.model import Model

TIMES = "{:.2f}".format
PLAIN = ("name", "failed", "cache_bytes")  # keys of a row that are of no measurement


def run(args: argparse.Namespace, command_line: list[str]) -> Report:
    """What the command line asks for."""
    missing = {name: why for name in args.against if (why := settings.missing(name))}
    able = [name for name in args.against if name not in missing]
    compilation.enable_compilation_cache()
    model = models.load(args.model, args.dtype)
    decode.check_contexts(args.contexts, model, decode.steps_in_all(args))
    about = report.about(command_line, model=model.name, dtype=model.decoder.dtype.name)
    columns = _columns(args.measure, able)
    return Report("peers", about, columns, columns[0], _sections(args, model, able, missing))


def _columns(measured: list[str], against: list[str]) -> list[Column]:
    first = {
        "prefill": Column("prefill s", "prefill seconds", TIMES),
        "decode": Column("tokens/s", "decode per_s", "{:,.1f}".format),
    }
    found: list[Column] = []
    for what in measured:
        times = [Column(f"x {name}", f"{what} x {name}", TIMES) for name in against]
        found += [first[what], *times, report.LIMIT._replace(key=f"{what} of_limit")]
    megabytes = lambda size: f"{size / 1e6:,.1f}"
    return [*found, Column("cache MB", "cache_bytes", megabytes), Column("peak MB", "peak_bytes", megabytes)]


def _sections(args: argparse.Namespace, model: Model, able: list[str], missing: dict[str, str]) -> Iterator[Section]:
    new = decode.steps_in_all(args)
    with rivals.opened(able, model, max(args.contexts) + new) as readers:
        for context in args.contexts:
            setting = Contest(context, new, args.steps, args.prefill == "cheap")
            makers = {
                "prefill": prefill.contestants(args.recipes, readers, model, 1, context),
                "decode": _decoding(args, model, readers, setting),
            }
            rows: dict[str, dict[str, Any]] = {name: {"name": name} for name in makers["decode"]}
            title, facts = f"{context:,} tokens of context", {"context": context}
            for what in args.measure:
                found = [turns.prepared(name, make) for name, make in makers[what].items()]
                measured = turns.measure(found, args.rounds, model.decoder.dtype)
                title, facts[what] = f"{context:,} tokens of context, {measured.limits}", measured.limits._asdict()
                for row in turns.rows(found, measured, able):
                    rows[row["name"]] |= {key if key in PLAIN else f"{what} {key}": row[key] for key in row}
                del found
            for reader in readers:
                rows[reader.name]["peak_bytes"] = reader.peak_bytes()
            others = [{"name": name, "failed": why} for name, why in missing.items()]
            yield Section(title, [*rows.values(), *others], facts)


def _decoding(
    args: argparse.Namespace, model: Model, readers: Sequence[Reader], setting: Contest
) -> dict[str, Callable[[], Contestant]]:
    """Who decodes, by name: functions that make them."""
    ours = {
        label: functools.partial(decode.contestant, model, label, recipe, 1, setting)
        for label, recipe in args.recipes.items()
    }
    return ours | {each.name: functools.partial(decode.rival, each, model, 1, setting) for each in readers}
