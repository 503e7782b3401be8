"""The house: packages import each other in one direction, and what `docs/design.md` says of a token's walk."""

import ast
import graphlib
from pathlib import Path

import kvjax

ROOT = Path(kvjax.__file__).parent


def package(module: str) -> str:
    """The room of a module: its package below `kvjax`, or the module itself where it lies at the top."""
    return module.split(".")[1] if "." in module else module


def imported(path: Path) -> set[str]:
    """All `kvjax` modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.split(".")[0] == "kvjax"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kvjax":
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def test_packages_import_each_other_in_one_direction() -> None:
    graph: dict[str, set[str]] = {}
    for path in sorted(ROOT.rglob("*.py")):
        here = package(".".join(("kvjax", *path.relative_to(ROOT).with_suffix("").parts)))
        if path != ROOT / "__init__.py":  # the public names, of all rooms
            graph.setdefault(here, set()).update({package(name) for name in imported(path)} - {here})
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("spec") < order.index("cache") < order.index("policies") < order.index("generation")


def test_standard_output_has_one_console() -> None:
    """`cli.console.to_stdout`, so that no command cuts a table off in a pipe."""
    made = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if "Console()" in path.read_text("utf-8")}
    assert not made


def test_kernels_import_nothing_of_the_library() -> None:
    folder = ROOT.parent / "pallas_kernels"
    assert not [path for path in folder.rglob("*.py") if imported(path)]
