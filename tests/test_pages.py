"""The pages: what they take from the code is what it says, and their code runs.

Blocks of Python are executed, page by page, in a folder where DIR is the demo model with a chat template. Lines of
shell are read by the parsers of the commands that they call.
"""

import argparse
import importlib
import importlib.util
import itertools
import re
import shlex
import shutil
import string
import tomllib
from pathlib import Path

import pytest

from kvjax import compilation
from kvjax.checkpoint import shipped
from tests.lib import pages

EXECUTED = ("README.md", "docs/guide.md")  # others take minutes, or other checkpoints: their imports are tried
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
OTHERS = {"pip", "pytest", "ruff", "pyright", "pre-commit", "source", "mkdocs"}  # not ours
named = lambda path: str(path.relative_to(pages.ROOT))
every_page = pytest.mark.parametrize("path", pages.pages(), ids=named)


class Understood(Exception):
    """A parser has accepted a command's flags."""


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of a page in this language, "" = shell or anything."""
    return [text for kind, text in BLOCK.findall(path.read_text(encoding="utf-8")) if kind == language]


def commands(path: Path) -> list[list[str]]:
    """The commands in a page's blocks and tables, with what its own lines say of variables."""
    found = []
    rows = re.findall(r"^\|.*", path.read_text(encoding="utf-8"), re.MULTILINE)
    in_tables = [line for row in rows for line in re.findall(r"`(python -m [^`]+)`", row)]
    for block in [*blocks(path, ""), *in_tables]:
        variables: dict[str, str] = {}
        for line in block.splitlines():
            if assigned := re.match(r"([A-Z]+)=(\S+|\"[^\"]*\")$", line):
                variables[assigned[1]] = string.Template(assigned[2].strip('"')).substitute(variables)
            elif re.match(r"(python -m|\w+ install|pytest|mkdocs) ", line):
                line = string.Template(re.sub(r" [<|] .*", "", line)).substitute(variables)
                words = shlex.split(line, comments=True)
                found += [list(part) for both, part in itertools.groupby(words, lambda word: word == "&&") if not both]
    return found


@every_page
def test_parts_are_those_of_the_code(path: Path):
    text = path.read_text(encoding="utf-8")
    assert text == pages.renewed(text), "python -m tests.lib.pages"


@every_page
def test_links_lead_somewhere(path: Path):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        other = path.parent / file if file else path
        assert other.exists(), target
        heading = re.compile(rf"^#+ {anchor.replace('-', ' ')}$", re.IGNORECASE | re.MULTILINE)
        assert not anchor or heading.search(other.read_text(encoding="utf-8")), target


@every_page
def test_commands_are_understood(path: Path, monkeypatch: pytest.MonkeyPatch):
    parse = argparse.ArgumentParser.parse_args

    def only_parse(self: argparse.ArgumentParser, *args: object, **kwargs: object):
        parse(self, *args, **kwargs)  # pyright: ignore[reportCallIssue,reportArgumentType]
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    monkeypatch.setattr(compilation, "enable_compilation_cache", lambda: None)
    for words in commands(path):
        if words[:2] != ["python", "-m"]:
            assert words[0] in OTHERS, words
            continue
        module, flags = words[2], [word for word in words[3:] if word != "..."]
        spec = importlib.util.find_spec(module)
        assert spec is not None, module
        name = f"{module}.__main__" if spec.submodule_search_locations else module
        if module.startswith("kvjax.") and module != "kvjax.evaluation.harness":
            with pytest.raises(Understood):
                importlib.import_module(name).main(flags)


@every_page
def test_extras_are_there(path: Path):
    project = tomllib.loads((pages.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extras in re.findall(r"pip install [^\n`]*'\.\[([\w,]+)\]'", path.read_text(encoding="utf-8")):
        assert set(extras.split(",")) <= project["optional-dependencies"].keys(), extras


@every_page
def test_imports_are_there(path: Path):
    for text in blocks(path, "python"):
        for line in re.findall(r"^(?:from kvjax\S* )?import .*$", text, re.MULTILINE):
            exec(line, {})


@pytest.mark.parametrize("path", [pages.ROOT / name for name in EXECUTED], ids=named)
def test_python_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(shipped.directory(), tmp_path / "DIR")
    (tmp_path / "DIR" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    monkeypatch.chdir(tmp_path)
    found, names = blocks(path, "python"), {"__name__": "page"}
    assert found
    for text in found:
        exec(compile(text, named(path), "exec"), names)


def test_readme_is_short_and_begins_as_ever():
    text = (pages.ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    assert [block.strip() for block in blocks(pages.ROOT / "README.md", "")][:2] == [
        "pip install -e . && python -m kvjax.generate",
        "pip install -e '.[test]' && pytest",
    ]
