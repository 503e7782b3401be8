"""Decode speed: methods against the full cache, against transformers, and against the memory floor.

All contestants take turns in one process, so that a noisy machine is noisy for all of them: read the ratios.
"""

import argparse
import importlib.util
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvjax import command, decode, generation, kernels, sampling
from kvjax.cache.policy import Recipe
from kvjax.errors import InputError
from kvjax.generation import Model
from kvjax.methods import label_of, make, read_entry, taken
from kvjax.models.decoder import Decoder
from kvjax.spec import Lengths, ModelSpec

PROG = "kvjax.bench"
RANDOM = ModelSpec(
    vocab_size=8192, embed_dim=768, num_layers=12, num_heads=12, num_kv_heads=4, head_dim=64, mlp_dim=2048,
    max_position=1 << 20,
)  # fmt: skip
Turn = Callable[[int], float]  # decode so many tokens per sequence, return seconds


class Contestant(NamedTuple):
    """Something that decodes, and the bytes that it must read for each token."""

    name: str
    turn: Turn
    floor_bytes: int
    cache_bytes: int


def kvjax_contestant(model: Model, label: str, recipe: Recipe, batch: int, context: int, new: int) -> Contestant:
    """Our decode loop on prompts of random tokens."""
    kernels.check(recipe.kernels)
    rng = np.random.default_rng(0)
    lengths = Lengths((context,) * batch, new, decode.padded_length(context))
    tokens = np.zeros((batch, lengths.padded), np.int32)
    tokens[:, :context] = rng.integers(0, model.spec.vocab_size, (batch, context))
    length, chooser = jnp.full((batch,), context, jnp.int32), sampling.chooser(sampling.Sampling(), batch)
    stop = jnp.zeros((0,), jnp.int32)
    cache = decode.init_cache(model.decoder, recipe, lengths)
    logits, cache = decode.prefill(model.decoder, recipe, jnp.asarray(tokens), length, cache)
    carried = [decode.first_token(logits, cache, length, chooser, stop, None, mode="greedy")]
    size = generation.cache_bytes(cache)

    def turn(steps: int) -> float:
        start = time.perf_counter()
        limit = carried[0].step + steps
        carried[0], out = decode.decode_loop(
            model.decoder, carried[0], chooser, stop, limit, recipe=recipe, mode="greedy", chunk=steps
        )
        jax.block_until_ready(out)
        return time.perf_counter() - start

    return Contestant(
        label, turn, _weight_bytes(model.decoder) + size.payload + size.scales + size.statistics, size.total
    )


def _weight_bytes(model: Decoder) -> int:
    """Bytes of the weights that every step reads; of an untied embedding it reads a row."""
    total = sum(x.nbytes for x in jax.tree.leaves(model))
    return total if model.head is None else total - model.embedding[...].nbytes


def transformers_contestant(model: Model, batch: int, context: int) -> Contestant:
    """transformers' Llama with its `DynamicCache`, random weights of the same shape, in float32."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM  # pyright: ignore[reportMissingImports]

    spec = model.spec
    config = LlamaConfig(
        vocab_size=spec.vocab_size, hidden_size=spec.embed_dim, intermediate_size=spec.mlp_dim,
        num_hidden_layers=spec.num_layers, num_attention_heads=spec.num_heads, head_dim=spec.head_dim,
        num_key_value_heads=spec.num_kv_heads, max_position_embeddings=spec.max_position,
        tie_word_embeddings=spec.tie_embeddings,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs, cache = LlamaForCausalLM(config).eval(), DynamicCache()
    for layer in range(spec.num_layers):
        shape = (batch, spec.num_kv_heads, context, spec.head_dim)
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    token = [torch.zeros((batch, 1), dtype=torch.long)]

    def turn(steps: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            for _ in range(steps):
                logits = theirs(input_ids=token[0], past_key_values=cache, use_cache=True).logits
                token[0] = logits[:, -1].argmax(dim=-1, keepdim=True)
        return time.perf_counter() - start

    kv = 2 * 4 * spec.num_layers * batch * spec.num_kv_heads * context * spec.head_dim
    return Contestant("transformers DynamicCache", turn, _weight_bytes(model.decoder) + kv, kv)


def bandwidth_turn() -> Callable[[], float]:
    """A function that reads 256 MiB through a matrix-vector product and returns bytes per second."""
    matrix = jnp.ones((8192, 8192), jnp.float32)
    product = jax.jit(lambda x, m: x @ m)
    x = jnp.ones((1, 8192), jnp.float32)
    jax.block_until_ready(product(x, matrix))

    def turn() -> float:
        start = time.perf_counter()
        jax.block_until_ready(product(x, matrix))
        return matrix.nbytes / (time.perf_counter() - start)

    return turn


def measure(contestants: list[Contestant], rounds: int, steps: int) -> dict[str, Any]:
    """Let all take turns; the first turn of each, which compiles, does not count.

    Returns:
      Read bandwidth [bytes/s] (the best seen) and, per contestant, seconds of every turn.
    """
    read = bandwidth_turn()
    for contestant in contestants:
        contestant.turn(steps)
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    speeds = [read()]
    for _ in track(range(rounds), description="rounds", transient=True, console=Console(stderr=True)):
        for contestant in contestants:
            seconds[contestant.name].append(contestant.turn(steps))
            speeds.append(read())
    return {"bandwidth": max(speeds), "seconds": seconds}


def results(contestants: list[Contestant], measured: dict[str, Any], steps: int, batch: int) -> list[dict[str, Any]]:
    """Per contestant: medians over rounds, and ratios to the first contestant of the same round."""
    first = np.asarray(measured["seconds"][contestants[0].name])
    rows = []
    for contestant in contestants:
        seconds = np.asarray(measured["seconds"][contestant.name])
        step = float(np.median(seconds)) / steps
        rows.append(
            {
                "name": contestant.name,
                "tokens_per_s": batch / step,
                "times_first": float(np.median(first / seconds)),
                "times_floor": step / (contestant.floor_bytes / measured["bandwidth"]),
                "cache_bytes": contestant.cache_bytes,
            }
        )
    return rows


def show(rows: list[dict[str, Any]], context: int, bandwidth: float) -> Table:
    """A table of results."""
    table = Table(title=f"{context:,} tokens of context, read bandwidth {bandwidth / 1e9:.1f} GB/s")
    for column in ("", "tokens/s", f"x {rows[0]['name']}", "x floor (time)", "cache MB"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        numbers = (row["tokens_per_s"], row["times_first"], row["times_floor"], row["cache_bytes"] / 1e6)
        table.add_row(row["name"], *(f"{x:.2f}" for x in numbers))
    return table


def compile_seconds(recipe: Recipe, layers: int) -> tuple[float, float]:
    """Seconds to trace and to compile the decode loop of a tiny model with that many layers, without any cache."""
    spec = ModelSpec(
        vocab_size=97, embed_dim=32, num_layers=layers, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64,
        max_position=2048,
    )  # fmt: skip
    model, lengths = Decoder(spec, rngs=nnx.Rngs(0)), Lengths((100,), 64, 128)
    chooser, stop = sampling.chooser(sampling.Sampling(), 1), jnp.zeros((0,), jnp.int32)
    length, logits = jnp.full((1,), 100, jnp.int32), jnp.zeros((1, spec.vocab_size))
    cache = decode.init_cache(model, recipe, lengths)
    state = decode.first_token(logits, cache, length, chooser, stop, None, mode="greedy")
    start = time.perf_counter()
    lowered = decode.decode_loop.lower(
        model, state, chooser, stop, jnp.asarray(64, jnp.int32), recipe=recipe, mode="greedy", chunk=16
    )
    traced = time.perf_counter()
    lowered.compile()
    return traced - start, time.perf_counter() - traced


def show_compile(recipes: dict[str, Recipe], layers: int) -> Table:
    """A table of compile times."""
    table = Table("", "trace (s)", "compile (s)", title=f"decode loop of {layers} layers, tiny width")
    for label, recipe in recipes.items():
        table.add_row(label, *(f"{x:.1f}" for x in compile_seconds(recipe, layers)))
    return table


def parser() -> command.Parser:
    """The command line's flags."""
    p = command.Parser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", metavar="M", help="a checkpoint (default: a random Llama with 88M parameters)")
    p.add_argument(
        "--methods",
        default="full,snapkv:10%",
        metavar="A,B:20%",
        help="such as h2o:20%%+store=int4: a budget and arguments",
    )
    command.add_store_flags(p)
    p.add_argument("--contexts", default="4096,16384", metavar="N,M", help="prompt tokens")
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--steps", type=int, default=16, help="tokens per turn (default: 16)")
    p.add_argument("--rounds", type=int, default=7, help="turns of each contestant (default: 7)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="(default: float32 on CPU, else bfloat16)")
    p.add_argument("--transformers", action="store_true", help="compare with transformers (pip install '.[parity]')")
    p.add_argument("--compile", type=int, metavar="LAYERS", help="only time the compilation of so many tiny layers")
    p.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return p


def read_recipe(entry: str, stores: dict[str, str]) -> Recipe:
    """A recipe from `method:budget+key=value`."""
    head, plus, rest = entry.partition("+")
    method, _, budget = head.partition(":")
    name, arguments = read_entry(method + plus + rest)
    return make(name, budget or None, taken(name, stores) | arguments)


def load(args: argparse.Namespace) -> Model:
    """The model that is measured."""
    dtype = None if args.dtype is None else jnp.dtype(args.dtype)
    if args.model is not None:
        return generation.load(args.model, dtype=dtype)
    dtype = dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    return Model(Decoder(RANDOM, dtype=dtype, rngs=nnx.Rngs(0)), None, (), "random 88M")


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    args = parser().parse_args(argv)
    if min(args.batch, args.steps, args.rounds) < 1:
        raise InputError("--batch, --steps and --rounds are at least 1")
    recipes = {entry: read_recipe(entry, command.stores(args)) for entry in args.methods.split(",")}
    try:
        contexts = [int(n) for n in args.contexts.split(",")]
    except ValueError:
        raise InputError(f"--contexts {args.contexts!r} is not a list of lengths such as 4096,16384") from None
    new = args.steps * (args.rounds + 1) + 1
    if args.transformers and args.dtype not in (None, "float32"):
        raise InputError("--transformers compares in float32")
    if args.transformers and not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        raise InputError("--transformers needs transformers and torch: pip install '.[parity]'")
    if args.compile is not None:
        if args.compile < 1:
            raise InputError(f"--compile {args.compile} is not at least 1 layer")
        Console().print(show_compile(recipes, args.compile))
        return
    command.use_compilation_cache()
    model = load(args)
    report = {"model": model.name, "device": jax.devices()[0].device_kind, "jax": jax.__version__, "contexts": {}}
    for context in contexts:
        if not 0 < context <= model.spec.max_position - new:
            raise InputError(f"--contexts {context}: give 1 to {model.spec.max_position - new} tokens")
        contestants = [transformers_contestant(model, args.batch, context)] if args.transformers else []
        contestants += [
            kvjax_contestant(model, f"kvjax {label_of(label)}", recipe, args.batch, context, new)
            for label, recipe in recipes.items()
        ]
        measured = measure(contestants, args.rounds, args.steps)
        rows = results(contestants, measured, args.steps, args.batch)
        report["contexts"][context] = {"bandwidth": measured["bandwidth"], "rows": rows}
        if not args.json:
            Console().print(show(rows, context, measured["bandwidth"]))
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    command.run(PROG, main)
