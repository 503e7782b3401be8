"""Prompts: tokens per second, and what a method's scores and compression add to attention's own time."""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import compilation
from kvjax.attention.prompt import prefill_attention
from kvjax.bench import models, report, turns
from kvjax.bench.decode import check_contexts
from kvjax.bench.report import Column, Report, Section
from kvjax.bench.turns import Contestant
from kvjax.generation import prefill
from kvjax.generation.allocate import init_cache
from kvjax.generation.model import Model
from kvjax.methods import make
from kvjax.policies.base import Recipe
from kvjax.spec import Lengths

ATTENTION = "attention alone"


def contestant(model: Model, label: str, recipe: Recipe, batch: int, context: int) -> Contestant:
    """Prefill of random tokens into a fresh cache, which is allocated before the clock starts."""
    lengths = Lengths((context,) * batch, 1, prefill.padded_length(context))
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, model.spec.vocab_size, (batch, lengths.padded)), jnp.int32)
    length = jnp.full((batch,), context, jnp.int32)

    def turn() -> float:
        cache = jax.block_until_ready(init_cache(model.decoder, recipe, lengths))
        start = time.perf_counter()
        jax.block_until_ready(prefill.prefill(model.decoder, recipe, tokens, length, cache))
        return time.perf_counter() - start

    return Contestant(label, turn, batch * context)


def attention_alone(model: Model, batch: int, context: int) -> Contestant:
    """The attention of all layers over random queries, keys and values."""
    spec, padded = model.spec, prefill.padded_length(context)
    draw = lambda i, n: jax.random.normal(jax.random.key(i), (batch, padded, n, spec.head_dim), model.decoder.dtype)
    args = (*(draw(i, n) for i, n in enumerate((spec.num_heads, spec.num_kv_heads, spec.num_kv_heads))),)
    length = jnp.full((batch,), context, jnp.int32)
    attend = {w: jax.jit(lambda *x, w=w: prefill_attention(*x, window=w)) for w in {*spec.windows, None}}

    def work() -> None:
        out = [attend[spec.window(layer)](*args, length)[0][0, 0, 0, 0] for layer in range(spec.num_layers)]
        jax.block_until_ready(out)

    return Contestant(ATTENTION, lambda: turns.timed(work), batch * context)


def added(measured: turns.Timings, name: str, full: str) -> float:
    """What a method adds to attention's time: the median over rounds."""
    ours, base, alone = (np.asarray(measured.seconds[each]) for each in (name, full, ATTENTION))
    return float(np.median((ours - base) / alone))


def run(args: argparse.Namespace, command_line: list[str]) -> Report:
    """What the command line asks for."""
    recipes = args.recipes
    full = next((label for label, recipe in recipes.items() if recipe._replace(kernels="cpu") == make("full")), "full")
    recipes = {full: make("full", None, {} if args.kernels is None else {"kernels": args.kernels})} | recipes
    compilation.enable_compilation_cache()
    model = models.load(args.model, args.dtype)
    check_contexts(args.contexts, model, 1)
    sections = []
    for context in args.contexts:
        found = [attention_alone(model, args.batch, context)]
        found += [contestant(model, label, recipe, args.batch, context) for label, recipe in recipes.items()]
        measured = turns.measure(found, args.rounds)
        rows: list[dict[str, Any]] = turns.rows(found, measured, [full])
        for row in rows[1:]:
            row["added"] = added(measured, row["name"], full)
            row["attention_share"] = rows[0]["seconds"] / row["seconds"]
        sections.append(Section(f"{args.batch} x {context:,} tokens", rows, {"context": context, "batch": args.batch}))
    columns = (
        Column("tokens/s", "per_s", "{:,.0f}".format),
        Column("s", "seconds", "{:.3f}".format),
        Column(f"x {full}", f"x {full}"),
        Column("attention's share", "attention_share", "{:.0%}".format),
        Column("added to attention", "added", "{:+.0%}".format),
    )
    about = report.about(command_line, model=model.name, dtype=model.decoder.dtype.name)
    return Report("prefill", about, columns, columns[0], sections)
