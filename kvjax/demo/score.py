"""Score a model on held-out documents: `python -m kvjax.demo.score DIR/hf`.

Answers are judged token by token, each after the right ones, and where they are asked for the first time; whole
answers are judged by `python -m kvjax.evaluate --model DIR/hf`. Text is compared with what counting predicts.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from kvjax import compilation
from kvjax.checkpoint import hf
from kvjax.corpus import data, tokens
from kvjax.demo import model
from kvjax.models.decoder import Decoder
from kvjax.tasks import vocabulary as v


def unigram(train: np.ndarray) -> np.ndarray:
    """The probability of each token, every one counted once more."""
    counts = np.bincount(train, minlength=tokens.SIZE) + 1.0
    return counts / counts.sum()


def bigram_loss(train: np.ndarray, test: np.ndarray, prior: float = 30.0) -> float:
    """Mean loss [nats] of each token after the one before it.

    A token's followers are counted, and `prior` more are added with the frequency of tokens by themselves.
    """
    alone = unigram(train)
    pair = lambda text: text[:-1].astype(np.int64) * tokens.SIZE + text[1:]
    found, counts = np.unique(pair(train), return_counts=True)
    asked = pair(test)
    place = np.minimum(np.searchsorted(found, asked), len(found) - 1)
    seen = np.where(found[place] == asked, counts[place], 0)
    before = np.bincount(train[:-1], minlength=tokens.SIZE)[test[:-1]]
    return float(-np.mean(np.log((seen + prior * alone[test[1:]]) / (before + prior))))


def text_losses(decoder: Decoder, size: int, rows: int) -> dict[str, float]:
    """Losses of the held-out text [nats per token]: the model's, a bigram's, a unigram's; the same tokens for all."""
    train, test = tokens.stream("training"), tokens.stream("held-out")
    starts = np.random.default_rng(0).choice(len(test) // size, rows, replace=False) * size
    judge = nnx.jit(lambda decoder, ids, target: _entropy(decoder, ids, target))
    found = []
    for start in starts.tolist():
        text = test[start : start + size].astype(np.int32)
        ids = np.concatenate([[v.BOS], text[:-1]])[None]
        own = float(judge(decoder, ids, text[None])[0, 1:].mean())  # nothing predicts the first token
        found.append((own, bigram_loss(train, text), float(-np.log(unigram(train)[text[1:]]).mean())))
    return dict(zip(("model", "bigram", "unigram"), np.mean(found, axis=0).tolist(), strict=True))


def _entropy(decoder: Decoder, ids: jax.Array, target: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model.forward(decoder, ids), target)


def accuracy(decoder: Decoder, kind: str, size: int, rows: int, seed: int = 0) -> float:
    """Share of the tokens asked for that are exact, in held-out documents that are mostly context."""
    judge = nnx.jit(lambda decoder, batch: model.loss(decoder, batch)[1])
    sums = np.zeros(4)
    for row in range(rows):
        rng = data.held_out_rng(seed, row)
        found, weight = data.one(kind, rng, int(size * 0.8), size, "held-out")
        ids, weights = np.full((1, size + 1), v.EOS, np.int32), np.zeros((1, size + 1), np.float32)
        ids[0, : len(found)], weights[0, : len(found)] = found, weight
        sums += np.asarray(judge(decoder, data.DocumentBatch(ids, weights, np.zeros(1, np.int32))))[0]
    return float(sums[1] / sums[0])


def main(argv: list[str] | None = None) -> None:
    """Print the accuracies and losses."""
    parser = argparse.ArgumentParser(prog="python -m kvjax.demo.score", description=__doc__)
    parser.add_argument("model", type=Path, help="a trained model: DIR/hf")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 2048, 4096], help="of documents [tokens]")
    parser.add_argument("--rows", type=int, default=20, help="documents of each kind and length")
    args = parser.parse_args(argv)
    compilation.enable_compilation_cache()
    decoder = hf.load(args.model, jnp.float32)
    losses = text_losses(decoder, 1024, 40)
    print("held-out text [nats per token]: " + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))
    print(" ".join(["kind".ljust(12), *(f"{length:>6}" for length in args.lengths)]))
    for kind in (name for name in data.KINDS if name != "text"):
        row = (f"{accuracy(decoder, kind, length, args.rows):6.1%}" for length in args.lengths)
        print(" ".join([kind.ljust(12), *row]), flush=True)


if __name__ == "__main__":
    main()
