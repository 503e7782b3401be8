"""Kernels: time, share of the machine's limit, how many times as fast as plain XLA and other libraries."""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from kvjax import compilation
from kvjax.bench import report, rivals, turns
from kvjax.bench.cases import KERNELS, Kernel, KernelCase, Shape
from kvjax.bench.report import Column, Report, Section
from kvjax.bench.turns import Contestant
from kvjax.models.decoder import native_dtype
from pallas_kernels.implementation import Implementation


def wanted(args: argparse.Namespace) -> list[tuple[str, Kernel, str, Shape]]:
    """Every kernel at every shape with every store."""
    found = []
    for name in args.kernels:
        kernel = KERNELS[name]
        own = list(dict.fromkeys(shape._replace(batch=1) if kernel.prompt else shape for shape in args.shapes))
        of = [store for store in args.stores if store in kernel.stores] if kernel.stores != ("",) else [""]
        found += [(name, kernel, store, shape) for shape in own for store in of]
    return found


def say(line: str) -> None:
    """Print a line to standard error."""
    Console(stderr=True).print(line, highlight=False, markup=False, soft_wrap=True)


def contestants(
    case: KernelCase, chosen: list[Implementation], against: list[str] | None
) -> Iterator[Contestant | dict[str, Any]]:
    """Who takes turns at a case; a dict with a reason instead of who cannot."""
    ready: dict[str, Callable[[], rivals.Call]] = {name: functools.partial(_ours, case, name) for name in chosen}
    for name, make in case.rivals.items():
        if against is None or name in against:
            known = rivals.DECODE.get(name)
            reason = None if known is None else known.reason(jax.default_backend())
            if reason is not None:
                say(f"{name}: {reason}")
                continue
            ready[name] = make
    for name, make in ready.items():
        try:
            call, wait = make()
            turn, times = turns.repeated(call, wait)
        except (NotImplementedError, jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
            yield {"name": name, "failed": next(iter(str(error).splitlines()), type(error).__name__)}
            continue
        counted = case.bytes if name != "attention" else 0
        facts = {"flop": case.flop} if counted else {}
        yield Contestant(name, turn, times, times * counted, facts)


def _ours(case: KernelCase, implementation: Implementation) -> rivals.Call:
    run = jax.jit(functools.partial(case.run, implementation=implementation))
    return lambda: run(*case.args), jax.block_until_ready


COLUMNS = (
    Column("us", "call_s", lambda s: f"{1e6 * s:,.1f}"),
    Column("MB", "call_bytes", lambda n: f"{n / 1e6:,.2f}"),
    Column("GB/s", "bytes_per_s", lambda n: f"{n / 1e9:,.1f}"),
    Column("of copy", "of_copy", "{:.0%}".format),
    Column("TFLOP/s", "flop_per_s", lambda n: f"{n / 1e12:.2f}"),
)


def run(args: argparse.Namespace, command_line: list[str]) -> Report:
    """What the command line asks for."""
    chosen, todo = args.implementations, wanted(args)
    compilation.enable_compilation_cache()
    dtype = jnp.dtype(args.dtype or native_dtype())
    sections = []
    for name, kernel, store, shape in todo:
        title = " ".join(filter(None, (name, shape.name, store)))
        say(title)
        case = kernel.make(shape, store, dtype)
        found = list(contestants(case, [each for each in chosen if each != "cpu" or not kernel.prompt], args.against))
        sections.append(_section(title, found, args.rounds, chosen[0]))
        del case, found
        jax.clear_caches()
    columns = (*COLUMNS, Column(f"x {chosen[0]}", f"x {chosen[0]}"))
    about = report.about(command_line, dtype=dtype.name)
    return Report("kernels", about, columns, COLUMNS[0], sections)


def _section(title: str, found: list[Contestant | dict[str, Any]], rounds: int, first: str) -> Section:
    able = [each for each in found if isinstance(each, Contestant)]
    measured = turns.measure(able, rounds)
    rows = {row["name"]: row for row in turns.rows(able, measured, [first])}
    for row in rows.values():
        row["call_s"] = row["seconds"] / row["work"]
        if "bytes" in row:
            row["call_bytes"] = row["bytes"] // row["work"]
        if "flop" in row:
            row["flop_per_s"] = row["flop"] / row["call_s"]
    in_order = [rows[each.name] if isinstance(each, Contestant) else each for each in found]
    facts = {"copy": measured.copy, "read": measured.read}
    return Section(f"{title}, copy {measured.copy / 1e9:.1f} GB/s", in_order, facts)
