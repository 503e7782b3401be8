"""The kernels on a real GPU against the reference, at the sizes of Llama-3-8B: `pytest -m gpu -n 0`."""

import jax.numpy as jnp
import pytest

from kvjax.bench.cases import KERNELS
from kvjax.bench.kernels import checked
from kvjax.bench.shapes import STORES, Shape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("optimized"),
    pytest.mark.skipif("jax.default_backend() != 'gpu'", reason="needs a GPU that JAX sees"),
]


def agree(kernel: str, shape: Shape, store: str, dtype=jnp.bfloat16, tolerance: float = 2e-2) -> None:
    """Whether the GPU's kernel gives what the reference does, relative to the largest number."""
    (row,) = checked(KERNELS[kernel].make(shape, store, dtype), ["gpu"], dtype)
    assert "failed" not in row and row["off"] <= tolerance, row


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(("model", "context", "batch"), [("llama-3-8b", 32768, 2), ("qwen2-7b", 4096, 3)])
def test_decode_attention(model, context, batch, store):
    agree("decode_attention", Shape(model, context, batch), store)


@pytest.mark.parametrize("store", ["dense", "int8", "int4"])
def test_decode_attention_in_float32(store):
    agree("decode_attention", Shape("llama-3-8b", 4096, 1), store, jnp.float32, 1e-4)


@pytest.mark.parametrize("kernel", [name for name, kernel in KERNELS.items() if kernel.prompt])
@pytest.mark.parametrize("context", [8192, 5000])
def test_kernels_of_prompts(kernel, context):
    agree(kernel, Shape("llama-3-8b", context, 1), "")
