"""Rotary position embeddings and their scaling rules.

Of the R numbers of a head that turn, all H of them or the first ones (`RopeSpec.partial`), number `i` is paired with
`i + R/2` (half-split), as in every checkpoint that kvjax reads.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kvjax.spec import RopeSpec
from pallas_kernels.rotation import Rotation
from pallas_kernels.rotation import rotate as rotate


def frequencies(rope: RopeSpec, head_dim: int, seq_len: Int[Array, " *b"]) -> Float[Array, "*b half"]:
    """Angular frequency of each pair of dimensions that turns [radians per token].

    Args:
      rope: the rule.
      head_dim: H, even.
      seq_len: tokens seen so far; only `dynamic` and `longrope` depend on it.

    Source: transformers `modeling_rope_utils.py` (`default`, `linear`, `dynamic`, `llama3`, `yarn`, `longrope`); `none`
      turns nothing.
    Differs: `dynamic` and `longrope` use each sequence's own length where transformers takes the longest of the batch,
      so that a sequence does not depend on its batch mates.
    """
    width = rope.width(head_dim)
    if rope.type == "none":
        return jnp.zeros((*jnp.shape(seq_len), width // 2), jnp.float32)
    exponent = jnp.arange(0, width, 2, dtype=jnp.float32) / width
    base = jnp.full(jnp.shape(seq_len), rope.theta, jnp.float32)
    if rope.type == "dynamic":
        stretched = jnp.maximum(seq_len, rope.original_max_position).astype(jnp.float32)
        growth = rope.factor * stretched / rope.original_max_position - (rope.factor - 1)
        base = base * growth ** (width / (width - 2))
    inv = 1.0 / base[..., None] ** exponent
    if rope.type == "linear":
        inv = inv / rope.factor
    elif rope.type == "llama3":
        inv = _llama3(rope, inv)
    elif rope.type == "yarn":
        inv = _yarn(rope, inv, width)
    elif rope.type == "longrope":
        inv = inv / _longrope(rope, seq_len)
    return inv


def _llama3(rope: RopeSpec, inv: Array) -> Array:
    """Stretch long wavelengths by `factor`, keep short ones, blend in between (Llama 3.1)."""
    wavelength = 2 * math.pi / inv
    turns = rope.original_max_position / wavelength
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = jnp.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * inv / rope.factor + smooth * inv


def _yarn(rope: RopeSpec, inv: Array, width: int) -> Array:
    """Interpolate slow dimensions, keep fast ones, ramp in between (arXiv 2309.00071, section 3.2)."""

    def dimension(turns: float) -> float:
        return width * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = (jnp.arange(width // 2, dtype=jnp.float32) - low) / ((high - low) or 0.001)
    keep = 1 - jnp.clip(ramp, 0.0, 1.0)
    return inv / rope.factor * (1 - keep) + inv * keep


def _longrope(rope: RopeSpec, seq_len: Array) -> Array:
    """How far each wavelength is stretched (arXiv 2402.13753); longer sequences have factors of their own."""
    long = (seq_len > rope.original_max_position)[..., None]
    return jnp.where(long, jnp.asarray(rope.long_factors), jnp.asarray(rope.short_factors))


def rotation(rope: RopeSpec, head_dim: int, seq_len: Int[Array, " *b"]) -> Rotation:
    """By which angles queries and keys turn in sequences of `seq_len` tokens."""
    still = head_dim - rope.width(head_dim)
    return Rotation(frequencies(rope, head_dim, seq_len), rope.attention_factor, still=still)


class Turn(NamedTuple):
    """How queries and keys turn at their positions."""

    cos: Float[Array, "*b 1 half"]
    sin: Float[Array, "*b 1 half"]
    growth: Float[Array, "*b 1 1"] | tuple = ()  # of queries; () = they keep their length

    def query(self, q: Float[Array, "*b N H"]) -> Float[Array, "*b N H"]:
        """Queries at their positions."""
        q = rotate(q, self.cos, self.sin)
        return q if isinstance(self.growth, tuple) else q * self.growth.astype(q.dtype)

    def key(self, k: Float[Array, "*b K H"]) -> Float[Array, "*b K H"]:
        """Keys at their positions."""
        return rotate(k, self.cos, self.sin)


def turn(rope: RopeSpec, rotation: Rotation, pos: Int[Array, "*b one"]) -> Turn:
    """How queries and keys turn at positions.

    Queries may grow with the logarithm of how many times the length the model was trained on lies before them.

    Source: transformers `get_llama_4_attn_scale`, as Ministral 3 has it.
    """
    cos, sin = rotation.angles(pos)
    if not rope.query_growth:
        return Turn(cos, sin)
    times = (pos // rope.original_max_position).astype(jnp.float32)
    return Turn(cos, sin, (1 + rope.query_growth * jnp.log1p(times))[..., None])


def whole_turn(rope: RopeSpec, head_dim: int, tokens: int) -> Turn:
    """How queries and keys turn at the positions of a whole sequence `[T]`."""
    return turn(rope, rotation(rope, head_dim, jnp.full(1, tokens)), jnp.arange(tokens)[:, None])
