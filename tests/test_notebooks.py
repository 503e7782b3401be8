"""The notebooks: installable, with pictures and no other output, free of private names; each runs to its end on a CPU.

They run in a kernel of their own, as in a browser; what is slow there is slow here. Those of a real model need one.
"""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
notebooks = pytest.importorskip("tests.lib.notebooks", exc_type=ModuleNotFoundError)  # needs nbclient

# What is printed when all went well.
PRINTED = {
    "compare_methods": r"mikv +20%",
    "long_context": r"4871236[\s\S]* 302(compiling \.\.\.\s+)? 114",  # the needle, and the demo model's line
    "many_questions": r"kvzip_plus 20% +12 of 12 right[^$]*the same answers: True[^$]*served: 12 of 12 right",
    "new_method": r"all laws hold",
    "quickstart": r"kvzip_plus 20%: [34] of 4 right[^$]*snapkv 20%: [01] of 4 right[^$]*snapkv 20% +[34] of 4 right",
    "retrofit_dmc": r"CR 1\.[2-9]\d* of 2",
}
PICTURES = {"compare_methods", "long_context", "many_questions", "retrofit_dmc"}
REAL = {"compare_methods", "long_context", "quickstart"}  # ask a real model
every_notebook = pytest.mark.parametrize("path", notebooks.NOTEBOOKS, ids=lambda path: path.stem)


def sources(path: Path) -> list[str]:
    """The code cells."""
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@every_notebook
def test_a_notebook_is_valid_and_has_its_pictures_alone(path: Path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.metadata for cell in notebook.cells) and not any(cell.execution_count for cell in code)
    kinds = {kind for cell in code for output in cell.outputs for kind in output.data}
    assert kinds == ({"image/png"} if path.stem in PICTURES else set())


@every_notebook
def test_the_first_cell_installs(path: Path):
    first = sources(path)[0]
    assert 'find_spec("kvjax") is None' in first and "%pip install" in first and 'PACKAGE = "kvjax"' in first
    assert first == sources(notebooks.NOTEBOOKS[0])[0]


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
    table = (notebooks.FOLDER / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\[\w+\]\((\w+)\.ipynb\)", table) == sorted(PRINTED, key=table.index)
    assert {path.stem for path in notebooks.NOTEBOOKS} == PRINTED.keys()


def marks(path: Path) -> list[pytest.MarkDecorator]:
    quick = path.stem in {"quickstart", "long_context"}
    return [pytest.mark.real] * (path.stem in REAL) + [pytest.mark.slow] * (not quick)


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem, marks=marks(p)) for p in notebooks.NOTEBOOKS])
@pytest.mark.filterwarnings("ignore:::(jupyter|nbclient|zmq|tornado).*")
def test_a_notebook_runs_from_start_to_end(path: Path, tmp_path: Path):
    if path.stem in REAL and notebooks.real_model() is None:
        pytest.skip("no SmolLM2*.gguf in $KVJAX_REAL_MODELS")
    cells = notebooks.run(path, tmp_path).cells
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    printed = "".join(output.get("text", "") for output in outputs)
    assert "Traceback" not in printed and ": error:" not in printed  # of what `!` runs: it does not end a notebook
    assert re.search(PRINTED[path.stem], printed), printed
    assert any("image/png" in output.get("data", ()) for output in outputs) == (path.stem in PICTURES)


@pytest.mark.slow
def test_a_notebook_installs_what_it_needs(tmp_path: Path):
    """In an environment with nothing but a kernel, from a folder with a space in its name."""
    pip = [tmp_path / "venv" / "bin" / "python", "-m", "pip", "--quiet", "install"]
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    if subprocess.run([*pip, "ipykernel", "nbclient"]).returncode:
        pytest.skip("pip cannot install a kernel")
    (tmp_path / "a checkout").symlink_to(notebooks.FOLDER.parent)
    notebook = nbformat.read(notebooks.FOLDER / "new_method.ipynb", as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = first.source.replace('PACKAGE = "kvjax"', f"PACKAGE = {str(tmp_path / 'a checkout')!r}")
    first.source += "\nimport kvjax\nprint(kvjax.__file__)"
    last = nbformat.v4.new_code_cell("print(kvjax.load())")
    nbformat.write(nbformat.v4.new_notebook(cells=[first, last]), tmp_path / "first.ipynb")
    environment = {name: value for name, value in notebooks.environment(tmp_path).items() if name != "PYTHONPATH"}
    execute = [tmp_path / "venv" / "bin" / "jupyter-execute", "--inplace", "first.ipynb"]
    subprocess.run(execute, cwd=tmp_path, env=environment, check=True)
    cells = nbformat.read(tmp_path / "first.ipynb", as_version=4).cells
    printed = ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]
    assert str(tmp_path / "venv") in printed[0] and "Model('demo'" in printed[1]
