"""The demo checkpoint: a small Llama-architecture model that finds lines in a list.

Trained by `python -m kvjax.demo.train` on text from `kvjax.demo.lines`, measured by `python -m kvjax.evaluate`.
"""

from pathlib import Path


def directory() -> Path:
    """Folder of the shipped checkpoint, in Hugging Face layout."""
    return Path(__file__).parent
