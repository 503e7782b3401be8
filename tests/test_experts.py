"""Experts: grouped in blocks they are what each token's own experts make of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax.models import experts
from kvjax.models.decoder import Layer
from kvjax.spec import ExpertSpec, ModelSpec

SPECS = {
    "normed": ExpertSpec(5, 2),
    "of all": ExpertSpec(3, 3, normed=False),
    "clamped": ExpertSpec(4, 1, bias=True, limit=0.5, slope=1.7),
}


def one_by_one(mlp: experts.Experts, x: np.ndarray) -> np.ndarray:
    """In float64, in loops."""
    of, array = mlp.spec, lambda p: np.asarray(p[...], np.float64)
    out = np.zeros(x.shape)
    for row, token in enumerate(x):
        logits = token @ array(mlp.router.kernel) + (array(mlp.router.bias) if of.bias else 0)
        chosen = np.argsort(-logits, kind="stable")[: of.chosen]
        weight = np.exp(logits[chosen]) / np.exp(logits[chosen] if of.normed else logits).sum()
        for w, e in zip(weight, chosen, strict=True):
            linear = lambda y, stack, e=e: y @ array(stack.kernels)[e] + (array(stack.biases)[e] if of.bias else 0)
            gate, up = linear(token, mlp.gate), linear(token, mlp.up)
            if of.limit is not None:
                gate, up = np.minimum(gate, of.limit), np.clip(up, -of.limit, of.limit) + 1
            out[row] += w * linear(gate / (1 + np.exp(-of.slope * gate)) * up, mlp.down)
    return out


@pytest.mark.parametrize("name", SPECS)
def test_blocks_are_each_tokens_own_experts(name):
    spec = ModelSpec(10, 8, 1, 1, 1, 8, 12, 64, experts=SPECS[name])
    mlp = Layer(spec, 0, jnp.float32, nnx.Rngs(1)).mlp
    assert isinstance(mlp, experts.Experts)
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)
    mlp = jax.tree.map(draw, mlp)
    run = jax.jit(lambda mlp, x: mlp(x))
    for n in (1, 3, 70):
        x = rng.normal(size=(n, 8)) + 3 * (n == 70)  # most of them to the same expert
        np.testing.assert_allclose(run(mlp, jnp.asarray(x, jnp.float32)), one_by_one(mlp, x), atol=2e-4, rtol=1e-4)


def test_blocks_need_no_more_memory_for_more_experts():
    def peak(count: int) -> int:
        run = lambda x, w, e: experts.in_blocks(lambda rows, i: rows @ w[i], x, e, count)
        shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)
        args = shape(512, 64), shape(count, 64, 64), shape(512, dtype=jnp.int32)
        return jax.jit(run).lower(*args).compile().memory_analysis().temp_size_in_bytes

    assert peak(64) < 2 * peak(8)
