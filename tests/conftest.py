"""Shapes are checked where beartype is installed; dtypes never promote silently."""

import importlib.util

import jax
import jaxtyping
import pytest

if importlib.util.find_spec("beartype"):
    _hook = jaxtyping.install_import_hook(["kvjax", "pallas_kernels"], "beartype.beartype")
    _hook.__enter__()

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="module")
def quick_compilation():
    """For modules in which compiling takes most of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
