"""The house: packages import each other in one direction; `docs/design.md` says what is where and how a token walks."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import kvjax
from kvjax import METHODS

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


def graph() -> dict[str, set[str]]:
    """What each package imports."""
    found: dict[str, set[str]] = {}
    for path in sorted(ROOT.rglob("*.py")):
        here = package(".".join(("kvjax", *path.relative_to(ROOT).with_suffix("").parts)))
        if path != ROOT / "__init__.py":  # the public names, of all rooms
            found.setdefault(here, set()).update({package(name) for name in imported(path)} - {here})
    return found


def picture() -> str:
    """The packages and their arrows for `docs/design.md`, in Mermaid, without those that follow from two others."""
    rooms, below = graph(), {}
    for room in graphlib.TopologicalSorter(rooms).static_order():
        below[room] = rooms[room].union(*(below[other] for other in rooms[room]))
    height = {}
    for room in below:
        height[room] = 1 + max((height[other] for other in rooms[room]), default=0)
    arrows = []
    for room in sorted(rooms, key=lambda room: (-height[room], room)):
        direct = rooms[room] - set().union(*(below[other] for other in rooms[room]))
        arrows += [f"    {room} --> {' & '.join(sorted(direct))}"] if direct else []
    return "\n".join(["```mermaid", "flowchart TD", *arrows, "```", ""])


def test_packages_import_each_other_in_one_direction() -> None:
    order = list(graphlib.TopologicalSorter(graph()).static_order())  # raises CycleError
    assert order.index("spec") < order.index("cache") < order.index("policies") < order.index("generation")


def test_standard_output_has_one_console() -> None:
    """`cli.console.to_stdout`, so that no command cuts a table off in a pipe."""
    made = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if "Console()" in path.read_text("utf-8")}
    assert not made


def test_kernels_import_nothing_of_the_library() -> None:
    folder = ROOT.parent / "pallas_kernels"
    assert not [path for path in folder.rglob("*.py") if imported(path)]


def design() -> str:
    """The text of `docs/design.md`."""
    return (ROOT.parent / "docs" / "design.md").read_text("utf-8")


def test_the_design_says_where_every_module_is() -> None:
    tree = re.search(r"```\nkvjax/\n(.*?)^pallas_kernels/", design(), re.DOTALL | re.MULTILINE)
    assert tree is not None
    rooms, here = {"": ""}, ""
    for line in tree[1].splitlines():
        if found := re.match(r"  (\w+)/", line):
            here = found[1]
        elif re.match(r"  \w", line):
            here = ""
        rooms[here] = rooms.get(here, "") + line + " "
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0] if path.parent != ROOT else ""
        is_method = room == "methods" and path.stem in METHODS  # one file each
        if path.name not in ("__init__.py", "__main__.py") and not is_method:
            assert re.search(rf"(?<!\w){path.name}", rooms.get(room, "")), f"{path} is not in docs/design.md, section 2"


def test_the_design_names_no_file_that_is_not_there() -> None:
    files = [f"/{path.relative_to(ROOT.parent)}" for path in ROOT.parent.glob("*/**/*.py")]
    for name in set(re.findall(r"\w[\w/]*\.py\b", design())):
        assert any(file.endswith(f"/{name}") for file in files), name


def walk(method: str, model: Path) -> tuple[dict[str, list[str]], list[str]]:
    """What `tests.lib.walk` prints, in a process of its own: what was compiled before is not walked through."""
    command = [sys.executable, "-m", "tests.lib.walk", method, str(model)]
    lines = subprocess.run(command, cwd=ROOT.parent, check=True, capture_output=True, text=True).stdout.splitlines()
    *files, hops, _ = lines
    return {file: names.split(", ") for file, names in (line.split(": ", 1) for line in files)}, hops.split(" -> ")


def test_the_walk_of_a_token_goes_where_the_design_says(shallow) -> None:
    steps = re.findall(r"^\| \d+ \| `([\w/.]+)` \| (.*?) \|", design(), re.MULTILINE)
    assert len(steps) > 20
    walked, _ = walk("h2o", shallow)
    for file, functions in steps:
        assert set(re.findall(r"`([\w.]+)`", functions)) <= set(walked[f"kvjax/{file}"]), file


def test_a_token_passes_no_more_than_it_did(shallow) -> None:
    """Whoever needs more makes room elsewhere, or says here what it is for.

    Two files and three functions: the product that names a layer's matrix, so that one of equal layers is compiled. One
    more function: `check_list`, so that what is no list of texts is refused in words.
    """
    walked, hops = walk("snapkv+kernels=xla", shallow)  # as on a machine without a C++ compiler
    assert len(walked) <= 50 and sum(map(len, walked.values())) <= 218, "python -m tests.lib.walk snapkv+kernels=xla"
    assert hops == ["_decode_layer", "decode_attention", "decode_attention"]  # the cache's, the kernel's
