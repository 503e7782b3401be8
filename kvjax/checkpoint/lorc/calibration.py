"""What keys and values are like on a text: their second moments, layer by layer.

One layer's weights are in memory at a time. The text passes a layer before the next one is read.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from kvjax.attention.prompt import prefill_attention
from kvjax.checkpoint import hf
from kvjax.models import rope
from kvjax.models.decoder import Layer, Linear, layer_forward, normed, scaled
from kvjax.models.tokenizer import Tokenizer
from kvjax.spec import ModelSpec, RopeSpec

SEQUENCES, LENGTH = 16, 1024  # at most; of tokens


def moments(weights: hf.StoredWeights, ids: Int[np.ndarray, "B T"], n: int) -> Iterator[Float[np.ndarray, "2 C n n"]]:
    """Yield each layer's sums of outer products of its keys, and of its values, over the tokens of a text.

    Keys are taken before rotation, norm and bias: as the outputs of the projection, in groups of n channels.

    Args:
      weights: the model.
      ids: token ids of sequences.
      n: channels of a group.

    Cost: a prefill of the sequences, one after the other, in float32; memory of a layer and of the residual stream.
    """
    spec = weights.spec
    (embedding,) = (array for _, array in hf.read(weights, ["embedding"], jnp.float32))
    x = np.array(scaled(spec, jnp.asarray(embedding[ids])))
    del embedding
    for index in range(spec.num_layers):
        layer, total = _layer(weights, index), np.zeros((2, spec.num_kv_heads * spec.head_dim // n, n, n))
        window, rotary = spec.window(index), spec.rotary(index)
        for row in range(len(x)):
            x[row], found = _pass(layer, jnp.asarray(x[row]), spec=spec, window=window, rotary=rotary, n=n)
            total += np.asarray(found)
        yield total.astype(np.float32)


def _layer(weights: hf.StoredWeights, index: int) -> Layer:
    """One layer with its weights in float32."""
    spec, name = weights.spec, f"layers.{index}"
    wanted, tree = hf.by_path(nnx.eval_shape(lambda: Layer(spec, index, jnp.float32, nnx.Rngs(0))))
    arrays = dict(hf.read(weights, [f"{name}.{path}" for path in wanted], jnp.float32))
    return jax.tree.unflatten(tree, [jax.device_put(arrays.pop(f"{name}.{path}")) for path in wanted])


@functools.partial(jax.jit, static_argnames=("spec", "window", "rotary", "n"))
def _pass(
    layer: Layer, x: Float[Array, "T D"], *, spec: ModelSpec, window: int | None, rotary: RopeSpec, n: int
) -> tuple[Float[Array, "T D"], Float[Array, "2 C n n"]]:
    """A layer over one sequence, and the moments of its keys and values."""
    t = x.shape[0]
    options = {"scale": spec.scale, "cap": spec.score_cap, "window": window, "sink": layer.sink()}

    def attend(q: Array, k: Array, v: Array) -> Array:
        return prefill_attention(q[None], k[None], v[None], jnp.asarray([t]), **options)[0][0]

    y, projections = normed(x, layer.attention_norm), (layer.attention.k, layer.attention.v)
    found = [(y @ p.kernel[...]).reshape(t, -1, n) for p in projections if isinstance(p, Linear)]
    x = layer_forward(layer, x, rope.whole_turn(rotary, spec.head_dim, t), attend)
    return x, jnp.stack([jnp.einsum("tcn,tcm->cnm", out, out) for out in found])


def sample_text() -> str:
    """A text for those who give none: look-ups of many kinds, sources and documentation of the standard library.

    What the demo model is trained on, see `kvjax.corpus.documents`.
    """
    from kvjax.corpus import data, tokens

    batch = data.batch(data.training_rng(0, 0), 4 * SEQUENCES, LENGTH)
    return "\n".join(tokens.tokenizer().decode(row.tolist()) for row in batch.ids)


def cut(text: str, tokenizer: Tokenizer, limit: int) -> Int[np.ndarray, "B T"]:
    """The first tokens of a text as sequences of equal length, each with what begins a text.

    Args:
      text: at least two tokens.
      tokenizer: the model's.
      limit: the model's context [tokens].
    """
    first, plain = tokenizer.encode(""), tokenizer.encode(text, special=False)
    length = min(LENGTH, limit, len(plain) + len(first))
    length -= length % 64 if length > 64 else 0  # attention is in blocks that divide it
    room = length - len(first)
    whole = min(len(plain) // room, SEQUENCES)
    return np.asarray([first + plain[room * row : room * (row + 1)] for row in range(whole)], np.int32)
