"""Tables and JSON about what was generated and what it cost."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from rich.table import Column, Table

from kvjax.generation.model import Model
from kvjax.generation.results import Compared, Continuation, Generation
from kvjax.methods import label_of
from kvjax.policies.base import Recipe

SHARE = "of the full cache, both in 16 bits"
PARTS = {
    "payload": "kept keys and values",
    "scales": "of few bits",
    "statistics": "scores, positions",
    "tables": "of pages",
    "slack": "slots that are free",
}


def describe(model: Model, out: Generation, budget: str | int | None) -> dict[str, Any]:
    """Everything about a generation as plain data."""
    return {
        "method": out.recipe.name,
        "stores": [store.name for store in out.recipe.stores],
        "sequences": [_plain(sequence) for sequence in out.sequences],
        "cache": {
            **sizes(out.bytes._asdict(), out.full_bytes, out.compared),
            "slots": out.slots,
            "forced": out.forced,
            "device_bytes": out.device_bytes,
        },
        "timing": out.timing._asdict(),
        "model": model.name,
        "stop": {"ids": list(model.stop), "source": model.stop_source or None},
        "dtype": dtype_of(model),
        "weights": model.spec.weights,
        "budget": int(budget) if isinstance(budget, str) and budget.isdecimal() else budget,
    }


def _plain(sequence: Continuation) -> dict[str, Any]:
    return {name: value for name, value in sequence._asdict().items() if name != "logprobs"}


def sizes(parts: Mapping[str, int], full: int, compared: Compared) -> dict[str, Any]:
    """A cache's bytes and a full one's in the run's dtype, and both in 16 bits with the share that they give."""
    half = compared._asdict() | {"share": compared.share}
    return {"bytes": parts, "full_bytes": full, "share": compared.share, "compared": half}


def dtype_of(model: Model) -> str:
    """What a model computes in."""
    return jnp.dtype(model.decoder.dtype).name


def heading(recipe: Recipe, budget: str | int | None) -> str:
    """A generation's name in a table: method, budget, and the stores that are not dense."""
    stores = [store.name for store in recipe.stores]
    parts = [label_of(recipe.name), budget, f"({'; '.join(stores)})" if set(stores) != {"dense"} else None]
    return " ".join(str(part) for part in parts if part is not None)


def summary(outs: Sequence[Generation], names: Sequence[str], dtype: str) -> Table:
    """One column per generation of a model with this dtype: tokens, bytes by part, times."""
    table = Table("", *(Column(name, justify="right") for name in names))
    count = lambda numbers: f"{sum(numbers):,}"
    rows = {
        "prompt tokens": [count(s.prompt_tokens for s in out.sequences) for out in outs],
        "generated tokens": [count(len(s.tokens) for s in out.sequences) for out in outs],
        "kept slots": [f"{kept_fraction(out):.1%}" for out in outs],
        f"cache bytes ({dtype})": [f"{out.bytes.total:,}" for out in outs],
    }
    if any(out.device_bytes != out.bytes.total for out in outs):
        rows["  on each device"] = [f"{out.device_bytes:,}" for out in outs]
    for part, what in PARTS.items():
        rows[f"  {part}: {what}"] = [f"{getattr(out.bytes, part):,}" for out in outs]
    rows |= {
        f"full cache bytes ({dtype})": [f"{out.full_bytes:,}" for out in outs],
        SHARE: [f"{out.compared.share:.1%}" for out in outs],
        "prefill (s)": [f"{out.timing.prefill_s:.2f}" for out in outs],
        "decode (tokens/s)": [f"{speed:.1f}" if (speed := out.timing.decode_tokens_per_s) else "–" for out in outs],
        "compilation (s)": [f"{out.timing.compile_s:.2f}" for out in outs],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    lines = [line for out in outs if (line := shortage(out))]
    table.caption = "\n".join(lines) or None
    return table


def shortage(out: Generation) -> str | None:
    """What to say when a cache was too small for what the model wanted to keep."""
    if not out.forced:
        return None
    filled = sum(int(jnp.sum(tier.length)) for tiers in out.cache for tier in tiers)
    return (
        f"{out.recipe.name}: {out.forced:,} of {out.forced + filled:,} slots that the model asked for were refused:"
        " the cache was full; give --set capacity=..."
    )


def kept_fraction(out: Generation) -> float:
    """Filled slots over the slots that a full cache would have filled."""
    return sum(map(sum, out.slots)) / sum(map(sum, out.full_slots))
