"""Who competes for slots: the tokens of a row, those of a layer's heads, or all of them; or nobody, by a profile."""

from kvjax.errors import InputError
from kvjax.policies.budgets import profile
from kvjax.policies.budgets.allocation import ADA_FLOOR, from_scores, per_head
from kvjax.policies.budgets.budget import Budget, uniform

R_MAX = 10.0  # a row is given so many times the mean at most; more was not seen to be of use


def split_over(split: str) -> Budget:
    """As many slots as there are in a mean row, for the tokens with the best scores.

    Args:
      split: who competes for them:
        "row", the tokens of each row, so that all rows have as many;
        "layer", those of all heads of a layer (`per_head`, as in Ada-KV);
        "global", those of all layers and heads, whose candidates wait until the last layer (`from_scores`);
        "profile", those of each row, with the row's share of the profile that lies beside the model's weights;
        the path of a profile, or the name of one that comes with the library, ending in .json: likewise.

    Raises:
      InputError: anything else, or a file that is not a profile.
    """
    if split == "row":
        return uniform()
    if split == "layer":
        return per_head(uniform(), ADA_FLOOR)
    if split == "global":
        return from_scores(r_max=R_MAX, update_interval=0, ada=True)
    if split == "profile":
        return profile.from_profile(None)
    if not split.endswith(".json"):
        raise InputError(f"split={split!r} is not row, layer, global, profile or a profile's file (.json)")
    path = profile.find(split)
    profile.read(path)  # what is wrong with it is said here; it is read again where a cache is made
    return profile.from_profile(path)
