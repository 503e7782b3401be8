"""The notebooks: stripped, installable, free of private names; each runs from start to end on a CPU.

They run in a kernel of their own, as in a browser; what is slow there is slow here.
"""

import ast
import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")

FOLDER = Path(__file__).parent.parent / "colab"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# What is printed when all went well.
PRINTED = {
    "compare_methods": r"mikv +15%",
    "long_context": r"217 130",
    "many_questions": r"kvzip_plus 20% +12 of 12 right(.|\n)*the same answers: True",
    "new_method": r"all laws hold",
    "quickstart": r"\w+: +(\d+ \d+) +\1 +\1 +\1\n",  # expected, and answered with every cache
    "retrofit_dmc": r"CR 1\.[2-9]\d* of 2",
}
PICTURES = {"compare_methods", "long_context", "many_questions", "retrofit_dmc"}
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def sources(path: Path) -> list[str]:
    """The code cells."""
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@every_notebook
def test_a_notebook_is_valid_and_stripped(path: Path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs, cell.execution_count) == ([], None)
        assert not cell.metadata


@every_notebook
def test_the_first_cell_installs(path: Path):
    first = sources(path)[0]
    assert 'find_spec("kvjax") is None' in first and "%pip install" in first and 'DEVICE = "cpu"' in first
    assert first == sources(NOTEBOOKS[0])[0]


@every_notebook
def test_only_public_names_are_used(path: Path):
    lines = "\n".join(sources(path)).splitlines()
    shell = [line for line in lines if line.lstrip().startswith(("!", "%"))]
    tree = ast.parse("\n".join(re.sub(r"[!%].*", "pass", line) if line in shell else line for line in lines))
    for node in ast.walk(tree):
        names = [node.attr] if isinstance(node, ast.Attribute) else []
        if isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        if isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        assert not [name for name in names if name.startswith("_")]
    for line in shell:
        program = re.match(r"!python -m (\S+)", line)
        assert line.lstrip().startswith("%pip ") or (program and importlib.util.find_spec(program[1])), line


def test_the_table_names_every_notebook():
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\[\w+\]\((\w+)\.ipynb\)", table) == sorted(PRINTED, key=table.index)
    assert {path.stem for path in NOTEBOOKS} == PRINTED.keys()


def run(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Execute a notebook in an empty folder; its cells with their outputs."""
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # for !python
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(folder)}}
    return nbclient.NotebookClient(notebook, timeout=1800, resources=where).execute().cells


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * (p.stem != "quickstart")) for p in NOTEBOOKS]
)
@pytest.mark.filterwarnings("ignore:::(jupyter|nbclient|zmq|tornado).*")
def test_a_notebook_runs_from_start_to_end(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    outputs = [output for cell in run(path, tmp_path, monkeypatch) for output in cell.get("outputs", ())]
    printed = "".join(output.get("text", "") for output in outputs)
    assert "Traceback" not in printed and ": error:" not in printed  # of what `!` runs: it does not end a notebook
    assert re.search(PRINTED[path.stem], printed), printed
    assert any("image/png" in output.get("data", ()) for output in outputs) == (path.stem in PICTURES)
