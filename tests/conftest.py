"""Dtypes never promote silently, random tests repeat their examples, KVJAX_TEST_SHAPES=1 checks shapes.

Compiling takes most of the time, so nothing is optimized, here and in the processes that tests start.
"""

import functools
import gc
import importlib.metadata
import json
import os
import re
import shutil
import tempfile
import threading
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes may share a GPU
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # a flag that XLA does not know ends the process
    _quick = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_quick}"
# Programs are kept for this session and its commands. Workers do not share: JAX writes programs in place.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="kvjax-programs-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import hypothesis
import jax
import jaxtyping
import pytest
from jax._src.interpreters import mlir
from safetensors.numpy import load_file, save_file

from tests.lib import strict

if os.environ.get("KVJAX_TEST_SHAPES"):  # in every function that is traced, which takes a tenth of the time
    from tests.lib import checker  # noqa: F401  # the hook finds it by its name

    _hook = jaxtyping.install_import_hook(["kvjax", "pallas_kernels"], "tests.lib.checker.checked")
    _hook.__enter__()
from kvjax import compilation
from kvjax.checkpoint import shipped

jax.config.update("jax_numpy_dtype_promotion", "strict")
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")
# JAX loads all of MLIR's dialects anew for each program, a third of what a small one takes: those of a test share them.
_dialects = functools.lru_cache(maxsize=8)(lambda thread, make=mlir.make_ir_context: make())
mlir.make_ir_context = lambda: _dialects(threading.get_ident())
# In one process; each takes some thirty mappings of memory, of which the system allows 65,530.
_programs = compilation.few_programs(most=1000)
_forget_if_many = _programs.__enter__()


def pytest_collection_finish():
    """What is imported stays; tracing makes so many objects that looking for garbage took a fifteenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def pytest_unconfigure():
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(autouse=True)
def no_kernel_races():
    yield
    assert not strict.races_found()


@pytest.fixture
def optimized():
    """For tests of what the compiler makes of a program, or of programs as they are used."""


@pytest.fixture(autouse=True)
def forget_programs(request: pytest.FixtureRequest):
    """Tests share programs, where they are compiled alike: JAX does not look at how they were."""
    quickly = "optimized" not in request.fixturenames
    if jax.config.values["jax_disable_most_optimizations"] != quickly:
        jax.config.update("jax_disable_most_optimizations", quickly)
        jax.clear_caches()
    _forget_if_many()
    _dialects.cache_clear()


@pytest.fixture(scope="session")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's first two layers, which compile in a third of the time."""
    folder, source = tmp_path_factory.mktemp("shallow"), shipped.directory()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, folder)
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    weights = load_file(source / "model.safetensors")
    first = {name: x for name, x in weights.items() if not re.search(r"layers\.[2-5]\.", name)}
    save_file(first, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def shallow_demo(shallow: Path):
    """The demo model has two layers, for tests to which its answers do not matter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shipped, "directory", lambda: shallow)
        yield


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What the hub was asked for; it gives the test's folder."""
    found = {}

    def download(name, **options):
        found.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return found
