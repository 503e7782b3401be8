"""What a retrofit minimises: the model with relaxed decisions, and a penalty on cache entries above the target.

    s = (logit + noise) / temperature         noise ~ Logistic(0, 1), the same sample in all three places
    alpha = sigmoid(s)                        0 at the first token of a document
    dmc   keys and values are pooled with alpha; key j costs log(1 - alpha_{j+1}) in all later queries
    dms   key j costs log(1 - alpha_{j+1}) in queries that are more than `window` tokens behind it
    penalty = max(0, 1 - 1 / rate - mean hard alpha) of each sequence, the gradient going straight through to alpha

Source: DMC (arXiv 2403.09636), Megatron-LM branch `dmc`; DMS (arXiv 2506.05345), Model-Optimizer `experimental/dms`.
Differs: the divergence from the base model is KL(base || model), the released DMS code has the two exchanged; decisions
  are closed where a document begins; while the borrowed coordinate fades, that of rotated keys is left as it is
  (queries lose theirs before and after rotation), which is the same where nothing is left.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kvjax.attention.dispatch import kernel_or_xla
from kvjax.models import gate as gates
from kvjax.models import rope
from kvjax.models.decoder import Decoder, Layer, layer_forward
from kvjax.spec import Gate, GateSpec, ModelSpec
from kvjax.training import attention
from pallas_kernels import segment_merge
from pallas_kernels.implementation import Implementation

LOGITS = 2**25  # of a sequence that are held at once


class PackedBatch(NamedTuple):
    """Sequences of packed documents."""

    ids: Int[Array, "B T+1"]
    starts: Bool[Array, "B T+1"]  # the first token of a document


class Relax(NamedTuple):
    """How decisions are relaxed; None in its place takes them as they will be."""

    key: Array  # of the noise
    temperature: float = 0.1


class Losses(NamedTuple):
    """Means over a batch."""

    total: Float[Array, ""]
    text: Float[Array, ""]  # cross-entropy of the next token, or divergence from the base model [nats]
    penalty: Float[Array, ""]
    merged: Float[Array, "L K"]  # share of the tokens that take no slot of their own


class _Seen(NamedTuple):
    """Keys and values as later queries see them, before rotation."""

    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    bias: Float[Array, "B K T"]
    decided: Float[Array, "B K"]  # share of hard decisions, differentiable


def decide(gate: Gate, starts: Bool[Array, "B T"], relax: Relax | None) -> tuple[Array, Array, Array]:
    """Decisions `[B T K]` between 0 and 1, the same made hard, and the logarithms of one minus the decisions."""
    first = starts.at[:, 0].set(True)[..., None]
    if relax is None:
        hard = jnp.where(first, 0.0, (gate.logit > 0).astype(gate.logit.dtype))
        return hard, hard, jnp.where(hard > 0, -jnp.inf, 0.0)
    s = (gate.logit + jax.random.logistic(relax.key, gate.logit.shape, gate.logit.dtype)) / relax.temperature
    alpha = jnp.where(first, 0.0, jax.nn.sigmoid(s))
    hard = (alpha > 0.5).astype(alpha.dtype)
    straight = alpha + jax.lax.stop_gradient(hard - alpha)
    return alpha, straight, jnp.where(first, 0.0, jax.nn.log_sigmoid(-s))


def see(
    spec: GateSpec, gate: Gate, k: Array, v: Array, starts: Bool[Array, "B T"], relax: Relax | None,
    kernels: Implementation | None = "xla",
) -> _Seen:  # fmt: skip
    """What the decisions make of a layer's keys and values."""
    alpha, hard, stays = decide(gate, starts, relax)
    bias = jnp.moveaxis(jnp.pad(stays[:, 1:], ((0, 0), (0, 1), (0, 0))), 1, 2)  # of key j, what token j + 1 decided
    if spec.objective == "dmc":
        assert not isinstance(gate.weight, tuple)
        mean = functools.partial(kernel_or_xla, "segment means", segment_merge.pool, kernels, window=spec.window)
        k, v = (mean(x, alpha, gate.weight) for x in (k, v))
    return _Seen(k, v, bias, hard.mean(axis=1))


def attend(
    layer: Layer,
    x: Array,
    starts: Array,
    relax: Relax | None,
    turn: rope.Turn,
    spec: ModelSpec,
    window: int | None,
    kernels: Implementation | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B K"]]:
    """One layer; also what its gate decided, differentiable."""
    gate_spec = spec.gate
    assert gate_spec is not None
    q, k, v, gate = layer.project(x)
    assert isinstance(gate, Gate)
    seen = see(gate_spec, gate, k, v, starts, relax, kernels)
    free = gate_spec.window if gate_spec.objective == "dms" else 0
    heads = _attention(spec, layer.queries(q, turn), turn.key(seen.k), seen.v, bias=seen.bias, free=free, window=window)
    return layer.finish(x, heads), seen.decided


def fade(
    layer: Layer, x: Array, keep: Array, turn: rope.Turn, spec: ModelSpec, gate: GateSpec, window: int | None
) -> Array:
    """One layer of a model without gates, with so much left of what one will borrow."""
    q, k, v, _ = layer.project(x)
    part = lambda whole, silent: silent + keep.astype(whole.dtype) * (whole - silent)
    quiet = lambda q: part(q, gates.silence(gate, q, spec.num_kv_heads))
    k = layer.keys(k)
    if gate.objective == "dmc":
        k = part(k, k.at[..., gate.neuron].set(0))
    q, k = quiet(turn.query(quiet(q))), turn.key(k)
    return layer.finish(x, _attention(spec, q, k, v, window=window))


def run(
    model: Decoder,
    batch: PackedBatch,
    relax: Relax | None,
    *,
    remat: bool = False,
    fading: tuple[GateSpec, Array] | None = None,
    kernels: Implementation | None = "xla",
) -> tuple[Float[Array, "B T D"], Float[Array, "L B K"]]:
    """The last layer's outputs, and the share of tokens that the gates merge or evict, differentiable.

    Args:
      model: with gates, or without and `fading`.
      batch: sequences.
      relax: how decisions are made.
      remat: compute layers again for the gradient instead of keeping what is in them.
      fading: the gate to come, and how much is left of what it will borrow.
      kernels: what computes segment means; None = the platform's.
    """
    spec, ids, starts = model.spec, batch.ids[:, :-1], batch.starts[:, :-1]
    rotaries = {spec.rotary(index) for index in range(spec.num_layers)}
    turns = {rotary: rope.whole_turn(rotary, spec.head_dim, ids.shape[1]) for rotary in rotaries}
    x = model.embed(ids)
    decided = []
    none = jnp.zeros((ids.shape[0], spec.num_kv_heads))
    for index, layer in enumerate(model.layers):
        window = spec.window(index)
        if fading is not None:
            one = lambda layer, x, turn, w=window: (fade(layer, x, fading[1], turn, spec, fading[0], w), none)
        elif spec.gate is None:
            one = lambda layer, x, turn, w=window: (_plain(layer, x, turn, spec, w), none)
        else:
            noise = None if relax is None else relax._replace(key=jax.random.fold_in(relax.key, index))
            one = lambda layer, x, turn, w=window, noise=noise: attend(layer, x, starts, noise, turn, spec, w, kernels)
        x, hard = (jax.checkpoint(one) if remat else one)(layer, x, turns[spec.rotary(index)])
        decided.append(hard)
    return x, jnp.stack(decided)


def _attention(spec: ModelSpec, *args: Any, **kwargs: Any) -> Float[Array, "B T N H"]:
    """Attention with the model's scale and cap."""
    return attention.attention(*args, scale=spec.scale, cap=spec.score_cap, **kwargs)


def _plain(layer: Layer, x: Array, turn: rope.Turn, spec: ModelSpec, window: int | None) -> Array:
    return layer_forward(layer, x, turn, functools.partial(_attention, spec, window=window))


def losses(
    model: Decoder,
    batch: PackedBatch,
    rate: Array,
    relax: Relax | None,
    *,
    base: Decoder | None = None,
    weight: float = 1.0,
    remat: bool = False,
    fading: tuple[GateSpec, Array] | None = None,
    kernels: Implementation | None = "xla",
) -> Losses:
    """The loss of a batch.

    Args:
      model, batch, relax, remat, fading, kernels: as in `run`.
      rate: the target, tokens per slot.
      base: the model to be like; None = the text is learned.
      weight: of the penalty.
    """
    x, decided = run(model, batch, relax, remat=remat, fading=fading, kernels=kernels)
    like = None if base is None else jax.lax.stop_gradient(run(base, batch, None, remat=False)[0])
    text = _text(model, x, batch.ids[:, 1:], base, like)
    penalty = jnp.maximum(0.0, 1 - 1 / rate - decided.mean(axis=(0, 2))).mean()
    return Losses(text + weight * penalty, text, penalty, jax.lax.stop_gradient(decided).mean(axis=1))


def _text(model: Decoder, x: Array, targets: Array, base: Decoder | None, like: Array | None) -> Float[Array, ""]:
    """The mean over tokens, with the logits of few tokens at a time where there are many."""
    size = max(1, LOGITS // model.spec.vocab_size)
    tokens = x.shape[1]

    def part(x: Array, targets: Array, like: Array | None) -> Array:
        logs = jax.nn.log_softmax(model.logits(x))
        if base is None or like is None:
            return -jnp.take_along_axis(logs, targets[..., None], axis=-1).sum()
        wanted = jax.nn.log_softmax(base.logits(like))
        return jnp.sum(jnp.exp(wanted) * (wanted - logs))

    part = part if tokens <= size else jax.checkpoint(part)
    cut = lambda y, start: y[:, start : start + size]
    sums = [part(cut(x, s), cut(targets, s), None if like is None else cut(like, s)) for s in range(0, tokens, size)]
    return jnp.stack(sums).sum() / targets.size
