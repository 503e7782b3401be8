"""Compiled programs are kept on disk, and whoever waits for one is told."""

import io
import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import compilation

GENERATE = ["-m", "kvjax.generate", "--prompt-tokens", "1,2,3", "--max-new-tokens", "2", "--json"]
ALL = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def run(*line: str, **settings: str) -> str:
    env = {key: value for key, value in os.environ.items() if "CACHE" not in key}
    done = subprocess.run([sys.executable, *line], env=env | settings, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_second_run_compiles_nothing(tmp_path: Path) -> None:
    programs = tmp_path / "kvjax" / "compiled"
    run(*GENERATE, XDG_CACHE_HOME=str(tmp_path), **ALL)
    first = {file.name for file in programs.glob("*-cache")}
    run(*GENERATE, XDG_CACHE_HOME=str(tmp_path), **ALL)
    assert len(first) > 5 and {file.name for file in programs.glob("*-cache")} == first


def test_it_can_be_turned_off_and_put_elsewhere(tmp_path: Path) -> None:
    program = "import jax, kvjax; kvjax.enable_compilation_cache(); jax.jit(lambda x: x + 1)(1)"
    run("-c", program, XDG_CACHE_HOME=str(tmp_path / "a"), JAX_ENABLE_COMPILATION_CACHE="false", **ALL)
    assert not (tmp_path / "a").exists()
    run("-c", program, XDG_CACHE_HOME=str(tmp_path / "a"), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "b"), **ALL)
    assert not (tmp_path / "a").exists() and list((tmp_path / "b").iterdir())


def test_it_counts_from_the_call_on(tmp_path: Path) -> None:
    """Also where JAX has compiled before, or kept programs elsewhere."""
    program = """if True:
        import sys, jax, kvjax
        jax.jit(lambda x: x + 1)(1)
        for factor, folder in enumerate(sys.argv[1:]):
            kvjax.enable_compilation_cache(folder)
            jax.jit(lambda x: x * (factor + 2))(1)
    """
    folders = [tmp_path / "a", tmp_path / "b"]
    run("-c", program, *map(str, folders), **ALL)
    assert all(list(folder.glob("jit__lambda*-cache")) for folder in folders)


def test_programs_are_forgotten_once_they_are_many() -> None:
    program = jax.jit(lambda x: x + 1)
    with compilation.few_programs(most=1) as forget:
        for size, kept in ((3, 1), (4, 0)):
            program(np.zeros(size, np.float32))
            forget()
            assert program._cache_size() == kept


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def compile_slowly(shown: io.StringIO, until: str) -> None:
    """Trace a program until something is shown."""

    def f(x: jax.Array) -> jax.Array:
        for _ in range(6000):
            if until in shown.getvalue():
                break
            time.sleep(0.01)
        return x + 1

    jax.jit(f)(jnp.zeros(3))


def test_a_terminal_is_told_once_while_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    monkeypatch.setattr(compilation, "PATIENCE", 0.01)
    with compilation.announced():
        compile_slowly(shown, "compiling ...\n")
        assert shown.getvalue() == "compiling ...\n"
        compile_slowly(shown, "")
    assert shown.getvalue() == "compiling ...\n"


def test_who_does_not_wait_long_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    monkeypatch.setattr(compilation, "PATIENCE", 1000.0)
    with compilation.announced():
        compile_slowly(shown, "")
    assert shown.getvalue() == ""


def test_short_waits_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    monkeypatch.setattr(compilation, "PATIENCE", 0.5)
    with compilation.announced():
        for _ in range(1000):
            jax.jit(lambda x: (time.sleep(0.01), x + 1)[1])(jnp.zeros(3))
            if shown.getvalue():
                break
    assert shown.getvalue() == "compiling ...\n"


def test_a_command_tells_a_terminal_and_no_pipe(tmp_path: Path) -> None:
    program = """if True:
        import sys
        from kvjax import compilation, generate
        from kvjax.cli import command
        compilation.PATIENCE = 0.01
        command.run("kvjax.generate", generate.main)
    """
    ours, theirs = pty.openpty()
    line = [sys.executable, "-c", program, *GENERATE[2:]]
    done = subprocess.run(
        line, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)}, stdout=subprocess.PIPE, stderr=theirs
    )
    os.close(theirs)
    assert done.returncode == 0 and len(json.loads(done.stdout)["sequences"]) == 1
    assert os.read(ours, 1000) == b"compiling ...\r\n"
    os.close(ours)
    run("-c", program, *GENERATE[2:], JAX_COMPILATION_CACHE_DIR=os.environ["JAX_COMPILATION_CACHE_DIR"])
