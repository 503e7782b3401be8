"""Starting costs little: what a command or a program does not need is not imported."""

import subprocess
import sys

import pytest

import kvjax

COMMANDS = ("generate", "serve", "convert", "evaluate", "inspect", "plan", "bench", "retrofit")
OPTIONAL = {"orbax", "scipy", "huggingface_hub", "jinja2", "matplotlib", "starlette", "uvicorn"}
OPTIONAL |= {"jax.experimental.pallas"}
MODELS = {"flax", "optax", "tokenizers", "safetensors"}  # what a model is read with
RUN = """if True:
    import runpy, sys
    sys.argv = sys.argv[1:]
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code or 0
    else:
        status = 0
    print("status", status, "modules", *sys.modules)
"""


def imported(*line: str) -> tuple[int, set[str]]:
    """Exit status and imported modules of a program."""
    done = subprocess.run([sys.executable, "-c", *line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, status, _, *modules = done.stdout.splitlines()[-1].split(" ")
    return int(status), set(modules)


def test_import_kvjax_imports_nothing_else() -> None:
    program = "import sys, kvjax; kvjax.__all__; dir(kvjax); print('status', 0, 'modules', *sys.modules)"
    assert not {"jax", "numpy"} & imported(program)[1]


def test_methods_need_no_models() -> None:
    program = "import sys, kvjax; kvjax.METHODS; print('status', 0, 'modules', *sys.modules)"
    modules = imported(program)[1]
    assert "jax" in modules and not (MODELS | OPTIONAL | {"rich"}) & modules


@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_nothing_that_only_some_runs_need(command: str) -> None:
    status, modules = imported(RUN, f"kvjax.{command}", "--help")
    assert status == 0 and not OPTIONAL & modules


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (["--help"], 0),
        (["--list-methods"], 0),
        (["--max-tokens", "3"], 2),
        (["--method", "snapvk", "--prompt", "a"], 2),
        (["--method", "h2o", "--set", "recnt=1", "--prompt", "a"], 2),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_generate_reads_its_flags_before_it_imports_models(line: list[str], status: int) -> None:
    found, modules = imported(RUN, "kvjax.generate", *line)
    assert found == status and not (MODELS | OPTIONAL) & modules


def test_public_names_are_there() -> None:
    assert all(hasattr(kvjax, name) for name in kvjax.__all__) and set(kvjax.__all__) <= set(dir(kvjax))
    assert {*kvjax._HOMES, "methods"} == set(kvjax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        kvjax.laod  # noqa: B018
