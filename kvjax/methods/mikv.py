"""MiKV: no token left behind, the unimportant ones in few bits."""

from typing import Literal

from kvjax.cache.quantize import named
from kvjax.cache.store import dense
from kvjax.errors import InputError
from kvjax.policies import score
from kvjax.policies.base import Recipe, cached
from kvjax.policies.budgets import budget as budgets
from kvjax.policies.budgets.allocation import ADA_FLOOR, from_scores, per_head
from kvjax.policies.budgets.budget import Keep
from kvjax.policies.eviction import demote
from kvjax.policies.select import retain


@cached
def mikv(
    budget: Keep = "20%",
    *,
    low_store: str = "int2",
    balance: bool = True,
    importance: Literal["accumulated", "window"] = "accumulated",
    recent: float = 0.5,
    window: int = 8,
    kernel: int = 7,
    pooling: Literal["avg", "max"] = "avg",
    allocate: Literal["uniform", "from_scores", "per_head"] = "uniform",
    store: str = "dense",
) -> Recipe:
    """Keep important tokens unquantised and all others in few bits; demote one per decoded token.

    Args:
      budget: important tokens per row, as a mean over rows.
      low_store: number format of the others, a name of `kvjax.cache.quantize.named`.
      balance: scale the channels of low-bit keys, so that those with large queries lose less.
      importance: attention from all queries, as in `h2o`, or from the newest ones, as in `snapkv`.
      recent: share of the important tokens that are the newest ones; for "accumulated".
      window, kernel, pooling: as in `snapkv`; for "window".
      allocate: the same number of important tokens in all rows, growing with the sequence where the budget is a share;
        or decided once per prompt, by `dynamickv`'s rule over layers or by `adakv`'s over heads.
      store: number format of the important tokens, likewise.

    Source: Yang et al., 2024 (arXiv 2402.18096).
    Differs: one set of tokens per key/value head, its balance from the largest query of the group; with "window",
      "from_scores" and "per_head" keep DynamicKV's and Ada-KV's tokens and demote those that they evict.
    Cost: see `kvjax.policies.eviction.demote`; 8 bytes per important token and 4 per other one beside their codes.
    """
    high, low = named(store), named(low_store)
    if low.is_dense:
        raise InputError(f"mikv: low_store={low_store!r} must have few bits, such as int2")
    if importance not in ("accumulated", "window"):
        raise InputError(f"mikv: importance={importance!r} is not 'accumulated' or 'window'")
    if allocate not in ("uniform", "from_scores", "per_head"):
        raise InputError(f"mikv: allocate={allocate!r} is not 'uniform', 'from_scores' or 'per_head'")
    if allocate == "from_scores" and importance != "window":
        raise InputError("mikv: allocate='from_scores' compares layers by window scores: set importance='window'")
    high, low = (s._replace(balanced=balance and s.key != dense) for s in (high, low))
    keep = {
        "uniform": lambda: budgets.uniform(growing=True),
        "from_scores": lambda: from_scores(update_interval=0),
        "per_head": lambda: per_head(budgets.uniform(), ADA_FLOOR),
    }[allocate]()
    votes = (
        score.accumulated(recent)
        if importance == "accumulated"
        else score.window(window, kernel, pooling, decoding=True)
    )
    policy = retain(votes, keep, store=high, evict="after", action=demote(low))
    return Recipe("mikv", policy, amounts=budgets.amounts(budget))
