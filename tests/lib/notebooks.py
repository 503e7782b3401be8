"""Notebooks as a browser runs them, in a kernel of their own.

    python -m tests.lib.notebooks NAME...

runs them and stores the pictures that they draw. Those of a real model read the SmolLM2*.gguf of $KVJAX_REAL_MODELS.
"""

import os
import sys
import tempfile
from pathlib import Path

import nbclient
import nbformat

FOLDER = Path(__file__).parents[2] / "colab"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MODEL = '"HuggingFaceTB/SmolLM2-135M-Instruct"'


def environment(folder: Path) -> dict[str, str]:
    """Where nothing of this user's lies, on the CPU."""
    found = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    found["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{found['PATH']}"  # for !python
    found |= {"XDG_CACHE_HOME": str(folder / "cache"), "IPYTHONDIR": str(folder / "ipython")}
    return found | {"JAX_PLATFORMS": "cpu"}


def real_model() -> Path | None:
    """The small one of $KVJAX_REAL_MODELS."""
    return next(Path(os.environ.get("KVJAX_REAL_MODELS", "")).glob("SmolLM2*.gguf"), None)


def run(path: Path, folder: Path) -> nbformat.NotebookNode:
    """Execute a notebook in an empty folder."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if MODEL in cell.source:
            cell.source = cell.source.replace(MODEL, repr(str(real_model())))
    where = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(notebook, timeout=3600, resources=where)
    return client.execute(env=environment(folder))


def store(path: Path, folder: Path) -> None:
    """Keep a notebook as it is, with the pictures that it draws now."""
    notebook = nbformat.read(path, as_version=4)
    for cell, ran in zip(notebook.cells, run(path, folder).cells, strict=True):
        for output in ran.get("outputs", ()):
            if picture := output.get("data", {}).get("image/png"):
                cell.outputs = [nbformat.v4.new_output("display_data", {"image/png": picture})]
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            store(FOLDER / f"{name}.ipynb", Path(folder))
