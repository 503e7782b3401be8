"""What a model is and what flows through a cache: the shared nouns of kvjax.

Axis letters, used in every annotation and einsum of the project:

    B batch            T tokens of a prompt     S slots of a row
    L layers           N query heads            K key/value heads, in a cache: groups of them that share a latent
    G = N / K          H head width             R, W cached widths of keys and of values (H, or a latent's rank)
    D model width      P pages of a pool        M pages of a row
    V vocabulary

A *row* is one (sequence, key/value head), or one (sequence, latent). Keys and values are never repeated to query heads.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Shaped

from pallas_kernels.implementation import Implementation
from pallas_kernels.rotation import Rotation

PyTree = Any
NEW_TOKENS = 256  # a step of the room for new tokens, where shapes are made for a total length
RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope", "none"]
Norm = Literal["rms", "rms+1", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh"]
DTYPES = ("float32", "bfloat16", "float16")  # that a model computes in
WeightFormat = Literal["int8", "int4"]
WEIGHT_BITS: dict[WeightFormat, int] = {"int8": 8, "int4": 4}
WEIGHT_GROUP = 32  # inputs of a matrix whose codes share a scale


@dataclasses.dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding. Field names follow the checkpoints' own `rope_scaling`.

    Source: Su et al. 2021 (arXiv 2104.09864); scaling rules as in transformers `modeling_rope_utils.py`.
    """

    theta: float = 10000.0
    type: RopeType = "default"
    factor: float = 1.0
    original_max_position: int = 0  # tokens the model was trained on before scaling
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 1.0  # yarn, longrope: multiplies cos and sin
    short_factors: tuple[float, ...] = ()  # longrope: of each pair's wavelength, up to `original_max_position` tokens
    long_factors: tuple[float, ...] = ()  # longrope: in longer sequences
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    query_growth: float = 0.0  # see `kvjax.models.rope.turn`
    partial: float = 1.0  # share of a head's values that are rotated, the first ones

    @property
    def follows_length(self) -> bool:
        """Whether the frequencies depend on how many tokens a sequence has."""
        return self.type == "dynamic" or self.short_factors != self.long_factors

    def width(self, head_dim: int) -> int:
        """Values of a head that are rotated."""
        return int(head_dim * self.partial)


@dataclasses.dataclass(frozen=True)
class LatentSpec:
    """Low-rank keys and values: what is cached of a token is a latent of `heads` key/value heads together.

    Source: LoRC (arXiv 2410.03111) for all heads together; Palu (arXiv 2407.21118) for groups of them.
    """

    heads: int  # consecutive key/value heads that share a latent
    ranks: tuple[tuple[int, int], ...]  # width of a latent of keys and of values in each layer


@dataclasses.dataclass(frozen=True)
class GateSpec:
    """A decision that a retrofitted model takes per token and key/value head; see `kvjax.models.gate`.

    Source: `dmc`, Dynamic Memory Compression (arXiv 2403.09636); `dms`, Dynamic Memory Sparsification (arXiv
    2506.05345); the released code of both.
    """

    objective: Literal["dmc", "dms"]  # the token is merged with the one before; that one is evicted `window` tokens on
    rate: float  # compression rate: tokens per slot, as measured when the model was trained
    window: int  # tokens: dmc, that a merged slot remembers, 0 = all of them; dms, that stay until they are evicted
    neuron: int | None = -1  # coordinate that the gate borrows, see `kvjax.models.gate`; None = a projection of its own
    offset: float = 5.0  # of the logit, so that an untrained gate is closed
    scale: float = 1.0  # of the logit before the offset


@dataclasses.dataclass(frozen=True)
class ProfileSpec:
    """How a model's rows share a budget, measured once; see `kvjax.policies.budgets.profile`."""

    levels: tuple[float, ...]  # kept shares of all rows together, rising, between 0 and 1
    shares: tuple[tuple[tuple[float, ...], ...], ...]  # of each row at each level [levels L K]
    source: str = dataclasses.field(default="", compare=False)  # the file, for errors
    model: str = dataclasses.field(default="", compare=False)  # fingerprint of the weights that it was measured on


@dataclasses.dataclass(frozen=True)
class ExpertSpec:
    """A feed-forward network of experts, each `mlp_dim` wide; see `kvjax.models.experts`."""

    count: int
    chosen: int  # for each token
    normed: bool = True  # weights of the chosen ones add up to 1, else those of all
    bias: bool = False  # of the router and of the experts
    limit: float | None = None  # gates go up to it, what they multiply is clipped to it and 1 is added
    slope: float = 1.0  # of the gates' sigmoid


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """The shape and the mathematics of one decoder; hashable, hence a static argument of `jit`."""

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_position: int  # context limit [tokens]
    rope: RopeSpec = RopeSpec()
    norm_eps: float = 1e-6
    windows: tuple[int | None, ...] = ()  # sliding window of each layer [tokens]; () = none has one
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    joint_qk_norm: bool = False  # that norm is of all heads together
    norm: Norm = "rms"  # root mean square, times scale or `1 + scale`; LayerNorm with a bias
    parallel_norms: Literal[0, 1, 2] = 0  # norms of attention and MLP that run side by side; 0 = one after the other
    pre_norms: bool = True  # what attention and MLP read is normed
    post_norms: bool = False  # what attention and MLP add to the residual stream is normed
    activation: Activation = "silu"  # of the MLP; `gelu` is exact
    gated_mlp: bool = True  # the MLP has a second projection that its activation multiplies
    experts: ExpertSpec | None = None  # the MLP is one of experts
    embed_scale: float = 1.0  # of token vectors; not where they are the head
    residual_scale: float = 1.0  # of what attention and MLP add to the residual stream
    score_scale: float | None = None  # of the products of queries and keys; None = H ** -0.5
    sinks: bool = False  # each query head has one more logit in its softmax, of no token; its value is 0
    score_cap: float | None = None  # bounds those smoothly, see `pallas_kernels.soft_cap`
    logit_scale: float = 1.0  # of the model's logits
    logit_cap: float | None = None  # likewise them, after scaling
    window_rope: RopeSpec | None = None  # of layers with a sliding window; None = `rope`
    no_rope: tuple[int, ...] = ()  # layers whose queries and keys do not turn (NoPE, arXiv 2305.19466)
    family: str = "llama"
    latent: LatentSpec | None = None  # keys and values are low-rank
    gate: GateSpec | None = None  # decides what a cache keeps
    profile: ProfileSpec | None = dataclasses.field(default=None, repr=False)  # no part of what the model computes
    weights: WeightFormat | None = None  # matrices are codes of few bits, see `kvjax.models.quantized`; None = numbers

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_rows(self) -> int:
        """K of a cache: rows of a sequence in each layer."""
        return self.num_kv_heads // (self.latent.heads if self.latent else 1)

    @property
    def scale(self) -> float:
        """Factor on the products of queries and keys."""
        return self.head_dim**-0.5 if self.score_scale is None else self.score_scale

    @property
    def late_bias(self) -> bool:
        """Whether keys have a bias that a cache of keys before rotation is kept without: no norm or gate reads it."""
        return self.qkv_bias and self.latent is None and not self.qk_norm and self.gate is None

    def widths(self, layer: int) -> tuple[int, int]:
        """R and W, the numbers that a row caches for a token's key and for its value."""
        return self.latent.ranks[layer] if self.latent else (self.head_dim, self.head_dim)

    def window(self, layer: int) -> int | None:
        """Sliding window of a layer [tokens], None for full attention."""
        return self.windows[layer] if self.windows else None

    def rotary(self, layer: int) -> RopeSpec:
        """The rotary embedding of a layer."""
        if layer in self.no_rope:
            return RopeSpec(type="none")
        return self.rope if self.window_rope is None or self.window(layer) is None else self.window_rope


PREFILL_CHUNK = 4096  # tokens of a device's prompts that projections and the feed-forward network read at once


class Lengths(NamedTuple):
    """What the host knows about a batch before it allocates a cache; hashable."""

    prompt: tuple[int, ...]  # tokens of each prompt, without padding
    new: int  # tokens that may be generated
    padded: int  # tokens of a prompt after padding
    parts: int = 1  # devices that the sequences are split over; each has a pool of its own
    platform: str | None = None  # what runs it, "tpu" for example; None = JAX's default
    total: int | None = None  # tokens that any sequence may have, with new ones: shapes are made for that alone
    most_new: int | None = None  # with a total: new ones of any sequence, for shapes; None = as many as `new`

    def longest(self) -> "Lengths":
        """The batch with as many tokens as there may be."""
        return self._replace(prompt=tuple(int(n) for n in self.totals() - self.new))

    def totals(self) -> Shaped[np.ndarray, " B"]:
        """Tokens that each sequence may have, prompt and new ones: what shapes are made for."""
        return np.max([prompt + new for prompt, new in self.extremes()], axis=0)

    def extremes(self) -> list[tuple[np.ndarray, int]]:
        """Lengths of prompts, and new tokens after each, between which a cache has room for all that there may be."""
        prompt = np.asarray(self.prompt)
        if self.total is None:
            return [(prompt, self.new)]
        new = min(-(-(self.most_new or self.new) // NEW_TOKENS) * NEW_TOKENS, self.total - 1)
        longest = [(np.full_like(prompt, self.total - n), n) for n in (1, new)]
        return [*longest, (prompt, min(new, self.total - int(prompt.max())))]

    def fullest_part(self, needed: Shaped[np.ndarray, "*l B"]) -> int:
        """The sum over what sequences need, in the part that needs most."""
        each = np.asarray(needed).reshape(*np.shape(needed)[:-1], self.parts, -1)
        return int(each.sum(axis=-1).reshape(-1, self.parts).sum(axis=0).max())


def readable(length: Any, window: int | None) -> Any:
    """Of the first `length` tokens, those that the next one can read beside itself; on ints and arrays.

    >>> readable(1000, None), readable(1000, 512), readable(100, 512)
    (1000, 511, 100)
    """
    if window is None:
        return length
    if isinstance(length, int):
        return min(length, window - 1)
    return (np if isinstance(length, np.ndarray) else jnp).minimum(length, window - 1)


class Gate(NamedTuple):
    """What a retrofitted model says of a token's cache entry."""

    logit: Float[Array, "*b K"]  # above 0: merge or evict
    weight: Float[Array, "*b K"] | tuple = ()  # importance in a merged slot; () where nothing is merged


class Probe(NamedTuple):
    """What a prompt asks of itself when it is read again behind its end, in chunks that do not see each other.

    Token j of the Q, a whole number of chunks, is the prompt's token j at position `length + j % chunk`.
    """

    q: Float[Array, "B Q N H"]  # rotated queries
    lse: Float[Array, "B N Q"]  # log-sum-exp of each query's scaled logits of its own chunk as it is read again
    size: Float[Array, "B Q"]  # L2 norm of what the query is a projection of, in float32
    chunk: int  # tokens


class Prompt(NamedTuple):
    """One layer's view of the prompts during prefill; tokens are padded on the right."""

    q: Float[Array, "B T N H"]  # rotated queries
    k: Float[Array, "B T heads H"]  # rotated keys
    v: Float[Array, "B T heads H"]
    key: Float[Array, "B T K R"]  # what the cache stores for k
    value: Float[Array, "B T K W"]  # what the cache stores for v
    lse: Float[Array, "B N T"]  # log-sum-exp of each query's scaled logits
    length: Int[Array, " B"]  # tokens of each prompt
    layer: int | Int[Array, ""]  # among those that a budget is for
    num_layers: int  # how many a budget is for
    window: int | None  # sliding window of this layer [tokens]
    scale: float  # of the products of queries and keys
    cap: float | None = None  # bounds those, see `pallas_kernels.soft_cap`
    kernels: Implementation | None = "xla"  # what computes scores and selects tokens
    gate: Gate | tuple = ()  # [B T K]; () if the model has none
    rewritten: PyTree = ()  # what `PromptHooks.rewrite` left for `CachePolicy.prefill`
    out: Callable[[], Float[Array, "N H D"]] | tuple = ()  # what heads' outputs are multiplied by: `Layer.output`
    probe: Probe | tuple = ()  # () where `Recipe.replay` is None
    rotation: Rotation | tuple = ()  # how its queries and keys were rotated
    keep: Callable[[], Float[Array, "B K T"]] | tuple = ()  # what its gate says, `Layer.worth`; () if it has none

    def alive(self) -> Bool[Array, "B T"]:
        """Which tokens the next one can read: none that has left a sliding window, no padding."""
        pos, length = jnp.arange(self.q.shape[1]), self.length[:, None]
        return (pos < length) & (pos >= length - readable(length, self.window))


class Token(NamedTuple):
    """One layer's view of the token that is being decoded."""

    q: Float[Array, "B K G H"]  # before rotation
    k: Float[Array, "B K H"]  # before rotation
    key: Float[Array, "B K R"]  # what the cache stores for k
    value: Float[Array, "B K W"]
    pos: Int[Array, " B"]  # the token's position
    active: Bool[Array, " B"]  # False: the sequence has ended, write nothing
    window: int | None = None  # sliding window of this layer [tokens]
    gate: Gate | tuple = ()  # [B K]; () if the model has none
    angles: tuple[Array, Array] | tuple = ()  # cosines and sines of the token's position [B 1 H/2]
