"""Train the demo model: `python -m kvjax.demo.train --out DIR`.

The data of a step is a function of the seed and the step alone, and a checkpoint holds the weights, the optimiser's
state and the step: a run that was killed and started again with the same command ends with the same weights, bit for
bit on the same machine.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jaxtyping import Array, Float, Int
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvjax.demo import export, lines, vocabulary
from kvjax.models import rope
from kvjax.models.decoder import Decoder, forward
from kvjax.spec import ModelSpec


class Stage(NamedTuple):
    """A part of the training."""

    end: float  # share of the steps at which it ends
    lengths: tuple[int, ...]  # drawn from [tokens]
    share: float  # of the lines that fit, the rest of a document being questions


# Retrieval is learned on short documents with few lines and many questions; longer documents then only stretch it.
CURRICULUM = (
    Stage(0.12, (64,), 0.3),
    Stage(0.20, (64,), 1.0),
    Stage(0.30, (64, 128), 1.0),
    Stage(0.45, (128, 256, 256), 1.0),
    Stage(0.68, (128, 256, 512, 512), 1.0),
    Stage(1.00, (256, 512, 1024, 1024), 1.0),
)


class State(NamedTuple):
    """Everything that a step changes."""

    params: Any  # the decoder's weights as nested dicts
    opt: optax.OptState


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m kvjax.demo.train", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for checkpoints, log.jsonl and the trained model (hf/)")
    add("--steps", type=int, default=2000)
    add("--seed", type=int, default=0)
    add("--tokens-per-batch", type=int, default=4096, help="rows of a batch times their length")
    add("--max-length", type=int, default=1024, help="longer lengths of the curriculum are cut to this [tokens]")
    add("--learning-rate", type=float, default=2e-3, help="peak, after 100 steps of warm-up; decays as a cosine")
    add("--layers", type=int, default=4)
    add("--width", type=int, default=128, help="hidden size; heads of 32, two query heads per key/value head")
    add("--checkpoint-every", type=int, default=200, help="steps between checkpoints")
    add("--log-every", type=int, default=25, help="steps between lines of log.jsonl")
    args = parser.parse_args(argv)
    if args.width % 64:
        parser.error(f"--width must be a multiple of 64, got {args.width}")
    return args


def demo_spec(layers: int, width: int) -> ModelSpec:
    """The architecture: Llama with heads of 32 and two query heads per key/value head."""
    return ModelSpec(
        vocab_size=vocabulary.SIZE,
        embed_dim=width,
        num_layers=layers,
        num_heads=width // 32,
        num_kv_heads=width // 64,
        head_dim=32,
        mlp_dim=width * 11 // 4,
        max_position=2048,
        norm_eps=1e-5,
    )


def shape(args: argparse.Namespace, step: int) -> tuple[int, int, float]:
    """Documents of a step, their length [tokens] and their share of lines."""
    stage = next(stage for stage in CURRICULUM if step < stage.end * args.steps)
    choice = np.random.default_rng([lines.TRAINING, args.seed, step, 1]).integers(len(stage.lengths))
    length = min(stage.lengths[choice], args.max_length)
    return max(1, args.tokens_per_batch // length), length, stage.share


def optimizer(peak: float, steps: int) -> optax.GradientTransformation:
    """AdamW with clipping, warm-up and cosine decay."""
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, min(100, steps // 2), steps, peak / 20)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.02))


def initial(spec: ModelSpec, seed: int) -> Decoder:
    """A random decoder whose first head attends to the previous token.

    Looking up what followed an earlier token takes such a head and, above it, one that compares; learning both at
    once is a long plateau. With the first in place the second is learned at once.
    """
    model = Decoder(spec, rngs=nnx.Rngs(seed))
    tokens = model.embedding[...] * 25  # standard deviation 0.5: tokens stay recognisable beside what layers add
    model.embedding[...] = tokens.at[:, 0].set(2.0)
    for layer in model.layers:
        for out in (layer.attention.o, layer.mlp.down):
            out.kernel[...] = out.kernel[...] * (2 * spec.num_layers) ** -0.5
    # In dimension 0, which is the same for all tokens, queries have phase 0 in each of the faster pairs of rotated
    # dimensions, and keys the phase of one token: they agree at a distance of one token.
    h, fast = spec.head_dim, spec.head_dim // 4
    phase = rope.frequencies(spec.rope, h, jnp.asarray(0))[:fast]
    cos, sin = jnp.zeros(h // 2).at[:fast].set(jnp.cos(phase)), jnp.zeros(h // 2).at[:fast].set(jnp.sin(phase))
    ones = jnp.zeros(h).at[:fast].set(1.0)
    attention = model.layers[0].attention
    for linear, row in ((attention.q, ones), (attention.k, jnp.concatenate([cos, sin]))):
        linear.kernel[...] = linear.kernel[...].at[:, :h].set(0.0).at[0, :h].set(1.7 * row)
    return model


def loss(
    model: Decoder, ids: Int[Array, "B S"], weight: Float[Array, "B S"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted cross-entropy [nats] of the next tokens, and the share of exact answers."""
    logits, target, weight = forward(model, ids[:, :-1]), ids[:, 1:], weight[:, 1:]
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    asked = (weight == lines.ANSWER).astype(jnp.float32)
    exact = (jnp.argmax(logits, axis=-1) == target).astype(jnp.float32)
    return jnp.sum(entropy * weight) / jnp.sum(weight), jnp.sum(exact * asked) / jnp.sum(asked)


def make_step(graph: nnx.GraphDef, optimize: optax.GradientTransformation) -> Callable:
    """The jitted update: `(state, ids, weight) -> (state, loss, accuracy)`; compiled once per length."""

    def step(state: State, ids: Array, weight: Array) -> tuple[State, Array, Array]:
        def of_params(params: Any) -> tuple[Array, Array]:
            return loss(nnx.merge(graph, params), ids, weight)

        (value, accuracy), grads = jax.value_and_grad(of_params, has_aux=True)(state.params)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            updates, opt = optimize.update(grads, state.opt, state.params)
        return State(optax.apply_updates(state.params, updates), opt), value, accuracy

    return jax.jit(step)


def resume(manager: ocp.CheckpointManager, state: State, log: Path) -> tuple[State, int]:
    """The newest checkpoint and the steps it has done; the log is cut to them."""
    done = manager.latest_step() or 0
    if done:
        state = State(*manager.restore(done, args=ocp.args.StandardRestore(tuple(state))))  # pyright: ignore[reportArgumentType]
    kept = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= done] if log.exists() else []
    log.write_text("".join(line + "\n" for line in kept))
    return state, done


def progress() -> Progress:
    """A progress bar on stderr with the newest loss and accuracy."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        transient=not sys.stderr.isatty(),
    )


def train(args: argparse.Namespace) -> Decoder:
    """Train to the last step, from the newest checkpoint in `args.out` if there is one."""
    graph, params = nnx.split(initial(demo_spec(args.layers, args.width), args.seed))
    params = nnx.to_pure_dict(params)
    optimize = optimizer(args.learning_rate, args.steps)
    step = make_step(graph, optimize)
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "log.jsonl"
    options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=args.checkpoint_every)
    with ocp.CheckpointManager((args.out / "checkpoints").absolute(), options=options) as manager, progress() as bar:
        state, done = resume(manager, State(params, optimize.init(params)), log)
        task = bar.add_task("training", total=args.steps, completed=done)
        start, tokens = time.monotonic(), sum(np.prod(shape(args, index)[:2]) for index in range(done))
        for index in range(done, args.steps):
            rows, length, share = shape(args, index)
            ids, weight = lines.batch(lines.training_rng(args.seed, index), rows, length, share)
            state, value, accuracy = step(state, ids, weight)
            tokens += rows * length
            if (index + 1) % args.log_every == 0 or index + 1 == args.steps:
                entry = {"step": index + 1, "length": length, "loss": float(value), "accuracy": float(accuracy)}
                entry |= {"tokens": int(tokens), "seconds": round(time.monotonic() - start, 1)}
                with log.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
                bar.update(task, completed=index + 1, description=f"loss {value:.3f} accuracy {accuracy:.1%}")
            manager.save(index + 1, args=ocp.args.StandardSave(tuple(state)), force=index + 1 == args.steps)
    return nnx.merge(graph, state.params)


def main(argv: list[str] | None = None) -> None:
    """Train and write the Hugging Face checkpoint."""
    args = parse(argv)
    export.write(train(args), args.out / "hf")


if __name__ == "__main__":
    main()
