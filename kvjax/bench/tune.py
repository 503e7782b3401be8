"""Block sizes: the kernels with each of several, and the fastest into the table that the kernels read."""

import argparse
import datetime
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kvjax import compilation
from kvjax.bench import kernels, report, turns
from kvjax.bench.cases import KernelCase, Settings
from kvjax.bench.report import Column, Report, Section
from kvjax.bench.turns import Contestant
from kvjax.files import output
from kvjax.models.decoder import native_dtype
from pallas_kernels import tuning
from pallas_kernels.implementation import Implementation

DEFAULT = "default"
GAIN = 1.02  # times as fast as the kernel's own default, for an entry that differs from it


def candidates(
    case: KernelCase, implementation: Implementation, tries: Sequence[Settings]
) -> tuple[list[Contestant], list[dict[str, Any]]]:
    """The kernel with its default and with each settings that compiles, and the shapes that it asked the table for."""
    found, asked = [], []
    for settings in ({}, *tries):
        name = ", ".join(f"{key} {value}" for key, value in settings.items()) or DEFAULT
        fn = jax.jit(functools.partial(case.run, implementation=implementation))
        try:
            with tuning.trying(settings) as shapes:
                turn, times = turns.repeated(functools.partial(fn, *case.args))
        except (NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as error:
            kernels.say(f"  {name}: {next(iter(str(error).splitlines()), type(error).__name__)}")
            if not settings:
                return [], []
            continue
        asked = asked or shapes
        found.append(Contestant(name, turn, times, facts={"settings": dict(settings)}))
    return found, asked


def best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest row; the default where no other is faster by `GAIN`."""
    fastest = max(rows, key=lambda row: row[f"x {DEFAULT}"])
    return fastest if fastest[f"x {DEFAULT}"] >= GAIN else rows[0]


def run(args: argparse.Namespace, command_line: list[str]) -> Report:
    """What the command line asks for."""
    implementation = args.implementation
    table = tuning.path() if args.table is None else args.table
    output.check_writable(table)
    todo = [each for each in kernels.wanted(args) if implementation in each[1].tries]
    compilation.enable_compilation_cache()
    dtype = jnp.dtype(args.dtype or native_dtype())
    about, entries, sections = report.about(command_line, table=str(table)), [], []
    for name, kernel, store, shape in todo:
        title = " ".join(filter(None, (name, implementation, shape.name, store)))
        kernels.say(title)
        found, asked = candidates(kernel.make(shape, store, dtype), implementation, kernel.tries[implementation])
        if not found:
            continue
        rows = turns.rows(found, turns.measure(found, args.rounds), [DEFAULT])
        for row in rows:
            row["call_s"] = row["seconds"] / row["work"]
        chosen = best(rows)
        chosen["chosen"] = "written" if chosen["settings"] else "kept"
        entries += [_entry(each, chosen, rows[0], about) for each in asked]
        sections.append(Section(title, rows))
        del found
        jax.clear_caches()
    tuning.write(table, entries)
    columns = (
        Column("us", "call_s", lambda s: f"{1e6 * s:,.1f}"),
        Column("x default", f"x {DEFAULT}"),
        Column("", "chosen", str),
    )
    return Report("tune", about, columns, columns[1], sections)


def _entry(asked: dict[str, Any], chosen: dict[str, Any], default: dict[str, Any], about: dict[str, Any]) -> dict:
    """A line of the table."""
    return {
        "device": about["hardware"]["device"],
        **asked,
        "settings": chosen["settings"],
        "seconds": chosen["call_s"],
        "default_seconds": default["call_s"],
        "date": datetime.date.fromisoformat(about["date"][:10]).isoformat(),
        "jax": about["versions"]["jax"],
        "command": about["command"],
    }
