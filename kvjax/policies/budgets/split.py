"""Who competes for slots: the tokens of a row, those of a layer's heads, or all of them."""

import functools
from typing import Literal, get_args

from kvjax.errors import InputError
from kvjax.policies.budgets.allocation import ADA_FLOOR, from_scores, per_head
from kvjax.policies.budgets.budget import Budget, uniform

Split = Literal["row", "layer", "global"]
R_MAX = 10.0  # a row is given so many times the mean at most; more was not seen to be of use


@functools.cache
def split_over(split: Split) -> Budget:
    """As many slots as there are in a mean row, for the tokens with the best scores.

    Args:
      split: "row", of each row, so that all have as many; "layer", of all heads of a layer (`per_head`, as in Ada-KV);
        "global", of all layers and heads, whose candidates wait until the last layer (`from_scores`).
    """
    if split not in get_args(Split):
        raise InputError(f"split={split!r} is not {', '.join(get_args(Split)[:-1])} or {get_args(Split)[-1]}")
    if split == "global":
        return from_scores(r_max=R_MAX, update_interval=0, ada=True)
    return per_head(uniform(), ADA_FLOOR) if split == "layer" else uniform()
