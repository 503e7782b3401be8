"""Kernels: time, share of the machine's limit, how many times as fast as plain XLA and other libraries."""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from rich.console import Console

from kvjax import compilation
from kvjax.bench import report, rivals, turns
from kvjax.bench.cases import KERNELS, Kernel, KernelCase, Shape
from kvjax.bench.report import Column, Report, Section
from kvjax.bench.turns import Contestant
from kvjax.models.decoder import native_dtype
from pallas_kernels.implementation import Implementation

FAILURES = (*turns.FAILURES, RuntimeError, ValueError)
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}  # relative to the largest number


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
    case: KernelCase, chosen: list[Implementation], against: list[str] | None, dtype: DTypeLike
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
    differs = difference(case, dtype)
    for name, make in ready.items():
        try:
            call, wait = make()
            facts = {"off": differs(call())} if name in chosen else {}
            turn, times = turns.repeated(call, wait)
        except FAILURES as error:
            yield {"name": name, "failed": turns.reason(error)}
            continue
        size, flop = (case.bytes, case.flop) if name != "attention" else (0, case.attention)
        yield Contestant(name, turn, times, times * size, times * flop, facts)


def difference(case: KernelCase, dtype: DTypeLike) -> Callable[[Any], float]:
    """A function of a result: its largest difference from the reference's, relative to the reference's largest number.

    It raises `ValueError` where that is more than rounding explains.
    """
    reference = functools.cache(lambda: np.asarray(_ours(case, "xla")[0](), np.float32))

    def differs(result: Any) -> float:
        got, want = np.asarray(result, np.float32), reference()
        off = float(np.abs(got - want).max() / np.abs(want).max())
        if not off <= TOLERANCE[jnp.dtype(dtype).name]:  # nor where it is not a number
            raise ValueError(f"wrong: {off:.1e} off the reference")
        return off

    return differs


def checked(case: KernelCase, chosen: list[Implementation], dtype: DTypeLike) -> Iterator[dict[str, Any]]:
    """How far each implementation is from the reference; nothing is timed."""
    differs = difference(case, dtype)
    for name in chosen:
        try:
            yield {"name": name, "off": differs(_ours(case, name)[0]())}
        except FAILURES as error:
            yield {"name": name, "failed": turns.reason(error)}


def _ours(case: KernelCase, implementation: Implementation) -> rivals.Call:
    run = jax.jit(functools.partial(case.run, implementation=implementation))
    return lambda: run(*case.args), jax.block_until_ready


OFF = Column("off reference", "off", "{:.0e}".format)
COLUMNS = (
    Column("us", "call_s", lambda s: f"{1e6 * s:,.1f}"),
    Column("MB", "call_bytes", lambda n: f"{n / 1e6:,.2f}"),
    Column("GB/s", "bytes_per_s", lambda n: f"{n / 1e9:,.1f}"),
    Column("TFLOP/s", "flop_per_s", lambda n: f"{n / 1e12:.2f}"),
    report.LIMIT,
    OFF,
)


def run(args: argparse.Namespace, command_line: list[str]) -> Report:
    """What the command line asks for."""
    compilation.enable_compilation_cache()
    dtype, first = jnp.dtype(args.dtype or native_dtype()), args.implementations[0]
    columns = (OFF,) if args.check else (*COLUMNS, Column(f"x {first}", f"x {first}"))
    return Report("kernels", report.about(command_line, dtype=dtype.name), columns, columns[0], _sections(args, dtype))


def _sections(args: argparse.Namespace, dtype: DTypeLike) -> Iterator[Section]:
    for name, kernel, store, shape in wanted(args):
        title = " ".join(filter(None, (name, shape.name, store)))
        say(title)
        chosen: list[Implementation] = [each for each in args.implementations if each != "cpu" or kernel.cpu]
        try:
            case = kernel.make(shape, store, dtype)
            if args.check:
                yield Section(title, list(checked(case, chosen, dtype)))
            else:
                found = list(contestants(case, chosen, args.against, dtype))
                yield _section(title, found, args.rounds, chosen[0], dtype)
        except FAILURES as error:
            yield Section(title, [{"name": "all", "failed": turns.reason(error)}])
        case = found = None  # lets go of its arrays
        jax.clear_caches()


def _section(
    title: str, found: list[Contestant | dict[str, Any]], rounds: int, first: str, dtype: DTypeLike
) -> Section:
    measured = turns.measure(found, rounds, dtype)
    rows = turns.rows(found, measured, [first])
    for row in rows:
        if "failed" not in row:
            row["call_s"] = row["seconds"] / row["work"]
            row["call_bytes"] = row["bytes"] // row["work"] if "bytes" in row else None
    return Section(f"{title}, {measured.limits}", rows, measured.limits._asdict())
