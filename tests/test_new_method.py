"""docs/new-method.md: what it adds to a copy of the repository is a method there, with all that belongs to one."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "new-method.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r'^```(\w+) title="([\w/.]+)"\n(.*?)^```', PAGE, re.DOTALL | re.MULTILINE)
COPIED = ("kvjax", "pallas_kernels", "tests", "configs", "docs", "colab", "pyproject.toml", *ROOT.glob("*.md"))


def apply(folder: Path) -> None:
    """Write the page's files, and change others by its differences: each where its lines are, once."""
    for kind, name, text in BLOCKS:
        path = folder / name
        if kind != "diff":
            assert not path.exists()
            path.write_text(text, encoding="utf-8")
            continue
        lines = text.splitlines(keepends=True)
        assert all(line[0] in " +" for line in lines)
        old = "".join(line[1:] for line in lines if line[0] == " ")
        before = path.read_text(encoding="utf-8")
        assert before.count(old) == 1, f"{name}: {old}"
        path.write_text(before.replace(old, "".join(line[1:] for line in lines)), encoding="utf-8")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with the page's method."""
    folder = tmp_path_factory.mktemp("new_method")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder)
    apply(folder)
    run(folder, "tests.lib.pages")
    return folder


def run(folder: Path, *command: str) -> str:
    """What a command prints in the copy; a failure shows it."""
    settings = os.environ | {"PYTHONPATH": str(folder)}
    found = subprocess.run([sys.executable, "-m", *command], cwd=folder, env=settings, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def test_the_page_adds_a_method(repository: Path):
    files = [f"tests/test_{name}.py" for name in ("methods", "configs", "pages", "house")]
    chosen = ("-m", "slow or not slow", "-k", "vatp or every_method or parts or design")
    out = run(repository, "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *files, *chosen)
    assert re.search(r"^\d{2,} passed", out, re.MULTILINE), out


def test_the_tables_name_it(repository: Path):
    assert "vatp" in (repository / "configs" / "README.md").read_text(encoding="utf-8")


def test_the_page_is_in_the_projects_style(repository: Path):
    paths = [str(repository / name) for _, name, _ in BLOCKS if name.endswith(".py")]
    for flags in (["check"], ["format", "--check"]):
        subprocess.run([sys.executable, "-m", "ruff", *flags, *paths], cwd=repository, check=True)


@pytest.mark.slow
def test_the_laws_hold_for_it(repository: Path):
    every = ["pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    run(repository, *every, "tests", "-m", "slow or not slow", "-k", "vatp")
