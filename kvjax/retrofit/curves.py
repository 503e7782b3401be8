"""What a retrofit has done: pictures of loss and rate over steps and of what each head has learned, and a line."""

from pathlib import Path
from typing import Any

import numpy as np

from kvjax.checkpoint import orbax
from kvjax.errors import InputError
from kvjax.plotting import COLOURS, save_figure
from kvjax.training import runs

DRAWN = ("tokens", "rate", "target", "text", "penalty")


def entries(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, with what is drawn of them."""
    found = runs.entries(run / runs.LOG)
    for entry in found:
        if not all(isinstance(entry.get(name), int | float) for name in DRAWN):
            raise InputError(f"{run / runs.LOG} is not the log of a retrofit: step {entry['step']} lacks numbers")
    return found


def describe(run: Path) -> str:
    """The last line of a run's log in words."""
    last = entries(run)[-1]
    read = f"{last['tokens'] / 1e6:,.1f} million tokens"
    return f"CR {last['rate']:.2f} of {last['target']:.2f}, loss {last['text']:.4f}, {last['step']} steps, {read}"


def save(run: Path) -> Path:
    """Draw a run's log into its folder as `curves.png`."""
    from matplotlib.figure import Figure

    found = entries(run)
    steps = [entry["step"] for entry in found]
    figure = Figure(figsize=(9, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.plot(steps, [entry["rate"] for entry in found], color=COLOURS[0], label="of the decisions, with noise")
    upper.plot(steps, [entry["target"] for entry in found], color=COLOURS[1], linestyle="--", label="target")
    upper.set(ylabel="tokens per slot", title="Compression rate")
    lower.plot(steps, [entry["text"] for entry in found], color=COLOURS[0], label="text")
    lower.plot(steps, [entry["penalty"] for entry in found], color=COLOURS[1], linestyle="--", label="penalty")
    lower.set(ylabel="loss [nats]", xlabel="steps", title="Loss")
    for axes in (upper, lower):
        for entry, before in zip(found[1:], found, strict=False):
            if entry.get("stage") != before.get("stage"):
                axes.axvline(before["step"], color="0.8", linewidth=0.8, zorder=0)
        axes.legend(fontsize=8)
    return save_figure(figure, run / "curves.png")


def save_rates(checkpoint: Path, picture: Path) -> Path:
    """Draw how many tokens each layer and head of a retrofitted checkpoint puts into a slot, as it notes them."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    rates = 1 / np.maximum(np.asarray(orbax.read_about(checkpoint)["slots"]), 1e-3)  # L K
    layers, heads = rates.shape
    figure = Figure(figsize=(2.5 + 0.6 * heads, 1.5 + 0.4 * layers), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(rates, cmap="Blues", norm=LogNorm(1, max(2.0, float(rates.max()))), aspect="auto")
    axes.set(xlabel="key/value head", ylabel="layer", xticks=range(heads), yticks=range(layers))
    axes.set_title(f"Tokens per slot, {1 / (1 / rates).mean():.2f} in all", fontsize=10)
    if rates.size <= 256:  # else the numbers would overlap
        dark = rates > np.sqrt(rates.max())
        for (layer, head), rate in np.ndenumerate(rates):
            label = f"{rate:.1f}" if rate < 100 else f"{rate:.0f}"
            axes.text(head, layer, label, ha="center", va="center", fontsize=8, color="w" if dark[layer, head] else "k")
    figure.colorbar(image, ax=axes, format="%g")
    return save_figure(figure, picture)
