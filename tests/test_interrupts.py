"""Ctrl-C: a command is gone at once, whatever it does, says nothing, and leaves nothing half-written."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COPY = ["-m", "kvjax.convert", str(Path(__file__).parents[1] / "kvjax" / "demo")]


@pytest.fixture(autouse=True)
def listening():
    """Ctrl-C is not ignored, as it is by what runs in the background of a shell, and by its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(*line: str, cache: Path) -> subprocess.Popen[bytes]:
    """A command whose compiled programs are not there yet."""
    kept = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    env = {**kept, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(cache)}
    return subprocess.Popen([sys.executable, *line], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def interrupt(process: subprocess.Popen[bytes]) -> bytes:
    """Press Ctrl-C; what the command says to it, before what it does could have ended by itself."""
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert time.monotonic() - began < DEAF
    return error


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.002)


COMMANDS = {
    "generate": ["-m", "kvjax.generate", "--prompt-tokens", "1,2,3"],
    "kvjax generate": ["-m", "kvjax", "generate", "--prompt-tokens", "1,2,3"],
    "evaluate": ["-m", "kvjax.evaluate", "--tasks", "lines", "--lengths", "256", "--samples", "4", "--out", "OUT"],
    "convert": [*COPY, "OUT"],
    "retrofit": [
        *("-m", "kvjax.retrofit", "--data", __file__, "--length", "64"),
        *("--batch", "2", "--micro-batch", "2", "--out", "OUT"),
    ],
}
MOMENTS = (0.5, 1, 2, 4, 8, 12, 16)  # seconds
DEAF = 10  # seconds: a command that waits for the compiler takes 25, one that listens a tenth of one
ALL = [pytest.param(*(name, at), marks=pytest.mark.slow) for name in COMMANDS for at in MOMENTS]


@pytest.mark.parametrize(("name", "at"), [("generate", 0.2), ("generate", 5), ("kvjax generate", 5), *ALL])
def test_a_command_ends_at_any_moment(name, at, tmp_path):
    line = [str(tmp_path / "out") if x == "OUT" else x for x in COMMANDS[name]]
    process = start(*line, cache=tmp_path)
    try:
        process.wait(at)
    except subprocess.TimeoutExpired:
        assert interrupt(process) == b""
    process.communicate()
    left = {path.name for path in tmp_path.iterdir()} - {"out", "kvjax"}
    assert not left and (name != "convert" or process.returncode == 0 or not (tmp_path / "out").exists())


def test_what_is_half_written_goes_too(tmp_path):
    """While Orbax's threads write: they must not make it again."""
    process = start(*COPY, str(tmp_path / "out"), cache=tmp_path)
    wait_for(tmp_path / ".out.partial" / "stage" / "params", process)
    assert interrupt(process) == b""
    assert list(tmp_path.iterdir()) == []


def test_a_compiled_program_that_may_be_half_written_goes_too(tmp_path):
    programs = tmp_path / "kvjax" / "compiled"
    programs.mkdir(parents=True)
    (programs / "whole").touch()
    os.utime(programs / "whole", (0, 0))
    process = start(*COMMANDS["generate"], cache=tmp_path)
    while len(os.listdir(programs)) == 1:
        assert process.poll() is None
        time.sleep(0.002)
    interrupt(process)
    assert os.listdir(programs) == ["whole"]


def test_programs_that_import_kvjax_keep_what_python_does(tmp_path):
    program = f"""if True:
        import time, kvjax, pathlib, signal
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        try:
            pathlib.Path({str(tmp_path / "there")!r}).touch()
            time.sleep(60)
        except KeyboardInterrupt:
            exit(7)
    """
    process = start("-c", program, cache=tmp_path)
    wait_for(tmp_path / "there", process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 7


def test_a_command_that_runs_where_ctrl_c_is_ignored_goes_on(tmp_path):
    """As in the background of a shell script."""
    program = """if True:
        import os, signal, sys
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.execv(sys.executable, [sys.executable, "-m", "kvjax.generate", "--list-methods"])
    """
    process = start("-c", program, cache=tmp_path)
    time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    assert b"streaming_llm" in process.communicate()[0] and process.returncode == 0


def test_forked_processes_keep_what_python_does():
    program = """if True:
        import os, signal, sys, time
        sys.argv, sys.orig_argv = ["-m"], ["python", "-m", "kvjax.generate"]
        from kvjax import interrupts
        assert signal.getsignal(signal.SIGINT) is interrupts._park
        child = os.fork()
        if not child:
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and signal.set_wakeup_fd(-1) == -1
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    """
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 130
