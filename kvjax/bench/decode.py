"""Decode speed: methods against the full cache, against other libraries, and against the machine's limit."""

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from kvjax import compilation
from kvjax.bench import compiling, memory, models, report, rivals, turns
from kvjax.bench.flags import STORED
from kvjax.bench.hugging_face import Transformers
from kvjax.bench.report import Column, Report, Section
from kvjax.bench.rivals import Reader
from kvjax.bench.shapes import PEERS
from kvjax.bench.turns import Contestant
from kvjax.cache import layout
from kvjax.cache.pages import LARGEST
from kvjax.checkpoint import hf
from kvjax.errors import InputError
from kvjax.generation import decode, prefill, sampling
from kvjax.generation.accounting import footprint, forced
from kvjax.generation.allocate import init_cache
from kvjax.generation.model import Model
from kvjax.methods import LEARNED, make
from kvjax.models.decoder import Decoder
from kvjax.parallel import mesh as meshes
from kvjax.plan import estimate
from kvjax.policies.base import Recipe
from kvjax.spec import Lengths


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

    planned = memory.setting(model, recipe, setting.context, setting.new, batch)
    moved = weight_bytes(model.decoder) + size.payload + size.scales + size.statistics
    moved //= planned.devices.data * planned.devices.model
    flop = 2 * estimate.work(planned).step
    facts = {
        "cache_bytes": size.total, "tokens_per_slot": setting.context / float(np.mean(slots)), "forced": refused,
        "batch": batch, "steps": setting.steps,
    }  # fmt: skip
    return Contestant(label, turn, batch * setting.steps, setting.steps * moved, setting.steps * flop, facts)


def rival(reader: Reader, model: Model, batch: int, setting: Contest) -> Contestant:
    """Another library's loop behind the same prompts, or behind a random cache where transformers' is to be cheap."""
    if setting.cheap and isinstance(reader, Transformers):
        reader.fill(batch, setting.context)
    else:
        reader.read(models.prompts(model.spec, batch, setting.context))
    size = reader.cache_bytes(batch, setting.context)
    facts = {"cache_bytes": size, "batch": batch, "steps": setting.steps}
    planned = memory.setting(model, make("full"), setting.context, setting.new, batch)
    return Contestant(
        reader.name, lambda: reader.go_on(setting.steps), batch * setting.steps,
        setting.steps * (weight_bytes(model.decoder) + size), setting.steps * 2 * estimate.work(planned).step, facts,
    )  # fmt: skip


def _read(model: Model, recipe: Recipe, batch: int, setting: Contest) -> tuple[jax.Array, layout.Cache]:
    """Logits after prompts of random tokens, and their cache."""
    reader = model.decoder
    if setting.cheap:
        size = None if model.mesh is None else meshes.size_of(model.mesh)
        reader = models.random(models.narrow(model.spec), reader.dtype, "narrow", size).decoder
    lengths = Lengths((setting.context,) * batch, setting.new, prefill.padded_length(setting.context))
    tokens = models.prompts(reader.spec, batch, setting.context, lengths.padded)
    length = jnp.full((batch,), setting.context, jnp.int32)
    cache = init_cache(reader, recipe, lengths)
    return prefill.prefill(reader, recipe, jnp.asarray(tokens), length, cache)


def weight_bytes(model: Decoder) -> int:
    """Bytes of the weights that every step reads; of an untied embedding it reads a row, and gates only prompts do."""
    total = sum(x.nbytes for path, x in hf.by_path(model)[0].items() if ".keep." not in path)
    return total if model.head is None else total - sum(x.nbytes for x in jax.tree.leaves(model.embedding))


def check_contexts(contexts: list[int], model: Model, new: int) -> None:
    """Whether the model has room for such prompts and `new` tokens."""
    for context in contexts:
        if not 0 < context <= model.spec.max_position - new:
            raise InputError(f"--contexts {context}: give 1 to {model.spec.max_position - new} tokens")


def _gated(model: Model, recipe: Recipe, rate: float | None) -> Model:
    """The model that a method runs on: with an imposed gate where it needs one."""
    if rate is None or recipe.name not in LEARNED:
        return model
    return models.gated(model, recipe.name, rate)  # pyright: ignore[reportArgumentType]


COLUMNS = (
    Column("batch", "batch", str),
    Column("tokens/s", "per_s", "{:,.2f}".format),
    Column("ms/step", "step_s", lambda s: f"{1e3 * s:.2f}"),
)
SIZES = (
    Column("MB/step", "step_bytes", lambda n: f"{n / 1e6:,.1f}"),
    report.LIMIT,
    Column("cache MB", "cache_bytes", lambda n: f"{n / 1e6:,.1f}"),
)
KEPT = Column("tokens/slot", "tokens_per_slot")


def run(args: argparse.Namespace, command_line: list[str]) -> Report:
    """What the command line asks for."""
    if args.compile is not None:
        sections = [compiling.section(args.recipes, args.compile)]
        return Report("decode", report.about(command_line), compiling.COLUMNS, compiling.COLUMNS[1], sections)
    if "full" in args.against:
        label = next((label for label, recipe in args.recipes.items() if recipe == make("full")), "full")
        args.recipes = {label: make("full", None, _kernels(args))} | args.recipes
        args.against[args.against.index("full")] = label
    limit = memory.of_device(args.memory) if args.batch == "max" else 0
    compilation.enable_compilation_cache()
    loaded = {w: models.load(args.model, args.dtype, args.mesh, None if w == STORED else w) for w in args.weights}
    model = next(iter(loaded.values()))
    check_contexts(args.contexts, model, steps_in_all(args))
    first, *_ = args.recipes
    against = [_named(name, next(iter(loaded)), loaded) for name in args.against or [first]]
    columns = (*COLUMNS, *(Column(f"x {name}", f"x {name}") for name in against), *SIZES)
    columns += (KEPT,) if args.impose_cr else ()
    about = report.about(command_line, model=model.name, dtype=model.decoder.dtype.name)
    return Report("decode", about, columns, COLUMNS[1], _sections(args, loaded, against, limit))


def steps_in_all(args: argparse.Namespace) -> int:
    """Tokens that are decoded: a first turn, and those that count."""
    return args.steps * (args.rounds + 1) + 1


def _named(label: str, weights: str, loaded: dict[str, Model]) -> str:
    return label if len(loaded) == 1 or label in PEERS else f"{label}, weights {weights}"


def _sections(args: argparse.Namespace, loaded: dict[str, Model], against: list[str], limit: int) -> Iterator[Section]:
    """A section for every context, or for each the methods one after the other where each fills the memory."""
    model, new = next(iter(loaded.values())), steps_in_all(args)
    others = [name for name in args.against if name in PEERS]
    with rivals.opened(others, model, max(args.contexts) + new) as readers:
        for context in args.contexts:
            setting = Contest(context, new, args.steps, args.prefill == "cheap")
            ready: dict[str, Callable[[], Contestant]] = {
                each.name: functools.partial(rival, each, model, int(args.batch), setting) for each in readers
            }
            for weights, one in loaded.items():
                for label, recipe in args.recipes.items():
                    name, own = _named(label, weights, loaded), _gated(one, recipe, args.impose_cr)
                    ready[name] = _maker(own, name, recipe, setting, args, limit)
            yield section(ready, args, context, against, model.decoder.dtype)


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


def section(
    ready: dict[str, Callable[[], Contestant]],
    args: argparse.Namespace,
    context: int,
    against: list[str],
    dtype: DTypeLike,
) -> Section:
    """Measure one context: in turns, or one after the other where each fills the memory."""
    groups = [{name: one} for name, one in ready.items()] if args.batch == "max" else [ready]
    done: list[Contestant | dict[str, Any]] = []
    seconds: dict[str, list[float]] = {}
    limits: list[turns.Limits] = []
    for group in groups:
        found = [turns.prepared(name, make_it) for name, make_it in group.items()]
        measured = turns.measure(found, args.rounds, dtype)
        limits.append(measured.limits)
        seconds |= measured.seconds
        done += [
            c._replace(turn=lambda: 0.0) if isinstance(c, Contestant) else c for c in found
        ]  # lets go of its cache
        del found
    measured = turns.Timings(turns.Limits(*map(max, zip(*limits, strict=True))), seconds)
    rows: list[dict[str, Any]] = turns.rows(done, measured, against)
    for row in rows:
        if "failed" not in row:
            row |= {"step_s": row["seconds"] / row["steps"], "step_bytes": row["bytes"] // row["steps"]}
    title = f"{context:,} tokens of context, {measured.limits}"
    title += ", one after the other" if args.batch == "max" else ""
    return Section(title, rows, {"context": context, **measured.limits._asdict()})
