"""Decode speed: methods against the full cache, against transformers, and against the memory's speed.

--methods full,h2o:20%+store=int4   budgets and arguments of each; the first is what the others are compared with
--model llama-3-8b                  random weights of that shape; or a checkpoint
--against full,transformers         compare with these
--batch max                         as many sequences as fit; then one method after the other, not in turns
--impose-cr 8                       give dmc and dms a gate with random decisions at that rate
"""

import argparse
import functools
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import compilation
from kvjax.attention import dispatch
from kvjax.bench import compiling, hugging_face, memory, models, report, turns
from kvjax.bench.report import Column, Report, Section
from kvjax.bench.turns import Contestant
from kvjax.cache import layout
from kvjax.cache.pages import LARGEST
from kvjax.cli import command
from kvjax.cli.flags import DTYPES
from kvjax.errors import InputError
from kvjax.generation import decode, prefill, sampling
from kvjax.generation.accounting import footprint, forced
from kvjax.generation.allocate import init_cache
from kvjax.generation.model import Model
from kvjax.methods import LEARNED, label_of, make, read_entry, taken
from kvjax.models.decoder import Decoder
from kvjax.parallel import mesh as meshes
from kvjax.policies.base import Recipe
from kvjax.spec import WEIGHT_BITS, Lengths

PROG = "kvjax.bench decode"
AGAINST = ("full", "transformers")
STORED = "stored"  # weights as they are


class Contest(NamedTuple):
    """What all contestants of a section have in common."""

    context: int  # tokens
    new: int  # tokens that are decoded
    steps: int  # tokens of a turn
    cheap: bool  # a model of the shape `models.narrow` reads the prompts


def contestant(model: Model, label: str, recipe: Recipe, batch: int, setting: Contest) -> Contestant:
    """Our decode loop on prompts of random tokens.

    Args:
      model: with the gate that the method needs.
      label, recipe: the method.
      batch: sequences.
      setting: the rest.
    """
    logits, cache = _read(model, recipe, batch, setting)
    length, chooser = jnp.full((batch,), setting.context, jnp.int32), sampling.chooser(sampling.Sampling(), batch)
    ends = decode.ends((), LARGEST, batch)
    size, _, _, slots = footprint(model, cache, ())
    refused = forced(cache)
    carried = [decode.first_token(logits, cache, length, chooser, ends, jnp.zeros(logits.shape, bool))]
    del logits, cache

    def turn() -> float:
        start = time.perf_counter()
        carried[0], out, _ = decode.decode_loop(
            model.decoder, carried[0], chooser, ends, recipe=recipe, chunk=setting.steps
        )
        jax.block_until_ready(out)
        return time.perf_counter() - start

    floor = weight_bytes(model.decoder) + size.payload + size.scales + size.statistics
    facts = {
        "cache_bytes": size.total, "tokens_per_slot": setting.context / float(np.mean(slots)), "forced": refused,
        "batch": batch, "steps": setting.steps,
    }  # fmt: skip
    return Contestant(label, turn, batch * setting.steps, setting.steps * floor, facts)


def _read(model: Model, recipe: Recipe, batch: int, setting: Contest) -> tuple[jax.Array, layout.Cache]:
    """Logits after prompts of random tokens, and their cache."""
    reader = model.decoder
    if setting.cheap:
        size = None if model.mesh is None else meshes.size_of(model.mesh)
        reader = models.random(models.narrow(model.spec), reader.dtype, "narrow", size).decoder
    lengths = Lengths((setting.context,) * batch, setting.new, prefill.padded_length(setting.context))
    tokens = np.random.default_rng(0).integers(0, reader.spec.vocab_size, (batch, lengths.padded), np.int32)
    length = jnp.full((batch,), setting.context, jnp.int32)
    cache = init_cache(reader, recipe, lengths)
    return prefill.prefill(reader, recipe, jnp.asarray(tokens), length, cache)


def weight_bytes(model: Decoder) -> int:
    """Bytes of the weights that every step reads; of an untied embedding it reads a row."""
    total = sum(x.nbytes for x in jax.tree.leaves(model))
    return total if model.head is None else total - sum(x.nbytes for x in jax.tree.leaves(model.embedding))


def read_recipe(entry: str, stores: dict[str, str]) -> Recipe:
    """A recipe from `method:budget+key=value`."""
    head, plus, rest = entry.partition("+")
    method, _, budget = head.partition(":")
    name, arguments = read_entry(method + plus + rest)
    return make(name, budget or None, taken(name, stores) | arguments)


def add_flags(p: argparse.ArgumentParser) -> None:
    """The command line's flags, without those that all commands share."""
    add_model_flags(p)
    p.add_argument("--batch", default="1", metavar="N", help="sequences, or max = as many as fit (default: 1)")
    p.add_argument("--memory", metavar="SIZE", help="of the device, for --batch max (default: what the device says)")
    p.add_argument("--steps", type=int, default=16, help="tokens per turn (default: 16)")
    p.add_argument(
        "--prefill",
        choices=("real", "cheap"),
        default="real",
        help="what fills the cache: the model, or a narrow one of the same cache, in a fraction of the time",
    )
    command.add_mesh_flag(p)
    p.add_argument(
        "--weights", default=STORED, metavar="A,B", help=f"{STORED}, {', '.join(WEIGHT_BITS)}: several take turns"
    )
    p.add_argument("--impose-cr", type=float, metavar="CR", help="tokens per slot of dmc and dms on random weights")
    p.add_argument("--against", default="", metavar="A,B", help=f"compare with: {', '.join(AGAINST)}")
    p.add_argument("--transformers", action="store_true", help="short for --against transformers")
    p.add_argument("--compile", type=int, metavar="LAYERS", help="only time the compilation of so many tiny layers")


def add_model_flags(p: argparse.ArgumentParser, contexts: str = "4096,16384") -> None:
    """Which model, which methods, how long."""
    names = ", ".join(models.SHAPES)
    p.add_argument("--model", default=models.DEFAULT, metavar="M", help=f"a checkpoint, or random: {names}")
    p.add_argument(
        "--methods",
        default="full,snapkv:10%",
        metavar="A,B:20%",
        help="such as h2o:20%%+store=int4: a budget and arguments",
    )
    command.add_store_flags(p)
    p.add_argument("--contexts", default=contexts, metavar="N,M", help=f"prompt tokens (default: {contexts})")
    p.add_argument("--dtype", choices=DTYPES, help="(default: float32 on CPU, else bfloat16)")


def chosen(args: argparse.Namespace) -> dict[str, Recipe]:
    """The methods by their labels."""
    recipes = {label_of(e): read_recipe(e, command.stores(args)) for e in args.methods.split(",")}
    for recipe in recipes.values():
        dispatch.check(recipe.kernels)
    return recipes


def contexts_of(args: argparse.Namespace) -> list[int]:
    """The prompts' lengths [tokens]."""
    try:
        return [int(n) for n in args.contexts.split(",")]
    except ValueError:
        raise InputError(f"--contexts {args.contexts!r} is not a list of lengths such as 4096,16384") from None


def check_contexts(contexts: list[int], model: Model, new: int) -> None:
    """Whether the model has room for such prompts and `new` tokens."""
    for context in contexts:
        if not 0 < context <= model.spec.max_position - new:
            raise InputError(f"--contexts {context}: give 1 to {model.spec.max_position - new} tokens")


def _opponents(args: argparse.Namespace) -> list[str]:
    names = [name for name in args.against.split(",") if name] + ["transformers"] * args.transformers
    for name in names:
        if name not in AGAINST:
            raise InputError(f"--against {name}: choose from {', '.join(AGAINST)}")
    if "transformers" in names:
        hugging_face.check()
    return list(dict.fromkeys(names))


def _gated(model: Model, recipe: Recipe, rate: float | None) -> Model:
    """The model that a method runs on: with an imposed gate where it needs one."""
    if rate is None or recipe.name not in LEARNED:
        return model
    return models.gated(model, recipe.name, rate)  # pyright: ignore[reportArgumentType]


def _check(args: argparse.Namespace, recipes: dict[str, Recipe]) -> None:
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
        if args.model not in models.SHAPES:
            raise InputError("--impose-cr is for random weights (--model llama-3-8b): a checkpoint has its own gate")
        if not any(recipe.name in LEARNED for recipe in recipes.values()):
            raise InputError(f"--impose-cr is for {' and '.join(LEARNED)}: name one in --methods")
    if args.batch == "max" and args.mesh is not None:
        raise InputError("--batch max is for one device: give a number with --mesh")
    if args.batch == "max" and "transformers" in _opponents(args):
        raise InputError("--batch max fills the memory with one cache: leave --against transformers out")


COLUMNS = (
    Column("batch", "batch", str),
    Column("tokens/s", "per_s", "{:,.2f}".format),
    Column("ms/step", "step_s", lambda s: f"{1e3 * s:.2f}"),
)
SIZES = (
    Column("MB/step", "step_bytes", lambda n: f"{n / 1e6:,.1f}"),
    Column("x floor", "times_floor"),
    Column("cache MB", "cache_bytes", lambda n: f"{n / 1e6:,.1f}"),
)
KEPT = Column("tokens/slot", "tokens_per_slot")


def run(args: argparse.Namespace, command_line: list[str]) -> Report:
    """What the command line asks for."""
    recipes = chosen(args)
    _check(args, recipes)
    if args.compile is not None:
        sections = [compiling.section(recipes, args.compile)]
        return Report("decode", report.about(command_line), compiling.COLUMNS, compiling.COLUMNS[1], sections)
    against, new = _opponents(args), args.steps * (args.rounds + 1) + 1
    if "full" in against:
        label = next((label for label, recipe in recipes.items() if recipe == make("full")), "full")
        recipes = {label: make("full", None, _kernels(args))} | recipes
        against[against.index("full")] = label
    contexts = contexts_of(args)
    limit = memory.of_device(args.memory) if args.batch == "max" else 0
    compilation.enable_compilation_cache()
    loaded = {w: models.load(args.model, args.dtype, args.mesh, None if w == STORED else w) for w in _weights(args)}
    model = next(iter(loaded.values()))
    check_contexts(contexts, model, new)
    named = lambda label, weights: label if len(loaded) == 1 else f"{label}, weights {weights}"
    against = [hugging_face.NAME if name == "transformers" else name for name in against] or [next(iter(recipes))]
    against = [named(name, next(iter(loaded))) if name in recipes else name for name in against]
    sections = []
    for context in contexts:
        setting = Contest(context, new, args.steps, args.prefill == "cheap")
        ready = [
            _maker(_gated(one, recipe, args.impose_cr), named(label, weights), recipe, setting, args, limit)
            for weights, one in loaded.items()
            for label, recipe in recipes.items()
        ]
        if hugging_face.NAME in against:
            size = weight_bytes(model.decoder), int(args.batch)
            ready.insert(0, functools.partial(hugging_face.contestant, model, context, args.steps, *size))
        sections.append(_section(ready, args, context, against))
    columns = (*COLUMNS, *(Column(f"x {name}", f"x {name}") for name in against), *SIZES)
    columns += (KEPT,) if args.impose_cr else ()
    about = report.about(command_line, model=model.name, dtype=model.decoder.dtype.name)
    return Report("decode", about, columns, COLUMNS[1], sections)


def _weights(args: argparse.Namespace) -> list[str]:
    """What `--weights` names."""
    names = args.weights.split(",")
    for name in names:
        if name not in (STORED, *WEIGHT_BITS):
            raise InputError(f"--weights {name}: choose from {', '.join((STORED, *WEIGHT_BITS))}")
    return names


def _kernels(args: argparse.Namespace) -> dict[str, str]:
    return {} if args.kernels is None else {"kernels": args.kernels}


def _maker(
    model: Model, label: str, recipe: Recipe, setting: Contest, args: argparse.Namespace, limit: int
) -> Callable[[], Contestant]:
    """A function that makes a contestant, and fills its cache."""

    def make_it() -> Contestant:
        spec = models.narrow(model.spec) if setting.cheap else model.spec
        if not limit:
            return contestant(model, label, recipe, int(args.batch), setting)
        batch = memory.largest_batch(model, recipe, setting.context, setting.new, limit, spec)
        return contestant(model, label, recipe, batch, setting)

    return make_it


def _section(
    ready: list[Callable[[], Contestant]], args: argparse.Namespace, context: int, against: list[str]
) -> Section:
    """Measure one context: in turns, or one after the other where each fills the memory."""
    groups = [[one] for one in ready] if args.batch == "max" else [ready]
    done: list[Contestant] = []
    seconds: dict[str, list[float]] = {}
    copy, read = [], []
    for group in groups:
        found = [make_it() for make_it in group]
        measured = turns.measure(found, args.rounds)
        copy.append(measured.copy)
        read.append(measured.read)
        seconds |= measured.seconds
        done += [c._replace(turn=lambda: 0.0) for c in found]  # lets go of its cache
        del found
    measured = turns.Timings(max(copy), max(read), seconds)
    rows: list[dict[str, Any]] = turns.rows(done, measured, against)
    for row in rows:
        row |= {"step_s": row["seconds"] / row["steps"], "step_bytes": row["bytes"] // row["steps"]}
    title = f"{context:,} tokens of context, copy {measured.copy / 1e9:.1f} GB/s, read {measured.read / 1e9:.1f} GB/s"
    title += ", one after the other" if args.batch == "max" else ""
    return Section(title, rows, {"context": context, "copy": measured.copy, "read": measured.read})
