"""What a retrofit's log says: a picture of loss and compression rate over steps, and a line of words."""

import json
from pathlib import Path
from typing import Any

from kvjax.evaluation.pictures import COLOURS


def entries(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


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
            if entry["stage"] != before["stage"]:
                axes.axvline(before["step"], color="0.8", linewidth=0.8, zorder=0)
        axes.legend(fontsize=8)
    figure.savefig(run / "curves.png", dpi=150)
    return run / "curves.png"
