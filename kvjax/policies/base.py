"""The theory: what a cache policy is, and what a recipe is. `retain` is the policy that most methods are.

    init     allocate tiers for a batch                         once, on the host
    prefill  keep the best of a prompt, one layer at a time
    insert   give one new token a slot; runs before attention
    observe  learn from attention, evict; runs after attention  (None: kernels need not return probabilities)

All but `init` are pure functions of one layer's view of the tiers. They run inside `jit`; nothing that depends on a
prompt becomes a shape. Before the layers of a step, `PoolHooks.reserve` takes pages for all of them at once. A method
is a factory that returns a `Recipe`.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from kvjax.cache import tier as tiers_
from kvjax.cache.layout import Layers, Tiers
from kvjax.cache.store import KVStore
from kvjax.cache.tier import Slots, Tier
from kvjax.policies.budgets.budget import Amounts, Budget, parse_keep
from kvjax.spec import Gate, Lengths, ModelSpec, Prompt, PyTree, Token
from pallas_kernels.implementation import Implementation

AMOUNTS = ("budget", "decode_budget", "capacity")  # arguments of factories: 512 or "20%"
Positions = Callable[[Int[Array, "B K S"], Int[Array, " B"], Int[Array, "B K"]], Int[Array, "B K S"]]
Select = Callable[..., tuple[Bool[Array, "B K S"], ...]]
Windowed = Literal["compressed", "whole"]


class PrefillOutput(NamedTuple):
    """What `CachePolicy.prefill` says of a layer beside its tiers; every leaf leads with [B K]."""

    stats: PyTree = ()  # for `Budget.allocate`; kept until the last layer
    pending: PyTree = ()  # for `PromptHooks.write_selected`; kept until the layer's slots are allocated


class RewrittenPrompt(NamedTuple):
    """What the queries of a prompt see in place of its tokens' keys and values."""

    k: Float[Array, "B T K H"]  # before rotation
    v: Float[Array, "B T K H"]
    visible_until: Int[Array, "B K T"]  # the last position whose query sees them
    rest: PyTree = ()  # for `CachePolicy.prefill`, as `Prompt.rewritten`


def write_token(tier: Tier, store: KVStore, token: Token, slot: Int[Array, "B K"]) -> Tier:
    """A layer's view with a new token in one slot of each row of the active sequences."""
    k, v = store.encode(token.key[:, :, None], token.value[:, :, None], tier.balance)
    pos = jnp.broadcast_to(token.pos[:, None, None], (*slot.shape, 1))
    active = jnp.broadcast_to(token.active[:, None, None], pos.shape)
    return tiers_.put(tier, slot[..., None], Slots(k, v, pos, jnp.zeros(pos.shape, jnp.float32)), active)


def reserve_slot(tiers: Tiers, active: Bool[Array, " B"]) -> Tiers:
    """One more slot for every row of every active sequence."""
    return tuple(tiers_.reserve(t, jnp.where(active[:, None], t.length + 1, 0), 1) for t in tiers)


Rewrite = Callable[[Tiers, Array, Array, Gate, Array, int | None, Implementation | None], RewrittenPrompt]


class PromptHooks(NamedTuple):
    """What a policy may do with a layer's prompt besides `prefill`.

    Attributes:
      rewrite: `(tiers, k, v, gate [B T K], length [B], window, kernels) -> RewrittenPrompt`, before the attention of a
        prompt, keys before rotation; None = queries see its own tokens.
      write_selected: `(tiers, pending, slots [B K], kernels) -> tiers` fills a layer's rows with what `prefill` let
        wait until the slots were allocated; None = `prefill` has filled them, and they are trimmed.
    """

    rewrite: Rewrite | None = None
    write_selected: Callable[[Tiers, PyTree, Int[Array, "B K"], Implementation | None], Tiers] | None = None


class PoolHooks(NamedTuple):
    """How a policy takes and returns pages, of all layers at once: tiers have the L axis.

    Attributes:
      reserve: `(tiers, active [B]) -> tiers`, takes pages for what a step may append to each row.
      shrink: `(tiers, length [B], amounts) -> (tiers, pages)`, on the host after the last layer of a prompt: pages that
        each tier's pool needs from now on; None = it stays as it is.
      extend: `(tiers, length, new) -> tiers`, on the host: `new` more tokens than were expected may follow the `length`
        ones of each sequence; None = nothing in a tier depends on how many are.
      prune: `(tiers, fresh, length [B], window) -> tiers`: the empty tiers of a smaller budget, with those tokens of
        `tiers`, which hold a prompt and nothing else, that `prefill` would have kept under it; None = cannot be done.
    """

    reserve: Callable[[Tiers, Bool[Array, " B"]], Tiers] = reserve_slot
    shrink: Callable[[Tiers, Int[Array, " B"], Amounts], tuple[Tiers, tuple[int, ...]]] | None = None
    extend: Callable[[Tiers, int, int], Tiers] | None = None
    prune: Callable[[Tiers, Tiers, Int[Array, " B"], int | None], Tiers] | None = None


class CachePolicy(NamedTuple):
    """Pure functions over a layer's tiers.

    Attributes:
      stores: number format of each tier.
      init: `(spec, layers, lengths, dtype, amounts) -> tiers` with the `L` axis; on the host.
      prefill: `(tiers, prompt) -> (tiers, PrefillOutput)`.
      insert: `(tiers, token) -> tiers`.
      observe: `(tiers, token, probabilities) -> tiers`, one `[B K G S]` per tier, 0 where empty; or None.
      prompt_hooks, pool_hooks: what most policies leave as it is.
      budget: how slots follow from an amount; its `allocate` redistributes them after the prompt; None = it has none.
      windowed: `window -> policy` of layers with such a sliding window; None = this one.

    In a layer with a sliding window a row never holds more tokens than the window (but for KIVI's codes: whole runs),
    and lengths that a budget is given are those of what the next token can read (`kvjax.spec.readable`).
    """

    stores: tuple[KVStore, ...]
    init: Callable[[ModelSpec, Layers, Lengths, DTypeLike, Amounts], Tiers]
    prefill: Callable[[Tiers, Prompt], tuple[Tiers, PrefillOutput]]
    insert: Callable[[Tiers, Token], Tiers]
    observe: Callable[[Tiers, Token, tuple[Float[Array, "B K G S"], ...]], Tiers] | None = None
    prompt_hooks: PromptHooks = PromptHooks()
    pool_hooks: PoolHooks = PoolHooks()
    budget: Budget | None = None
    windowed: "Callable[[int], CachePolicy] | None" = None


class Recipe(NamedTuple):
    """A method: what generation needs to know about a cache. Made by the factories in `kvjax.methods`.

    Attributes:
      name: the method's name.
      policy: its functions.
      rotate: cached keys are rotated when written, or when read; latents are always when read.
      positions: with `rotate="read"`: `(pos, now, length) -> pos`, where a slot stands; None = at its own position.
      select: `(attention weights of each tier [B K G S], seen [B]) -> slots of each tier [B K S]`, those that a step
        attends to of the `seen` tokens that it can read, itself included; None = all. It frees nothing.
      kernels: which implementation of `pallas_kernels` fills and reads the cache; None = the platform's, `cpu` = that
        of CPUs and plain XLA elsewhere.
      amounts: how much it may keep: data, which programs are not compiled for, see `structure`.
      windowed: what becomes of layers with a sliding window: "compressed" gives them a budget of what they can read,
        "whole" keeps their windows. See `kvjax.policies.layers.layer_recipe`.
      replay: tokens of a chunk; a prompt is read again behind its end in such chunks, and what they ask of it is
        `Prompt.probe`; None = it is read once.
      context: the method of a cache of one sequence that is read beside this one's by all sequences; None = there is
        none. See `kvjax.policies.layers.asking`.
    """

    name: str
    policy: CachePolicy
    rotate: Literal["write", "read"] = "write"
    positions: Positions | None = None
    select: Select | None = None
    kernels: Implementation | None = "cpu"
    windowed: Windowed = "compressed"
    amounts: Amounts = Amounts()
    replay: int | None = None
    context: "Recipe | None" = None

    @property
    def structure(self) -> "Recipe":
        """The recipe without its amounts: what programs are compiled for."""
        return self._replace(amounts=Amounts(), context=self.context and self.context.structure)

    def slots(self, layer: int, num_layers: int, length: int) -> int:
        """Slots of a row for a prompt of this length, of the layer with this place among those that share a budget."""
        assert self.budget is not None
        return int(self.budget.slots(self.amounts.keep or 0, layer, num_layers, length))

    @property
    def stores(self) -> tuple[KVStore, ...]:
        """Number format of each tier."""
        return self.policy.stores

    @property
    def budget(self) -> Budget | None:
        """Slots per row; None = the policy has no budget."""
        return self.policy.budget


def cached(factory: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """A factory whose equal arguments give the same recipe, hence the same compiled programs."""
    # Typed: 1 token and 100% are equal numbers.
    remembered, signature = functools.lru_cache(None, typed=True)(factory), inspect.signature(factory)

    @functools.wraps(factory)
    def make(*args: object, **kwargs: object) -> Recipe:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        for name in AMOUNTS:
            if given.arguments.get(name, "") != "":
                given.arguments[name] = parse_keep(given.arguments[name], name)
        return remembered(**given.arguments)

    return make
