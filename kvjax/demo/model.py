"""The decoder as it is trained: its size, its first weights, its loss on long documents."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from kvjax.checkpoint.load import load_model
from kvjax.corpus import data, tokens
from kvjax.errors import InputError
from kvjax.models import rope
from kvjax.models.decoder import Decoder, Linear, Mlp, layer_forward
from kvjax.spec import ModelSpec, RopeSpec
from kvjax.tasks import vocabulary as v
from kvjax.tasks.lines import ANSWER
from kvjax.training.attention import Attend, attention

CONTEXT = 4096
RECOGNISABLE, TIED = 0.5, 0.1  # standard deviation of the token vectors: beside what layers add, and if they are tied


def make_spec(
    layers: int, width: int, heads: int, kv_heads: int, head_dim: int, mlp: int, theta: float, tie: bool
) -> ModelSpec:
    """The architecture: Llama with grouped queries."""
    return ModelSpec(
        vocab_size=tokens.SIZE,
        embed_dim=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_dim=mlp,
        max_position=CONTEXT,
        rope=RopeSpec(theta=theta),
        norm_eps=1e-5,
        tie_embeddings=tie,
    )


def initial(spec: ModelSpec, seed: int) -> Decoder:
    """A random decoder whose first head attends to the previous token.

    Looking up what followed an earlier token takes such a head and, above it, one that compares; learning both at
    once is a long plateau. With the first in place the second is learned at once.

    With tied embeddings the token vectors are smaller, and so is what layers add to them: otherwise a token's own
    logit would be large in its own place, and the weights that turn vectors into logits slow to learn.
    """
    model = Decoder(spec, rngs=nnx.Rngs(seed))
    tokens = model.embedding[...] * (RECOGNISABLE / 0.02)
    tokens, small = tokens.at[:, 0].set(4 * RECOGNISABLE), (TIED / RECOGNISABLE if spec.tie_embeddings else 1.0)
    model.embedding[...] = tokens * small
    for layer in model.layers:
        assert isinstance(layer.mlp, Mlp)
        for out in (layer.attention.o, layer.mlp.down):
            out.kernel[...] = out.kernel[...] * (2 * spec.num_layers) ** -0.5 * small
    # In dimension 0, which is the same for all tokens, queries have phase 0 in each of the faster pairs of rotated
    # dimensions, and keys the phase of one token: they agree at a distance of one token.
    h, fast = spec.head_dim, spec.head_dim // 4
    phase = rope.frequencies(spec.rope, h, jnp.asarray(0))[:fast]
    cos, sin = jnp.zeros(h // 2).at[:fast].set(jnp.cos(phase)), jnp.zeros(h // 2).at[:fast].set(jnp.sin(phase))
    ones = jnp.zeros(h).at[:fast].set(1.0)
    attention = model.layers[0].attention
    for linear, row in ((attention.q, ones), (attention.k, jnp.concatenate([cos, sin]))):
        assert isinstance(linear, Linear)
        linear.kernel[...] = linear.kernel[...].at[:, :h].set(0.0).at[0, :h].set(1.7 * row)
    return model


def continued(spec: ModelSpec, seed: int, folder: Path) -> Decoder:
    """A decoder with the weights of a checkpoint; a token that has no namesake there gets a vector like its kind's.

    The rotary base may be another: attention adapts to a larger one, under which far positions turn less, within a few
    hundred steps (Code Llama, arXiv 2308.12950).
    """
    model = initial(spec, seed)
    source, directory = load_model(str(folder), "float32")
    same = dataclasses.replace(source.spec, rope=spec.rope, vocab_size=spec.vocab_size)
    if same != spec or not spec.tie_embeddings:
        raise InputError(f"{folder} has another architecture than the model that is to continue it: {source.spec}")
    names = json.loads((directory / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    table = tokens.tokenizer().get_vocab()
    mine, theirs = np.asarray([(table[name], names[name]) for name in table if name in names]).T
    vectors = np.array(model.embedding[...])
    vectors[mine] = source.embedding[...][theirs]
    rng, fresh = np.random.default_rng(seed), np.setdiff1d(np.arange(tokens.SIZE), mine)
    for start, stop in itertools.pairwise((v.KEY, v.NUMBER, v.SIZE, tokens.SIZE)):
        known, new = (ids[(start <= ids) & (ids < stop)] for ids in (np.sort(mine), fresh))
        if len(known) and len(new):
            like = vectors[known].mean(axis=0), np.cov(vectors[known], rowvar=False)
            vectors[new] = rng.multivariate_normal(*like, size=len(new))
    nnx.update(model, nnx.state(source, nnx.Not(nnx.PathContains("embedding"))))
    model.embedding[...] = jnp.asarray(vectors)
    return model


def forward(model: Decoder, ids: Int[Array, "B T"], how: Attend = "blocks") -> Float[Array, "B T V"]:
    """Logits at every position: `kvjax.models.decoder.forward` with less memory."""
    spec = model.spec
    x, turn = model.embed(ids), rope.whole_turn(spec.rope, spec.head_dim, ids.shape[1])
    for layer in model.layers:
        x = layer_forward(layer, x, turn, functools.partial(attention, how=how))
    return model.logits(x)


def loss(
    model: Decoder, batch: data.DocumentBatch, how: Attend = "blocks"
) -> tuple[Float[Array, ""], Float[Array, "kinds 4"]]:
    """Weighted cross-entropy [nats] of the next tokens, and sums for each kind of document.

    The sums: tokens asked for, those of them that are exact, weighted cross-entropy, weight.
    """
    logits, target, weight = forward(model, jnp.asarray(batch.ids[:, :-1]), how), batch.ids[:, 1:], batch.weight[:, 1:]
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, target) * weight
    asked = weight == ANSWER
    exact = asked & (jnp.argmax(logits, axis=-1) == target)
    rows = [jnp.sum(x.astype(jnp.float32), axis=1) for x in (asked, exact, entropy, weight)]
    sums = jnp.zeros((len(data.KINDS), 4)).at[batch.kind].add(jnp.stack(rows, axis=1))
    return jnp.sum(entropy) / jnp.sum(weight), sums
