"""A decoder that keeps whole attention matrices and lists of tokens: what a method does, in the plainest words.

Everything is float64 numpy and loops; nothing of kvjax is used except the weights that are read out of a `Decoder`.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvjax.cache import layout
from kvjax.cache import tier as tiers_
from kvjax.checkpoint import keep_gate
from kvjax.generation import decode, prefill
from kvjax.generation.allocate import init_cache
from kvjax.methods import GUIDED
from kvjax.models.decoder import Decoder
from kvjax.parallel import mesh
from kvjax.spec import Lengths, ModelSpec


@dataclasses.dataclass
class Entry:
    """One cached token of one row."""

    pos: int
    key: np.ndarray  # [H] rotated at its own position
    raw: np.ndarray  # [H] before rotation
    value: np.ndarray  # [H]
    stat: float = 0.0


class LayerPrompt(NamedTuple):
    """One layer of one prompt."""

    q: np.ndarray  # [T N H] rotated
    key: np.ndarray  # [T K H] rotated
    raw: np.ndarray  # [T K H]
    value: np.ndarray  # [T K H]
    probs: np.ndarray  # [N T T] causal softmax


Rows = list[list[Entry]]  # [K] -> entries: one layer
Select = Callable[[int, LayerPrompt], Rows]
Insert = Callable[[int, Rows, list[Entry], np.ndarray], None]
Observe = Callable[[int, Rows, list[np.ndarray]], None]
Attend = Callable[[int, Rows, np.ndarray, int], tuple[np.ndarray, Any]]


def entries(prompt: LayerPrompt, k: int, positions: Sequence[int]) -> list[Entry]:
    """The tokens at `positions` of a prompt, as one row caches them."""
    return [Entry(int(p), prompt.key[p, k], prompt.raw[p, k], prompt.value[p, k]) for p in positions]


def softmax(x: np.ndarray, sink: np.ndarray | float = -np.inf) -> np.ndarray:
    """Over the last axis and one more logit, whose share is nobody's; -inf is masked."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / (e.sum(axis=-1, keepdims=True) + np.exp(np.asarray(sink)[..., None] - x.max(axis=-1, keepdims=True)))


class Oracle:
    """The decoder of one sequence; `rows` is its cache, `[L][K]` lists of entries."""

    def __init__(self, model: Decoder):
        assert model.spec.rope.type == "default"
        self.spec = model.spec
        self.weights = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        self.rows: list[Rows] = []

    def copy(self) -> "Oracle":
        """The same model with a cache of its own."""
        other = copy.copy(self)
        other.rows = copy.deepcopy(self.rows)
        return other

    def prefill(self, tokens: Sequence[int], select: Select) -> np.ndarray:
        """Exact attention over the prompt.

        Args:
          tokens: the prompt.
          select: `(layer, prompt) -> rows`, what the layer caches.

        Returns:
          Logits of the last token [V].
        """
        x, pos = self.weights["embedding"][np.asarray(tokens)], np.arange(len(tokens))
        distance = pos[:, None] - pos
        self.rows = []
        for layer in range(self.spec.num_layers):
            q, raw, value = self._project(layer, x)
            q, key = self.rotate(q, pos), self.rotate(raw, pos)
            visible = (distance >= 0) & (distance < (self.spec.window(layer) or len(pos)))
            repeat = lambda y: np.repeat(y, self.spec.group_size, axis=1)
            logits = self.logits(np.einsum("tnh,snh->nts", q, repeat(key)))
            probs = softmax(np.where(visible, logits, -np.inf), self.sinks(layer)[:, None])
            self.rows.append(select(layer, LayerPrompt(q, key, raw, value, probs)))
            x = self._finish(layer, x, np.einsum("nts,snh->tnh", probs, repeat(value)))
        return self._logits(x[-1])

    def decode(
        self, token: int, pos: int, insert: Insert, observe: Observe | None = None, attend: Attend | None = None
    ) -> np.ndarray:
        """One token.

        Args:
          token: its id.
          pos: its position.
          insert: `(layer, rows, new entries [K], rotated query [N H])`, puts the entries into the rows; before
            attention.
          observe: `(layer, rows, probs [K][G, entries])`, after attention.
          attend: `(layer, rows, query before rotation [N H], pos) -> (outputs [N H], probs)`, replaces attention.

        Returns:
          Logits [V].
        """
        x = self.weights["embedding"][token]
        attend = attend or self._attend
        for layer, rows in enumerate(self.rows):
            q, raw, value = self._project(layer, x)
            key = self.rotate(raw, pos)
            new = [Entry(pos, key[k], raw[k], value[k]) for k in range(self.spec.num_kv_heads)]
            insert(layer, rows, new, self.rotate(q, pos))
            heads, probs = attend(layer, rows, q, pos)
            if observe is not None:
                observe(layer, rows, probs)
            x = self._finish(layer, x, heads)
        return self._logits(x)

    def rotate(self, x: np.ndarray, pos: np.ndarray | int) -> np.ndarray:
        """Rotary embedding of `x [... heads H]` at positions `[...]`: i turns with i + half, the rest stays."""
        half = round(self.spec.head_dim * self.spec.rope.partial / 2)
        theta = np.asarray(pos)[..., None, None] * self.spec.rope.theta ** (-np.arange(half) / half)
        a, b, rest = np.split(x, [half, 2 * half], axis=-1)
        cos, sin = np.cos(theta), np.sin(theta)
        return np.concatenate([a * cos - b * sin, a * sin + b * cos, rest], axis=-1)

    def logits(self, products: np.ndarray) -> np.ndarray:
        """Products of queries and keys, scaled and capped."""
        scale, cap = self.spec.score_scale or self.spec.head_dim**-0.5, self.spec.score_cap
        return scale * products if cap is None else cap * np.tanh(scale * products / cap)

    def sinks(self, layer: int) -> np.ndarray:
        """The logit of each query head that is of no token; -inf = it has none."""
        return self.weights["layers"][layer]["attention"].get("sink", np.full(self.spec.num_heads, -np.inf))

    def _attend(self, layer: int, rows: Rows, q: np.ndarray, pos: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Every query head over the row of its group."""
        window = self.spec.window(layer) or pos + 1
        q = self.rotate(q, pos).reshape(self.spec.num_kv_heads, self.spec.group_size, -1)
        heads, probs = [], []
        sinks = self.sinks(layer).reshape(q.shape[:2])
        for row, group, sink in zip(rows, q, sinks, strict=True):
            seen = np.array([e.pos > pos - window for e in row])
            logits = self.logits(group @ np.stack([e.key for e in row]).T)
            probs.append(softmax(np.where(seen, logits, -np.inf), sink))
            heads.append(probs[-1] @ np.stack([e.value for e in row]))
        return np.concatenate(heads), probs

    def _linear(self, weights: dict, x: np.ndarray) -> np.ndarray:
        return x @ weights["kernel"] + weights.get("bias", 0.0)

    def _norm(self, weights: dict, x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.spec.norm_eps) * weights["scale"]

    def _project(self, layer: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        weights = self.weights["layers"][layer]
        a, y = weights["attention"], self._norm(weights["attention_norm"], x)
        q, k, v = (self._linear(a[n], y).reshape(*x.shape[:-1], -1, self.spec.head_dim) for n in "qkv")
        return (self._norm(a["q_norm"], q), self._norm(a["k_norm"], k), v) if self.spec.qk_norm else (q, k, v)

    def _finish(self, layer: int, x: np.ndarray, heads: np.ndarray) -> np.ndarray:
        weights = self.weights["layers"][layer]
        mlp, x = weights["mlp"], x + self._linear(weights["attention"]["o"], heads.reshape(*x.shape[:-1], -1))
        y = self._norm(weights["mlp_norm"], x)
        gate = self._linear(mlp["gate"], y)
        return x + self._linear(mlp["down"], gate / (1 + np.exp(-gate)) * self._linear(mlp["up"], y))

    def _logits(self, x: np.ndarray) -> np.ndarray:
        x = self._norm(self.weights["norm"], x)
        return x @ self.weights["embedding"].T if self.spec.tie_embeddings else self._linear(self.weights["head"], x)


def random_model(seed: int, *, dtype=jnp.float32, **fields) -> Decoder:
    """A small decoder with random weights, wide enough that attention is far from uniform."""
    small = dict(vocab_size=97, embed_dim=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48)
    spec = ModelSpec(**{**small, "max_position": 4096, **fields})
    model = Decoder(spec, dtype=dtype, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)

    def scaled(path: tuple, x: jax.Array) -> jax.Array:
        *_, part, name = path if len(path) > 1 else ("", *path)
        if name == "sink":
            y = rng.normal(1, 1, x.shape)
        elif name in ("scale", "bias"):
            y = rng.uniform(0.5, 1.5, x.shape) if name == "scale" else rng.normal(0, 0.3, x.shape)
        elif name == "embedding":
            y = rng.normal(0, 1, x.shape)
        else:  # attention logits of about 2.5 standard deviations
            y = np.asarray(x, np.float64) * (1.6 if part in ("q", "k") else 1.0)
        return jax.device_put(np.asarray(y, dtype))  # compiles nothing

    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    nnx.update(model, nnx.from_flat_state([(path, leaf.replace(scaled(path, leaf[...]))) for path, leaf in flat]))
    return model


def with_gates(model: Decoder, seed: int = 7) -> Decoder:
    """The same model, with random gates beside its weights (`kvjax.models.keep`)."""
    rng, drawn = np.random.default_rng(seed), {}
    for name, shape in keep_gate.shapes(model.spec).items():
        wide = name in ("query", "key")  # of numbers of size one
        drawn[name] = rng.normal(0, model.spec.embed_dim**-0.5 if wide else 1, shape).astype(np.float32)
    return keep_gate.attach(model, drawn)


def _positions(tier: tiers_.Tier, devices: dict[str, int]) -> np.ndarray:
    """Positions `[L B K S]` of a tier's slots, -1 where they are empty; each device's pages lie side by side."""
    table, length, slot = np.asarray(tier.table), np.asarray(tier.length), np.arange(tier.capacity)
    pos = slot
    if not isinstance(tier.pos, tuple):
        pool, size = np.asarray(tier.pos), len(tier.pos) // len(tier.num_free)
        of = lambda count, axis: np.arange(count) // (count // devices[axis])
        device = of(table.shape[1], "data")[:, None] * devices["heads"] + of(table.shape[2], "heads")
        pos = pool[np.minimum(table, size - 1) + size * device[..., None]].reshape(*length.shape, -1)
    return np.where(slot < length[..., None], pos, -1)


def step(model: Decoder, cache: layout.Cache, token: jax.Array, pos: jax.Array, active: jax.Array, *, recipe):
    """kvjax's `decode_step`, compiled."""
    with mesh.on(mesh.of(model)):
        return _step(model, cache, token, pos, active, recipe=recipe)


@functools.partial(jax.jit, static_argnames=("recipe",), donate_argnums=(1,))
def _step(model: Decoder, cache: layout.Cache, token: jax.Array, pos: jax.Array, active: jax.Array, *, recipe):
    return decode.decode_step(model, recipe, cache, token, pos, active)


step.lower = _step.lower  # as of a compiled function


def kept_positions(model: Decoder, cache: layout.Cache) -> list[list[list[list[int]]]]:
    """Positions `[B][L][K]` of the kept tokens, sorted; all tiers together."""
    layers: dict[int, np.ndarray] = {}
    for group, tiers in zip(layout.layer_groups(model.spec), cache, strict=True):
        pos = np.concatenate([_positions(tier, mesh.shape_of(model)) for tier in tiers], axis=-1)
        layers |= zip(group.index, pos, strict=True)
    batch = range(layers[0].shape[0])
    return [[[sorted(row[row >= 0].tolist()) for row in layers[i][b]] for i in range(len(layers))] for b in batch]


def start(
    model: Decoder,
    recipe,
    prompts: Sequence[Sequence[int]],
    new: int,
    padded: int | None = None,
    chunk: int = prefill.CHUNK,
    platform: str | None = None,
):
    """kvjax's prefill of a padded batch: logits [B V] and the cache, with room for `new` more tokens.

    A model that has no gates is given some where the method needs them.
    """
    if recipe.name in GUIDED and all(layer.keep is None for layer in model.layers):
        model = with_gates(model)
    padded = padded or prefill.padded_length(max(map(len, prompts)))
    tokens = np.full((len(prompts), padded), 3, np.int32)  # padding is not zeros: it must not matter
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = Lengths(tuple(map(len, prompts)), new, padded, platform=platform)
    cache = init_cache(model, recipe, lengths)
    length = jnp.asarray(lengths.prompt, jnp.int32)
    return prefill.prefill(model, recipe, jnp.asarray(tokens), length, cache, chunk)


def run(model: Decoder, recipe, prompts: Sequence[Sequence[int]], teacher_tokens, *, padded: int | None = None):
    """kvjax over a padded batch, with given continuations.

    Args:
      model, recipe: the decoder and the method.
      prompts: token ids, of any lengths.
      teacher_tokens: `[B][steps]` continuations.
      padded: tokens of a prompt after padding; None = as the library pads.

    Returns:
      Logits `[steps + 1, B, V]` (first those after the prompts), positions `[steps + 1][B][L][K]` of the kept tokens
      (sorted lists) after each step, and the cache in the end.
    """
    teacher = np.asarray(teacher_tokens, np.int32)
    last, cache = start(model, recipe, prompts, teacher.shape[1], padded)
    logits, positions = [np.asarray(last)], [kept_positions(model, cache)]
    pos = np.asarray([len(p) for p in prompts], np.int32)
    active = jnp.ones(pos.shape, bool)
    for i, token in enumerate(teacher.T):
        last, cache = step(model, cache, jnp.asarray(token), jnp.asarray(pos + i), active, recipe=recipe)
        logits.append(np.asarray(last))
        positions.append(kept_positions(model, cache))
    return np.stack(logits), positions, cache
