"""Kernels: time, bytes, bandwidth beside a copy's, how many times as fast as plain XLA and other libraries.

    --shapes llama-3-8b:32768:16        model, context [tokens] and batch; several with commas
    --all                               every kernel and store at the shapes of three models, 4,096 to 131,072 tokens

What a kernel cannot do is said, and other libraries take part where they are installed.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from kvjax import compilation
from kvjax.bench import cases, models, report, rivals, turns
from kvjax.bench.cases import KERNELS, Kernel, KernelCase, Shape
from kvjax.bench.report import Column, Report, Section
from kvjax.bench.turns import Contestant
from kvjax.cli.flags import DTYPES
from kvjax.errors import InputError
from kvjax.methods import KERNELS as IMPLEMENTATIONS
from kvjax.models.decoder import native_dtype
from pallas_kernels.implementation import Implementation, resolve

SMALL, LARGE = "llama-88m:4096", "llama-3-8b:32768:16"
ALL = [
    f"{model}:{context}:{batch}"
    for model in ("llama-3-8b", "llama-2-7b", "qwen2-7b")
    for context, batch in ((4096, 16), (32768, 16 if model != "llama-2-7b" else 4), (131072, 1))
]


def add_flags(p: argparse.ArgumentParser) -> None:
    """The command line's flags, without those that all commands share."""
    add_case_flags(p)
    p.add_argument("--all", action="store_true", help="every kernel, store and shape")
    p.add_argument(
        "--implementations",
        default="xla,auto",
        metavar="A,B",
        help=f"{', '.join(IMPLEMENTATIONS)}; the first is what others are compared with (default: xla,auto)",
    )
    names = ", ".join([*rivals.DECODE, "attention"])
    p.add_argument("--against", metavar="A,B", help=f"{names}, or none (default: all that can run here)")


def add_case_flags(p: argparse.ArgumentParser) -> None:
    """Which kernels, stores, shapes."""
    p.add_argument("--kernels", metavar="A,B", help=f"{', '.join(KERNELS)} (default: all)")
    p.add_argument("--stores", metavar="A,B", help=f"of decode_attention: {', '.join(cases.STORES)} (default: all)")
    p.add_argument(
        "--shapes", metavar="M:N:B,..", help=f"model:context:batch (default: {SMALL} on CPU, else {LARGE}; see below)"
    )
    p.add_argument("--dtype", choices=DTYPES, help="(default: float32 on CPU, else bfloat16)")
    p.epilog = f"models: {', '.join(models.SHAPES)}; kernels of prompts take a batch of one"


def split(flag: str, text: str | None, known: tuple[str, ...]) -> list[str]:
    """The names that a flag lists; all that are known where it was not given."""
    names = list(known) if text is None else list(dict.fromkeys(name for name in text.split(",") if name))
    for name in names:
        if name not in known:
            raise InputError(f"{flag} {name}: choose from {', '.join(known)}")
    if not names:
        raise InputError(f"{flag} names none: choose from {', '.join(known)}")
    return names


def wanted(args: argparse.Namespace) -> list[tuple[str, Kernel, str, Shape]]:
    """Every kernel at every shape with every store."""
    everything = getattr(args, "all", False)
    if everything and (args.kernels or args.stores or args.shapes):
        raise InputError("--all is for all kernels, stores and shapes: leave --kernels, --stores and --shapes out")
    text = ",".join(ALL) if everything else args.shapes or (SMALL if jax.default_backend() == "cpu" else LARGE)
    shapes = [cases.read_shape(each) for each in text.split(",")]
    stores = split("--stores", args.stores, cases.STORES)
    found = []
    for name in split("--kernels", args.kernels, tuple(KERNELS)):
        kernel = KERNELS[name]
        own = list(dict.fromkeys(shape._replace(batch=1) if kernel.prompt else shape for shape in shapes))
        of = [store for store in stores if store in kernel.stores] if kernel.stores != ("",) else [""]
        found += [(name, kernel, store, shape) for shape in own for store in of]
    return found


def implementations(text: str, *, cpu: bool) -> list[Implementation]:
    """What implementations a flag names, without repetition; raises `InputError` for another platform's.

    `cpu`: those of CPUs among them.
    """
    names = split("--implementations", text, tuple(IMPLEMENTATIONS))
    found: list[Implementation] = list(dict.fromkeys(resolve(IMPLEMENTATIONS[name], cpu=cpu) for name in names))
    for name in found:
        if name in ("tpu", "gpu") and name != jax.default_backend():
            raise InputError(f"--implementations {name} cannot run on {jax.default_backend()}")
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
    chosen, todo = implementations(args.implementations, cpu=True), wanted(args)
    names = (*rivals.DECODE, "attention", "none")
    against = None if args.against is None else split("--against", args.against, names)
    compilation.enable_compilation_cache()
    dtype = jnp.dtype(args.dtype or native_dtype())
    sections = []
    for name, kernel, store, shape in todo:
        title = " ".join(filter(None, (name, shape.name, store)))
        say(title)
        case = kernel.make(shape, store, dtype)
        found = list(contestants(case, [each for each in chosen if each != "cpu" or not kernel.prompt], against))
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
