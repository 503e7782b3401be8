"""Starting costs little: what a command or a program does not need is not imported.

`import kvjax` and a command's help take at most 1.3 times as long as `import jax`. Of all that could be imported only
what `OPTIONAL` and `MODELS` name weighs, so that no test has to measure time.
"""

import json
import subprocess
import sys

import pytest

import kvjax
from kvjax.__main__ import COMMANDS
from kvjax.bench.__main__ import COMMANDS as BENCH

OPTIONAL = {
    "orbax",
    "scipy",
    "torch",
    "huggingface_hub",
    "jinja2",
    "matplotlib",
    "transformers",
    "starlette",
    "uvicorn",
}
OPTIONAL |= {"jax.experimental.pallas"}
MODELS = {"flax", "optax", "tokenizers", "safetensors"}  # what a model is read with
RUN = """if True:
    import json, runpy, sys
    found, seen = [], set()
    for line in json.loads(sys.argv[1]):
        sys.argv = [f"kvjax.{line.split()[0]}", *line.split()[1:]]
        try:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code or 0
        else:
            status = 0
        found.append([line, status, sorted(sys.modules.keys() - seen)])
        seen |= sys.modules.keys()
    print(json.dumps(found))
"""
HELP = (
    *(f"{command} --help" for command in COMMANDS),
    *(f"bench {command} --help" for command in BENCH),
    "inspect lorc --help",
    "evaluate report --help",
    "generate --list-methods",
    "evaluate --list-tasks",
)
WRONG = (
    "generate --max-tokens 3",
    "generate --method snapvk --prompt a",
    "generate --method h2o --set recnt=1 --prompt a",
    "generate --prompt-file /not/there",
    "chat",
    "chat --model demo --config /not/there",
    "serve --sets 3",
    "convert demo",
    "convert demo out --lorc keep=200%",
    "calibrate demo /not/there/out",
    "calibrate demo out --method snapkv",
    "evaluate --tasks nothing --out out",
    "evaluate --tasks facts --out out --methods snapvk",
    "evaluate --tasks facts --out out --lengths many",
    "evaluate --tasks facts --out /dev/null",
    "inspect --layers 3",
    "inspect --dry-run --budget 200%",
    "inspect lorc --lorc much",
    "plan --model llama-3-8b --chip v5",
    "plan --model llama-3-8b --chip v5e --batches 3",
    "bench decod",
    "bench --metods full",
    "bench decode --contexts long",
    "bench decode --methods snapvk:20%",
    "bench decode --against rival",
    "bench decode --batch many",
    "bench prefill --batch 0",
    "bench kernels --stores int5",
    "bench kernels --shapes llama-9:64",
    "bench serve --pool 0",
    "bench convert --dtypes int8",
    "bench tune --implementation fast",
    "retrofit --out out",
    "retrofit --out out --data text --cr 0",
)


def output(*line: str) -> str:
    """What a program prints last."""
    done = subprocess.run([sys.executable, "-c", *line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def imported(program: str) -> set[str]:
    """The modules that a program imports."""
    return set(output(f"import sys; {program}; print(*sys.modules)").split())


def test_import_kvjax_imports_nothing_else() -> None:
    assert not {"jax", "numpy"} & imported("import kvjax; kvjax.__all__; dir(kvjax)")


def test_methods_need_no_models() -> None:
    modules = imported("import kvjax; kvjax.METHODS")
    assert "jax" in modules and not (MODELS | OPTIONAL | {"rich"}) & modules


@pytest.mark.parametrize(("lines", "status"), [(HELP, 0), (WRONG, 2)], ids=["help", "wrong"])
def test_flags_are_read_before_models_are_imported(lines: tuple[str, ...], status: int) -> None:
    found = json.loads(output(RUN, json.dumps(lines)))
    assert [line for line, *_ in found] == [*lines]
    for line, ended, modules in found:
        assert (ended, (MODELS | OPTIONAL) & set(modules)) == (status, set()), line


def test_public_names_are_there() -> None:
    assert all(hasattr(kvjax, name) for name in kvjax.__all__) and set(kvjax.__all__) <= set(dir(kvjax))
    assert {*kvjax._HOMES, "methods"} == set(kvjax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        kvjax.laod  # noqa: B018
