"""Train the demo model: `python -m kvjax.demo.train --out DIR`.

The data of a step is a function of the seed, the step and the stage. After every block of steps the accuracies are
written to `DIR/log.jsonl` and decide the stage, and now and then a checkpoint is written: weights, the optimiser's
state and the stage. A run that was killed and started again with the same command ends with the same weights, bit for
bit on the same machine.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from kvjax import compilation
from kvjax.cli import command
from kvjax.cli.flags import DTYPES
from kvjax.corpus import data, sources
from kvjax.demo import course, export, model
from kvjax.models.decoder import Decoder
from kvjax.training import runs

MAY_CHANGE = ("out", "minutes", "workers", "checkpoint_every")  # of a run that is continued
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {},
    "gpu": {
        "layers": 8, "width": 256, "heads": 8, "kv_heads": 4, "mlp": 704, "tokens_per_batch": 65536, "steps": 6000,
        "learning_rate": 2e-3, "block": 100, "checkpoint_every": 500, "dtype": "bfloat16", "attention": "cudnn",
        "workers": 14,
    },
}  # fmt: skip


class State(NamedTuple):
    """Everything that a step or a block changes."""

    params: Any  # the decoder's weights as nested dicts
    opt: optax.OptState
    stage: np.ndarray  # []


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m kvjax.demo.train", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for checkpoints, log.jsonl and the trained model (hf/)")
    add("--preset", choices=PRESETS, default="cpu", help="defaults of the other flags")
    add("--start", help="Hugging Face folder whose weights to begin with, in the last stage of the course")
    add("--steps", type=int, default=4000)
    add("--seed", type=int, default=0)
    add("--tokens-per-batch", type=int, default=4096, help="rows of a batch times their length")
    add("--max-length", type=int, default=model.CONTEXT, help="longer lengths of the course are cut to this [tokens]")
    add("--learning-rate", type=float, default=2e-3, help="after a warm-up of 200 steps")
    add("--decay", type=float, default=0.3, help="share of the steps, at the end, over which the rate falls to a 20th")
    add("--layers", type=int, default=6)
    add("--width", type=int, default=192)
    add("--heads", type=int, default=4, help="query heads of a layer")
    add("--kv-heads", type=int, default=2, help="key/value heads of a layer")
    add("--head-dim", type=int, default=32)
    add("--mlp", type=int, default=512, help="width of the feed-forward network")
    add("--theta", type=float, default=10000.0, help="base of the rotary embedding")
    add("--tie", action=argparse.BooleanOptionalAction, default=True, help="one matrix for token vectors and logits")
    add("--dtype", choices=DTYPES, default="float32", help="of matrix products")
    add("--attention", choices=("blocks", "cudnn"), default="blocks")
    add("--block", type=int, default=25, help="steps between lines of log.jsonl, and decisions about the stage")
    add("--checkpoint-every", type=int, default=200, help="steps between checkpoints: a multiple of --block")
    add("--workers", type=int, default=0, help="processes that write documents; 0 = this one")
    add("--minutes", type=float, default=float("inf"), help="stop after about so long; start again to go on")
    known, _ = parser.parse_known_args(argv)
    parser.set_defaults(**PRESETS[known.preset])
    args = parser.parse_args(argv)
    if args.checkpoint_every % args.block:
        parser.error(f"--checkpoint-every {args.checkpoint_every} must be a multiple of --block {args.block}")
    if args.heads % args.kv_heads:
        parser.error(f"--heads {args.heads} must be a multiple of --kv-heads {args.kv_heads}")
    return args


def optimizer(peak: float, steps: int, decay: float) -> optax.GradientTransformation:
    """AdamW with clipping and a constant rate between warm-up and decay, so that the course may take its time."""
    warm, end = min(200, steps // 4), max(1, int(decay * steps))
    parts = [
        optax.linear_schedule(0.0, peak, warm),
        optax.constant_schedule(peak),
        optax.linear_schedule(peak, peak / 20, end),
    ]
    rate = optax.join_schedules(parts, [warm, max(warm, steps - end)])
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.02))


def make_step(graph: nnx.GraphDef, optimize: optax.GradientTransformation, args: argparse.Namespace) -> Callable:
    """The jitted update: `(params, opt, sums, batch) -> (params, opt, sums)`; compiled once per length."""

    def step(params: Any, opt: Any, sums: Array, batch: data.DocumentBatch) -> tuple[Any, Any, Array]:
        def of_params(params: Any) -> tuple[Array, Array]:
            narrow = jax.tree.map(lambda x: x.astype(args.dtype), params)
            return model.loss(nnx.merge(graph, narrow), batch, args.attention)

        (_, more), grads = jax.value_and_grad(of_params, has_aux=True)(params)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            updates, opt = optimize.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, sums + more

    return jax.jit(step)


class Programs:
    """The compiled update for each length; with several processes all lengths are compiled at once, beforehand."""

    def __init__(self, step: Callable, args: argparse.Namespace):
        self._step, self._args = step, args
        self._pool = concurrent.futures.ThreadPoolExecutor(8 if args.workers else 1)
        self._found: dict[int, concurrent.futures.Future] = {}

    def prepare(self, state: State, lengths: Iterable[int]) -> None:
        """Begin to compile for these lengths."""
        for length in {min(length, self._args.max_length) for length in lengths} - self._found.keys():
            self._found[length] = self._pool.submit(self._compile, state, length)

    def _compile(self, state: State, length: int) -> Callable:
        shape = lambda *sizes, dtype: jax.ShapeDtypeStruct(sizes, dtype)
        rows = max(1, self._args.tokens_per_batch // length)
        ids, weight = (shape(rows, length + 1, dtype=dtype) for dtype in (jnp.int32, jnp.float32))
        batch = data.DocumentBatch(ids, weight, shape(rows, dtype=jnp.int32))  # pyright: ignore[reportArgumentType]
        sums = shape(len(data.KINDS), 4, dtype=jnp.float32)
        params, opt = jax.tree.map(jax.typeof, (state.params, state.opt))
        return self._step.lower(params, opt, sums, batch).compile()

    def __call__(self, params: Any, opt: Any, sums: Array, batch: data.DocumentBatch) -> tuple[Any, Any, Array]:
        """The update for a batch."""
        return self._found[batch.ids.shape[1] - 1].result()(params, opt, sums, batch)


def make_batch(seed: int, step: int, stage: int, tokens: int, longest: int) -> data.DocumentBatch:
    """The documents of a step."""
    rows, length = course.shape(seed, step, stage, tokens, longest)
    return data.batch(data.training_rng(seed, step), rows, length, course.COURSE[stage].share)


class Writers:
    """Writes batches, in other processes where there are any."""

    def __init__(self, args: argparse.Namespace):
        self._args, self._pool = args, None
        if args.workers:
            context = multiprocessing.get_context("spawn")  # this process has threads
            os.environ["JAX_PLATFORMS"] = "cpu"  # for them: this process has read it
            self._pool = concurrent.futures.ProcessPoolExecutor(args.workers, context)

    def batches(self, steps: range, stage: int) -> Iterator[data.DocumentBatch]:
        """The batches of a block."""
        each = [(self._args.seed, step, stage, self._args.tokens_per_batch, self._args.max_length) for step in steps]
        yield from (self._pool.map if self._pool else map)(make_batch, *zip(*each, strict=True))

    def close(self) -> None:
        """End the processes."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)


def entry(sums: np.ndarray) -> dict[str, Any]:
    """What is logged of a block: its loss, and accuracies and losses of the kinds of documents that were in it."""
    asked, exact, entropy, weight = sums.T
    names = list(data.KINDS)
    accuracy = {names[i]: round(float(exact[i] / asked[i]), 4) for i in np.flatnonzero(asked)}
    losses = {names[i]: round(float(entropy[i] / weight[i]), 4) for i in np.flatnonzero(weight)}
    whole = round(float(entropy.sum() / weight.sum()), 4)
    return {"looked_up": course.looked_up(accuracy), "loss": whole, "accuracy": accuracy, "losses": losses}


def train(args: argparse.Namespace) -> Decoder:
    """Train to the last step, from the newest checkpoint in `args.out` if there is one."""
    spec = model.make_spec(
        args.layers, args.width, args.heads, args.kv_heads, args.head_dim, args.mlp, args.theta, args.tie
    )
    begin = model.continued(spec, args.seed, Path(args.start)) if args.start else model.initial(spec, args.seed)
    graph, params = nnx.split(begin)
    params = nnx.to_pure_dict(params)
    optimize = optimizer(args.learning_rate, args.steps, args.decay)
    step, start = Programs(make_step(graph, optimize, args), args), time.monotonic()
    writers = Writers(args)
    given = {key: value for key, value in vars(args).items() if key not in MAY_CHANGE}
    with runs.begin(args.out, given | {"corpus": sources.fingerprint()}, args.checkpoint_every) as run:
        state = State(params, optimize.init(params), np.asarray(len(course.COURSE) - 1 if args.start else 0))
        state, done = runs.resume(run, state)
        lengths = [length for stage in course.COURSE for length in stage.lengths]
        over = done == args.steps
        while not over:  # at least one block
            block, stage = range(done, min(done + args.block, args.steps)), int(state.stage)
            step.prepare(state, lengths if args.workers else course.COURSE[stage].lengths)
            params, opt, sums, read = state.params, state.opt, jnp.zeros((len(data.KINDS), 4)), 0
            for batch in writers.batches(block, stage):
                params, opt, sums = step(params, opt, sums, batch)
                read += batch.ids.size
            done, found = block.stop, entry(np.asarray(sums))
            state = State(params, opt, np.asarray(course.advance(stage, found["looked_up"], done / args.steps)))
            line = {"step": done, "stage": stage, "tokens": read, **found}
            over = done == args.steps or time.monotonic() - start >= 60 * args.minutes
            runs.record(run, line | {"seconds": round(time.monotonic() - start, 1)}, state, force=over)
    writers.close()
    return nnx.merge(graph, state.params)


def main(argv: list[str] | None = None) -> None:
    """Train and write the Hugging Face checkpoint."""
    args = parse(argv)
    compilation.enable_compilation_cache()
    export.write(train(args), args.out / "hf")


if __name__ == "__main__":
    command.run("kvjax.demo.train", main)
