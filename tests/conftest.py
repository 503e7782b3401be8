"""Shapes are checked where beartype is installed; dtypes never promote silently."""

import importlib.util

import jax
import jaxtyping

if importlib.util.find_spec("beartype"):
    _hook = jaxtyping.install_import_hook(["kvjax", "pallas_kernels"], "beartype.beartype")
    _hook.__enter__()

jax.config.update("jax_numpy_dtype_promotion", "strict")
