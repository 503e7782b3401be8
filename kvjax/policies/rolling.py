"""The policy of whole sliding windows: a row is a ring of the newest tokens, as many as the window reads."""

import functools

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from kvjax.cache import pages
from kvjax.cache import tier as tiers_
from kvjax.cache.layout import Layers, Tiers
from kvjax.cache.store import KVStore
from kvjax.cache.tier import Slots
from kvjax.policies.base import CachePolicy, PrefillOutput, write_token
from kvjax.policies.budgets.budget import Amounts, everything
from kvjax.policies.residual import residual
from kvjax.policies.ring import latest
from kvjax.spec import Lengths, ModelSpec, Prompt, Token


@functools.cache
def rolling(store: KVStore, window: int) -> CachePolicy:
    """Keep the tokens that a layer's sliding window can read, and no others: a ring that begins with the first one.

    Args:
      store: number format of slots; without its balance, which belongs to the tokens of a whole prompt.
      window: tokens that a query reads, itself included.

    Source: Mistral 7B (arXiv 2310.06825), section 2, the rolling buffer cache.
    Differs: rows that stay shorter than the window have no more slots than tokens. A store that keeps more tokens as
      they are than the window has keeps them all so; others of runs are as in `residual`.
    Cost: nothing; no more bytes than the window, whatever the context.
    """
    if window > store.residual > 0:
        return residual(store)
    store = store.one_by_one

    def init(spec: ModelSpec, layers: Layers, lengths: Lengths, dtype: DTypeLike, amounts: Amounts) -> Tiers:
        sized = functools.partial(
            tiers_.init, layers=len(layers.index), batch=len(lengths.prompt), heads=spec.num_rows, widths=layers.widths
        )
        rows = np.minimum(lengths.totals(), window)
        row = min(pages.ladder(int(rows.max()), *everything().ladder), window)
        page = pages.page_size(row, lengths.platform)
        held = lambda rows: len(layers.index) * spec.num_rows * lengths.fullest_part(-(-rows // page)) * page
        slots = min(pages.ladder(held(rows), *everything().ladder), held(np.full_like(rows, row)))
        return (sized(row=row, page=page, slots=slots, store=store, dtype=dtype),)

    def prefill(tiers: Tiers, prompt: Prompt) -> tuple[Tiers, PrefillOutput]:
        (tier,) = tiers
        rows, length = tier.length.shape, prompt.length[:, None]
        n = min(prompt.key.shape[1], tier.capacity, window)
        # The newest token of each slot; what it has left of the window is overwritten by the next token.
        pos = jnp.maximum(latest(length, window, n), 0)
        take = lambda x: jnp.moveaxis(jnp.take_along_axis(x, pos[..., None, None], axis=1), 2, 1)
        k, v = store.encode(take(prompt.key), take(prompt.value), tier.balance)
        filled = jnp.broadcast_to(jnp.minimum(length, n), rows)
        pos = jnp.broadcast_to(pos[:, None], (*rows, n))
        return (tiers_.fill(tiers_.reserve(tier, filled, n), Slots(k, v, pos), filled),), PrefillOutput()

    def insert(tiers: Tiers, token: Token) -> Tiers:
        (tier,) = tiers
        first = tiers_.take(tier, jnp.zeros_like(tier.length)[..., None]).pos  # -1 where the ring is empty
        assert not isinstance(first, tuple)
        slot = jnp.where(first[..., 0] < 0, 0, (token.pos[:, None] - first[..., 0]) % window)
        return (write_token(tier, store, token, slot),)

    return CachePolicy((store,), init, prefill, insert, budget=everything())
