"""Fates: what becomes of the token that must leave its slot."""

from collections.abc import Callable

from jax import Array
from jaxtyping import Bool, Int

from kvjax.cache.tier import Tier

# (tiers, victim slot of each row, rows that lose one) -> tiers; the caller reuses the victim's slot afterwards.
Fate = Callable[[tuple[Tier, ...], Int[Array, "B K"], Bool[Array, "B K"]], tuple[Tier, ...]]


def drop(tiers: tuple[Tier, ...], victim: Int[Array, "B K"], where: Bool[Array, "B K"]) -> tuple[Tier, ...]:
    """The victim is forgotten.

    Cost: nothing.
    """
    del victim, where
    return tiers
