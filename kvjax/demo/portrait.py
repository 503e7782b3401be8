"""Draw what a model's heads attend to: `python -m kvjax.demo.portrait DIR/hf --out heads.png`.

A row per layer, a panel per query head: queries from top to bottom, keys from left to right, on a prompt that hides a
needle in text. Bright columns are heavy hitters, the first one is the sink, the diagonal is the neighbourhood. It also
prints how much of its attention each head spends on the first token and on the last 8, and how often its most attended
token is the one that an answer copies: a head that does so half of the time retrieves (arXiv 2404.15574).
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from kvjax.cli import command
from kvjax.errors import InputError
from kvjax.evaluation import runner
from kvjax.generation.model import Model, encode_prompt, load
from kvjax.models import rope
from kvjax.models.decoder import Decoder, layer_forward
from kvjax.tasks import lines
from kvjax.tasks.registry import make_task

if TYPE_CHECKING:
    import matplotlib.figure

LOCAL = 8  # tokens: the neighbourhood
RETRIEVES = 0.5
BINS = 128  # of a panel, on both sides


class Heads(NamedTuple):
    """What each head does; arrays `[L N]`."""

    sink: np.ndarray  # attention to the first token, mean over queries
    local: np.ndarray  # attention to the query's own token and the ones before it
    retrieval: np.ndarray  # share of the answers' tokens whose source is the most attended token


@nnx.jit
def attention(model: Decoder, ids: Int[Array, " T"]) -> Float[Array, "L N T T"]:
    """Attention weights of every head over a prompt."""
    spec, pos = model.spec, jnp.arange(ids.shape[0])
    x, turn, found = model.embed(ids), rope.whole_turn(spec.rope, spec.head_dim, ids.shape[0]), []

    def attend(q: Array, k: Array, v: Array) -> Array:
        k, v = (jnp.repeat(y, spec.group_size, axis=1) for y in (k, v))
        logits = jnp.einsum("tnh,snh->nts", q, k, preferred_element_type=jnp.float32) * spec.head_dim**-0.5
        found.append(jax.nn.softmax(jnp.where(pos <= pos[:, None], logits, -jnp.inf), axis=-1))
        return jnp.einsum("nts,snh->tnh", found[-1].astype(v.dtype), v)

    for layer in model.layers:
        x = layer_forward(layer, x, turn, attend)
    return jnp.stack(found)


def heads(model: Model, size: int, documents: int = 4, seed: int = 0) -> Heads:
    """What the heads do on lists of lines of `size` tokens that end in 16 questions and their answers."""
    found = []
    for index in range(documents):
        doc = lines.draw(lines.scoring_rng(seed, index), lines.fitting_lines(size, 16, ending=0), 16)
        ids = jnp.asarray(encode_prompt(model, lines.text(doc)))
        probs = np.asarray(attention(model.decoder, ids))
        asked = 1 + lines.LINE * len(doc.keys) + lines.QUESTION * np.arange(len(doc.asked)) + 1  # the keys of questions
        query = np.concatenate([asked, asked + 1])  # they predict the answer's tokens,
        source = 1 + lines.LINE * doc.asked + 1
        copied = probs[:, :, query].argmax(axis=-1) == np.concatenate([source, source + 1])  # which stand here
        pos = np.arange(len(ids))
        near = (pos <= pos[:, None]) & (pos > pos[:, None] - LOCAL)
        found.append((probs[..., 0].mean(axis=-1), (probs * near).sum(axis=-1).mean(axis=-1), copied.mean(axis=-1)))
    return Heads(*np.mean(found, axis=0))


def draw(model: Model, size: int, measured: Heads) -> "matplotlib.figure.Figure":
    """The picture."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    sample = make_task("needle").samples(runner.request(model, samples=1, lengths=(size,), form="short"))[0]
    ids = jnp.asarray(encode_prompt(model, f"{sample.context}{sample.question}"))
    probs = np.asarray(attention(model.decoder, ids))
    layers, count = probs.shape[:2]
    figure = Figure(figsize=(1.0 + 2.1 * count, 0.8 + 2.1 * layers), layout="constrained")
    for (layer, head), axes in np.ndenumerate(figure.subplots(layers, count, squeeze=False)):
        image = axes.imshow(_pooled(probs[layer, head]), cmap="viridis", norm=LogNorm(1e-3, 1), interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        mark = ", retrieves" if measured.retrieval[layer, head] >= RETRIEVES else ""
        axes.set_title(f"layer {layer}, head {head}{mark}", fontsize=8)
    figure.suptitle(f"Attention on a needle in {len(ids):,} tokens of text: queries down, keys across", fontsize=10)
    figure.colorbar(image, ax=figure.axes, shrink=0.4, label="largest weight of a cell")
    return figure


def _pooled(probs: np.ndarray) -> np.ndarray:
    """The largest weight of each of `BINS` x `BINS` cells."""
    starts = np.linspace(0, len(probs), min(BINS, len(probs)), endpoint=False).astype(int)
    pooled = np.maximum.reduceat(np.maximum.reduceat(probs, starts, axis=0), starts, axis=1)
    return np.maximum(pooled, 1e-6)


def table(measured: Heads) -> str:
    """The numbers as Markdown."""
    rows = ["| layer | head | first token | last 8 tokens | copies | |", "|---|---|---|---|---|---|"]
    for (layer, head), copied in np.ndenumerate(measured.retrieval):
        shares = (measured.sink[layer, head], measured.local[layer, head], copied)
        mark = "retrieves" if copied >= RETRIEVES else ""
        rows.append(f"| {layer} | {head} | {' | '.join(f'{share:.0%}' for share in shares)} | {mark} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> None:
    """Print the numbers and draw the picture."""
    parser = argparse.ArgumentParser(prog="python -m kvjax.demo.portrait", description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", help="a trained model: DIR/hf (default: the shipped one)")
    parser.add_argument("--size", type=int, default=1024, help="of the prompts [tokens]")
    parser.add_argument("--out", type=Path, default=Path("heads.png"), help="the picture")
    args = parser.parse_args(argv)
    if not 128 <= args.size <= 4096:
        raise InputError(f"--size {args.size} is not between 128 and 4096 tokens")
    model = load(args.model, dtype=jnp.float32)
    measured = heads(model, args.size)
    print(table(measured))
    draw(model, args.size, measured).savefig(args.out, dpi=90)


if __name__ == "__main__":
    command.run("kvjax.demo.portrait", main)
