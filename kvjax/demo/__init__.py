"""The demo checkpoint, a small Llama-architecture model that looks things up, and how it was made.

    python -m kvjax.demo.train --out DIR     # start, or continue
    python -m kvjax.demo.curves DIR          # how it learned
    python -m kvjax.demo.score DIR/hf        # held-out accuracies, and text losses
    python -m kvjax.demo.portrait DIR/hf     # what its heads attend to

`corpus` is its text, `tokens` and `vocabulary` its tokens, `documents` and `lines` what it reads, `data` makes batches
of them, `course` says when documents grow, `model` is the decoder as it is trained, `checkpoint` is what a run leaves
on disk, `export` writes the Hugging Face checkpoint.
"""

from pathlib import Path

DMC = "demo-dmc"  # the demo model, retrofitted to four tokens per slot


def directory() -> Path:
    """Folder of the shipped checkpoint, in Hugging Face layout."""
    return Path(__file__).parent


def find(name: str | Path | None) -> str | Path:
    """A checkpoint's name, or the folder of a shipped one: `demo` (None as well) or `demo-dmc`."""
    if name is not None and Path(name).exists():
        return name
    return {None: directory(), "demo": directory(), DMC: directory() / "dmc"}.get(name, name)  # pyright: ignore
