"""The checkpoints that come with the library."""

from pathlib import Path

from kvjax.errors import InputError

DMC = "demo-dmc"  # the demo model, retrofitted to four tokens per slot


def directory() -> Path:
    """Folder of the shipped checkpoint, in Hugging Face layout."""
    return Path(__file__).parents[1] / "demo"


def find(name: str | Path | None) -> str | Path:
    """A checkpoint's name, or the folder of a shipped one: `demo` (None as well) or `demo-dmc`."""
    if not isinstance(name, str | Path | None):
        raise InputError(f"model {name!r} is not a name or a path")
    if name is not None and Path(name).exists():
        return name
    return {None: directory(), "demo": directory(), DMC: directory() / "dmc"}.get(name, name)  # pyright: ignore
