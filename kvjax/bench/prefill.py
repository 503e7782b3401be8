"""Prompts: tokens per second, and what a method's scores and compression add to attention's own time."""

import argparse
import functools
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import compilation
from kvjax.attention.prompt import prefill_attention
from kvjax.bench import memory, models, report, rivals, turns
from kvjax.bench.decode import check_contexts, weight_bytes
from kvjax.bench.report import Column, Report, Section
from kvjax.bench.rivals import Reader
from kvjax.bench.turns import Contestant
from kvjax.generation import prefill
from kvjax.generation.allocate import init_cache
from kvjax.generation.model import Model
from kvjax.methods import make
from kvjax.plan import estimate
from kvjax.policies.base import Recipe
from kvjax.spec import Lengths

ATTENTION = "attention alone"


def contestant(model: Model, label: str, recipe: Recipe, batch: int, context: int) -> Contestant:
    """Prefill of random tokens into a fresh cache, which is allocated before the clock starts."""
    lengths = Lengths((context,) * batch, 1, prefill.padded_length(context))
    tokens = jnp.asarray(models.prompts(model.spec, batch, context, lengths.padded))
    length = jnp.full((batch,), context, jnp.int32)

    def turn() -> float:
        cache = jax.block_until_ready(init_cache(model.decoder, recipe, lengths))
        start = time.perf_counter()
        jax.block_until_ready(prefill.prefill(model.decoder, recipe, tokens, length, cache))
        return time.perf_counter() - start

    flop = 2 * estimate.work(memory.setting(model, recipe, context, 1, batch)).prompts
    return Contestant(label, turn, batch * context, weight_bytes(model.decoder), flop)


def rival(reader: Reader, model: Model, batch: int, context: int) -> Contestant:
    """Another library on the same prompts."""
    tokens = models.prompts(model.spec, batch, context)
    flop = 2 * estimate.work(memory.setting(model, make("full"), context, 1, batch)).prompts
    return Contestant(reader.name, lambda: reader.read(tokens), batch * context, weight_bytes(model.decoder), flop)


def attention_alone(model: Model, batch: int, context: int) -> Contestant:
    """The attention of all layers over random queries, keys and values."""
    spec, padded = model.spec, prefill.padded_length(context)
    draw = lambda i, n: jax.random.normal(jax.random.key(i), (batch, padded, n, spec.head_dim), model.decoder.dtype)
    args = (*(draw(i, n) for i, n in enumerate((spec.num_heads, spec.num_kv_heads, spec.num_kv_heads))),)
    length = jnp.full((batch,), context, jnp.int32)
    attend = {w: jax.jit(lambda *x, w=w: prefill_attention(*x, window=w, kernels="cpu")) for w in {*spec.windows, None}}

    def work() -> None:
        out = [attend[spec.window(layer)](*args, length)[0][0, 0, 0, 0] for layer in range(spec.num_layers)]
        jax.block_until_ready(out)

    seen = sum(min(context / 2, spec.window(layer) or context) for layer in range(spec.num_layers))
    flop = 4 * batch * context * spec.num_heads * spec.head_dim * seen
    return Contestant(ATTENTION, lambda: turns.timed(work), batch * context, flop=flop)


def added(measured: turns.Timings, name: str, full: str) -> float:
    """What a method adds to attention's time: the median over rounds."""
    ours, base, alone = (np.asarray(measured.seconds[each]) for each in (name, full, ATTENTION))
    return float(np.median((ours - base) / alone))


def run(args: argparse.Namespace, command_line: list[str]) -> Report:
    """What the command line asks for."""
    whole = lambda recipe: recipe._replace(kernels="cpu") == make("full")
    full = next((label for label, recipe in args.recipes.items() if whole(recipe)), "full")
    kernels = {} if args.kernels is None else {"kernels": args.kernels}
    args.recipes = {full: make("full", None, kernels)} | args.recipes
    compilation.enable_compilation_cache()
    model = models.load(args.model, args.dtype)
    check_contexts(args.contexts, model, 1)
    columns = (
        Column("tokens/s", "per_s", "{:,.0f}".format),
        Column("s", "seconds", "{:.3f}".format),
        *(Column(f"x {name}", f"x {name}") for name in (full, *args.against)),
        report.LIMIT,
        Column("attention's share", "attention_share", "{:.0%}".format),
        Column("added to attention", "added", "{:+.0%}".format),
    )
    about = report.about(command_line, model=model.name, dtype=model.decoder.dtype.name)
    return Report("prefill", about, columns, columns[0], _sections(args, model, full))


def _sections(args: argparse.Namespace, model: Model, full: str) -> Iterator[Section]:
    with rivals.opened(args.against, model, max(args.contexts) + 1) as readers:
        for context in args.contexts:
            ready: dict[str, Callable[[], Contestant]] = {
                ATTENTION: functools.partial(attention_alone, model, args.batch, context)
            }
            ready |= contestants(args.recipes, readers, model, args.batch, context)
            found = [turns.prepared(name, make_it) for name, make_it in ready.items()]
            measured = turns.measure(found, args.rounds, model.decoder.dtype)
            rows = turns.rows(found, measured, [full, *args.against])
            for row in rows:
                if {ATTENTION, full} <= measured.seconds.keys() and row["name"] in args.recipes and "failed" not in row:
                    row["added"] = added(measured, row["name"], full)
                    row["attention_share"] = rows[0]["seconds"] / row["seconds"]
            title = f"{args.batch} x {context:,} tokens, {measured.limits}"
            yield Section(title, rows, {"context": context, "batch": args.batch, **measured.limits._asdict()})


def contestants(
    recipes: dict[str, Recipe], readers: Sequence[Reader], model: Model, batch: int, context: int
) -> dict[str, Callable[[], Contestant]]:
    """Who reads a prompt, by name: functions that make them."""
    ours = {
        label: functools.partial(contestant, model, label, recipe, batch, context) for label, recipe in recipes.items()
    }
    return ours | {each.name: functools.partial(rival, each, model, batch, context) for each in readers}
