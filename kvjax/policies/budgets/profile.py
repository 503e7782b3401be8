"""Budgets that are known before the prompt: what each row of a model needs, measured once on other texts.

What a head looks for hardly depends on the text, and so does its share under one threshold over all layers and heads.
A profile is the mean of such shares at a few levels (`kvjax.generation.calibrate`), and nothing waits for a threshold.
"""

import dataclasses
import functools
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from kvjax.cache.layout import Layers
from kvjax.errors import InputError
from kvjax.files import output, text
from kvjax.parallel import collectives
from kvjax.parallel.collectives import HEADS
from kvjax.policies.budgets.apportion import hand_out
from kvjax.policies.budgets.budget import Budget, tokens_of, uniform
from kvjax.spec import ModelSpec, ProfileSpec

METHOD = "kvzip_plus"  # what a profile is measured with, unless it is said
TEXTS = 4  # that it is measured on
FORMAT = 1
BESIDE = "kvjax-profile.json"
SHIPPED = Path(__file__).parents[2] / "profiles"


@functools.cache
def from_profile(path: Path | None) -> Budget:
    """Rows share a budget as a profile says: it is linear between its levels, and up to nothing and everything.

    Protected tokens count. Rows have at least one slot, and layers of a pool have their mean together.

    Args:
      path: of the profile; None = `ModelSpec.profile`, what lies beside the weights.

    Source: LU-KV (arXiv 2602.08585), kvpress `lukv_press.py`: a table of shares for each layer and head.
    Differs: the table is made by a threshold over all rows of any method with a score, best of one that compares rows.
    Cost: nothing after the prompt, and the peak is one layer.
    """
    longest = lambda keep, num_layers, num_heads, length: np.maximum(tokens_of(keep, length), length)
    return uniform()._replace(rows=functools.partial(_rows, path), max_slots=longest, by_head=True)


_hand_out = jax.jit(hand_out)  # once for all lengths and budgets


def _rows(
    path: Path | None, keep: int | Fraction, spec: ModelSpec, layers: Layers, length: Int[np.ndarray, " B"]
) -> Int[np.ndarray, "l B K"]:
    profile = spec.profile if path is None else read(path)
    if profile is None:
        raise InputError(
            "split=profile: no profile lies beside the model: python -m kvjax.calibrate measures one; with the library"
            f" come {', '.join(shipped())}, for split=NAME"
        )
    share, heads = np.asarray(profile.shares), spec.num_rows * collectives.count(HEADS)
    if share.shape[1:] != (spec.num_layers, heads):
        raise InputError(
            f"{profile.source}: a profile of {share.shape[1]} layers of {share.shape[2]} rows, and the model has"
            f" {spec.num_layers} of {heads}: python -m kvjax.calibrate makes one of it"
        )
    share = share[:, list(layers.index)].reshape(len(share), -1).T  # R levels
    slots, levels = tokens_of(keep, length), (0.0, *profile.levels, 1.0)
    kept = np.minimum(slots, length)
    wanted = np.stack([np.interp(kept / length, levels, (0.0, *row, 1.0)) for row in share])  # R B
    wanted = np.minimum(wanted * (len(share) * kept / wanted.sum(axis=0)), length)
    unit = max(1, min(4096, 2**30 // max(int(length.max()), 1)))  # fractions of a slot decide who gets what is left
    given = wanted * unit, unit, len(share) * kept, np.ones_like(kept), length
    with collectives.on_the_host():
        rows = np.asarray(_hand_out(*(jnp.asarray(x, jnp.int32) for x in given)))
    rows = np.where(kept < length, rows, slots)
    return np.moveaxis(rows.reshape(len(layers.index), heads, -1), 1, 2)


def beside(checkpoint: Path, name: str = BESIDE) -> Path:
    """Where the profile of a checkpoint lies, or another such file: in its directory, or beside a GGUF file."""
    return checkpoint / name if checkpoint.is_dir() else checkpoint.with_name(f"{checkpoint.name}.{name}")


def noted(spec: ModelSpec, checkpoint: Path) -> ModelSpec:
    """The model with the profile that lies beside its weights, if one does."""
    path = beside(checkpoint)
    return dataclasses.replace(spec, profile=read(path)) if path.is_file() else spec


def first(profile: ProfileSpec | None, layers: int) -> ProfileSpec | None:
    """That of the first layers."""
    return profile and dataclasses.replace(profile, shares=tuple(level[:layers] for level in profile.shares))


def shipped() -> list[str]:
    """Names of the profiles that come with the library."""
    return sorted(path.name for path in SHIPPED.glob("*.json"))


def find(name: str) -> Path:
    """A profile by its path, or of those that come with the library by its name."""
    return SHIPPED / name if not Path(name).exists() and (SHIPPED / name).is_file() else Path(name)


def check_measure(name: str, budget: Budget | None) -> None:
    """Raise `InputError` for a method that no profile can be measured with."""
    if budget is None or budget.allocate is None:
        raise InputError(f"{name} does not compare rows of different layers: give a method with split=global")


def write(path: Path, profile: ProfileSpec, model: str, method: str) -> None:
    """Write a profile.

    Args:
      path: the file, JSON.
      profile: shares, in the file to five digits.
      model: a fingerprint of the model.
      method: what chose the tokens.
    """
    shares = np.round(profile.shares, 5).tolist()
    output.write_json(
        path, {"format": FORMAT, "model": model, "method": method, "levels": profile.levels, "shares": shares}
    )


def read(path: Path) -> ProfileSpec:
    """Read a profile.

    Raises:
      InputError: the file cannot be read or is not one.
    """
    found = text.read_json(path)
    if found.get("format") != FORMAT:
        raise InputError(f"{path}: format {found.get('format')!r}, this kvjax reads {FORMAT}: calibrate again")
    levels, shares = (_numbers(found.get(name)) for name in ("levels", "shares"))
    rising = levels is not None and levels.ndim == 1 and (np.diff([0, *levels, 1]) > 0).all()
    if levels is None or shares is None or not rising or shares.ndim != 3 or len(shares) != len(levels):
        raise InputError(f"{path}: expected rising levels between 0 and 1, and shares [levels][layers][rows]")
    if not (shares.sum(axis=(1, 2)) > 0).all():
        raise InputError(f"{path}: at one of the levels nothing is shared")
    shares = tuple(tuple(map(tuple, level)) for level in shares.tolist())
    return ProfileSpec(tuple(levels.tolist()), shares, str(path), str(found.get("model", "")))


def _numbers(given: Any) -> np.ndarray | None:
    """Numbers from 0 to 1 in lists of equal lengths; None if it is anything else."""
    try:
        found = np.asarray(given)
    except ValueError:  # lists of different lengths
        return None
    numbers = found.dtype.kind in "if" and found.size and ((found >= 0) & (found <= 1)).all()
    return found.astype(np.float64) if numbers else None
