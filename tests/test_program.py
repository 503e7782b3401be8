"""`kvjax COMMAND` is `python -m kvjax.COMMAND`, under its own name."""

import re
import runpy
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest

from kvjax.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
SCRIPT = "import sys; from {} import {} as main; sys.argv[0] = '/usr/bin/kvjax'; sys.exit(main())"  # as pip writes it


def script() -> list[str]:
    """The command line of the installed program."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    return [sys.executable, "-c", SCRIPT.format(*scripts["kvjax"].split(":"))]


def run(*line: str) -> tuple[int, str, str]:
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("line", [[], ["--help"], ["-h"]], ids=str)
def test_it_lists_its_commands(line: list[str]) -> None:
    status, out, error = run(sys.executable, "-m", "kvjax", *line)
    assert (status, error) == (0, "") and re.findall(r"^  (\w+) +\w", out, re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_the_same_program(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its help, but for the name; `bench` without a command names no program."""
    monkeypatch.setenv("COLUMNS", "80")
    line = ["decode", "--help"] if name == "bench" else ["--help"]
    status, out, error = run(*script(), name, *line)
    called, alone = f"kvjax {name}", f"kvjax.{name}"
    assert (status, error) == (0, "") and out.startswith(f"usage: {called} ") and alone not in out.split("\n\n")[0]
    monkeypatch.setattr(sys, "argv", ["", *line])
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning), pytest.raises(SystemExit) as end:
        runpy.run_module(alone, run_name="__main__")  # `python -m`; it warns of what is imported already
    assert end.value.code == 0 and out.replace(called, alone) == capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["genrate"], "kvjax: error: no command 'genrate': choose from generate, chat, serve, convert, "),
        (["generate", "--bad"], "kvjax generate: error: unrecognized arguments: --bad"),
        (["generate", "--method", "x", "--prompt", "a"], "kvjax generate: error: unknown method 'x': choose from "),
        (["evaluate", "report", "/nowhere"], "kvjax evaluate: error: "),
    ],
    ids=str,
)
def test_mistakes_are_one_line(line: list[str], message: str) -> None:
    for program in (script(), [sys.executable, "-m", "kvjax"]):
        status, out, error = run(*program, *line)
        assert (status, out, error.count("\n")) == (2, "", 1) and error.startswith(message)


def test_it_generates() -> None:
    line = ["--prompt-tokens", "1,2,3", "--max-new-tokens", "2", "--no-stream"]
    status, out, _ = run(*script(), "generate", *line)
    assert status == 0 and out.splitlines()[0] == run(sys.executable, "-m", "kvjax.generate", *line)[1].splitlines()[0]
