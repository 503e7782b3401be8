"""What the flags of a command mean. What is wrong with them is refused here, before models are imported."""

import argparse
import importlib.util
import os
import re
import shutil
from pathlib import Path

import jax

from kvjax.attention import dispatch
from kvjax.bench.flags import AGAINST, STORED
from kvjax.bench.shapes import (
    ALL,
    ATTENTION,
    KERNELS,
    LARGE,
    LLAMA_CPP,
    PEERS,
    SHAPES,
    SMALL,
    STAGES,
    STORES,
    read_shape,
)
from kvjax.checkpoint.header import DTYPES
from kvjax.cli import command
from kvjax.errors import InputError
from kvjax.methods import KERNELS as IMPLEMENTATIONS
from kvjax.methods import LEARNED, label_of, make, read_entry, taken
from kvjax.policies.base import Recipe
from kvjax.spec import WEIGHT_BITS
from pallas_kernels.implementation import Implementation, resolve

MEASURED = ("prefill", "decode")  # by `bench peers`
MOST_MINUTES = 24 * 60
MOST_STEPS = 2**16  # tokens of a turn


def decode(args: argparse.Namespace) -> None:
    """Of `bench decode`: recipes by their labels, contexts [tokens], kinds of weights, names of rivals."""
    _model(args)
    args.weights = names("--weights", args.weights, (STORED, *WEIGHT_BITS))
    against = args.against + ",transformers" * args.transformers
    args.against = names("--against", against, AGAINST) if against else []
    _check_decode(args)
    _needs(args.against, args.batch)


def _check_decode(args: argparse.Namespace) -> None:
    if min(args.steps, args.rounds) < 1:
        raise InputError("--steps and --rounds are at least 1")
    most = command.MOST_SEQUENCES
    if args.batch != "max" and not (re.fullmatch("[1-9][0-9]{0,4}", args.batch) and int(args.batch) <= most):
        raise InputError(f"--batch {args.batch} is not a number from 1 to {most}, or max")
    if args.batch != "max" and args.memory is not None:
        raise InputError("--memory is for --batch max")
    if args.compile is not None and args.compile < 1:
        raise InputError(f"--compile {args.compile} is not at least 1 layer")
    if args.impose_cr is not None:
        if not 1 < args.impose_cr <= 1000:
            raise InputError(f"--impose-cr {args.impose_cr:g} is not above 1, tokens per slot")
        if args.model not in SHAPES:
            raise InputError("--impose-cr is for random weights (--model llama-3-8b): a checkpoint has its own gate")
        if not any(recipe.name in LEARNED for recipe in args.recipes.values()):
            raise InputError(f"--impose-cr is for {' and '.join(LEARNED)}: name one in --methods")
    if args.batch == "max" and args.mesh is not None:
        raise InputError("--batch max is for one device: give a number with --mesh")
    if args.batch == "max" and {*args.against} & {*PEERS}:
        raise InputError(f"--batch max fills the memory with one cache: leave {', '.join(PEERS)} out of --against")


def prefill(args: argparse.Namespace) -> None:
    """Of `bench prefill`: recipes by their labels, contexts [tokens]."""
    _model(args)
    command.check_numbers(args, batch=command.MOST_SEQUENCES)
    args.against = names("--against", args.against, PEERS) if args.against else []
    _needs(args.against, args.batch)


def peers(args: argparse.Namespace) -> None:
    """Of `bench peers`: recipes by their labels, contexts [tokens], names of rivals, what is measured."""
    _model(args)
    command.check_numbers(args, steps=MOST_STEPS)
    args.measure = names("--measure", args.measure, MEASURED)
    args.against = names("--against", args.against, PEERS)


def kernels(args: argparse.Namespace) -> None:
    """Of `bench kernels`: kernels, stores, shapes, implementations, names of rivals (None = all that can run here)."""
    if args.all and (args.kernels or args.stores or args.shapes):
        raise InputError("--all is for all kernels, stores and shapes: leave --kernels, --stores and --shapes out")
    args.shapes = ",".join(ALL) if args.all else args.shapes
    _cases(args)
    args.implementations = implementations("--implementations", args.implementations, cpu=True)
    if args.against is not None:
        args.against = names("--against", args.against, (*ATTENTION, "attention", "none"))


def tune(args: argparse.Namespace) -> None:
    """Of `bench tune`: kernels, stores, shapes, the implementation."""
    _cases(args)
    (args.implementation,) = implementations("--implementation", args.implementation, cpu=False)


def device(args: argparse.Namespace) -> None:
    """Of `bench device`: names of stages."""
    if not 0 < args.minutes <= MOST_MINUTES:
        raise InputError(f"--minutes {args.minutes:g} is not above 0 and at most {MOST_MINUTES}")
    args.stages = names("--stages", args.stages, STAGES)


def convert(args: argparse.Namespace) -> None:
    """Of `bench convert`: names of dtypes."""
    if args.model not in SHAPES:
        raise InputError(f"--model {args.model}: random weights only: {', '.join(SHAPES)}")
    args.dtypes = names("--dtypes", args.dtypes, tuple(DTYPES))
    if args.folder is not None and not args.folder.is_dir():
        raise InputError(f"--folder {args.folder} is not a folder")


def serve(args: argparse.Namespace) -> None:
    """Of `bench serve`: recipes by their labels, ranges of tokens, loads, clients."""
    most = command.MOST_SEQUENCES
    args.clients = args.requests if args.clients is None else args.clients
    command.check_numbers(args, requests=most, clients=most, pool=most, seats=most)
    for name in ("prompt_tokens", "new_tokens"):
        setattr(args, name, _range(getattr(args, name), f"--{name.replace('_', '-')}"))
    try:
        args.loads = [float(x) for x in args.loads.split(",") if x]
    except ValueError:
        args.loads = [0.0]
    if not all(0 < load < 1e6 for load in args.loads):
        raise InputError("--loads is not a list of rates such as 0.5,1")
    args.recipes = {label_of(e): read_recipe(e, command.stores(args)) for e in args.methods.split(",")}
    _needs([args.against], 1)


def read_recipe(entry: str, stores: dict[str, str]) -> Recipe:
    """A recipe from `method:budget+key=value`."""
    head, plus, rest = entry.partition("+")
    method, _, budget = head.partition(":")
    name, arguments = read_entry(method + plus + rest)
    return make(name, budget or None, taken(name, stores) | arguments)


def names(flag: str, text: str | None, known: tuple[str, ...]) -> list[str]:
    """The names that a flag lists, each once; all that are known where it was not given."""
    found = list(known) if text is None else list(dict.fromkeys(name for name in text.split(",") if name))
    for name in found:
        if name not in known:
            raise InputError(f"{flag} {name}: choose from {', '.join(known)}")
    if not found:
        raise InputError(f"{flag} names none: choose from {', '.join(known)}")
    return found


def implementations(flag: str, text: str, *, cpu: bool) -> list[Implementation]:
    """What implementations a flag names, without repetition; raises `InputError` for another platform's.

    `cpu`: those of CPUs among them.
    """
    listed = names(flag, text, tuple(IMPLEMENTATIONS))
    found: list[Implementation] = list(dict.fromkeys(resolve(IMPLEMENTATIONS[name], cpu=cpu) for name in listed))
    for name in found:
        if name in ("tpu", "gpu") and name != jax.default_backend():
            raise InputError(f"{flag} {name} cannot run on {jax.default_backend()}")
    return found


def _needs(against: list[str], batch: int | str) -> None:
    """Raise `InputError` for another library that cannot run here, or not that many sequences."""
    for name in against:
        if name in PEERS and (why := missing(name)):
            raise InputError(f"--against {name}: {why}")
        if name.startswith("llama.cpp") and str(batch) != "1":
            raise InputError(f"--against {name} is for one sequence: leave --batch {batch} out")


def missing(peer: str) -> str | None:
    """Why a library cannot run here; None = it can."""
    if peer == "transformers":
        there = all(map(importlib.util.find_spec, ("torch", "transformers")))
        return None if there else "needs transformers and torch: pip install '.[parity]'"
    folder = os.environ.get(LLAMA_CPP)
    if not folder or not (Path(folder) / "node_modules" / "node-llama-cpp").is_dir():
        return f"{LLAMA_CPP} does not name a folder with node_modules/node-llama-cpp (npm install node-llama-cpp)"
    return None if shutil.which("node") else "there is no node on the PATH"


def _model(args: argparse.Namespace) -> None:
    args.recipes = {label_of(e): read_recipe(e, command.stores(args)) for e in args.methods.split(",")}
    for recipe in args.recipes.values():
        dispatch.check(recipe.kernels)
    try:
        args.contexts = [int(n) for n in args.contexts.split(",")]
    except ValueError:
        raise InputError(f"--contexts {args.contexts!r} is not a list of lengths such as 4096,16384") from None


def _cases(args: argparse.Namespace) -> None:
    text = args.shapes or (SMALL if jax.default_backend() == "cpu" else LARGE)
    args.shapes = [read_shape(each) for each in text.split(",")]
    args.stores = names("--stores", args.stores, STORES)
    args.kernels = names("--kernels", args.kernels, KERNELS)


def _range(text: str, flag: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d{0,8})(?:-([1-9]\d{0,8}))?", text)
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if high < low:
        raise InputError(f"{flag} {text} is not a range of tokens such as 200-400")
    return low, high
