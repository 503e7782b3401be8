"""Attention over prompts on GPUs: cuDNN's fused kernel, through `jax.nn.dot_product_attention`."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

WIDEST = 256  # numbers of a head


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    length: Int[Array, " B"],
    *,
    scale: float | None = None,
    cap: float | None = None,
    window: int | None = None,
    implementation: str = "cudnn",
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Causal attention: the contract of `reference.attention`.

    Prompts are padded on the right, so that no query of a prompt looks at padding and `length` is not needed.

    Args:
      implementation: of `jax.nn.dot_product_attention`; another than cuDNN's for tests.

    Differs: log-sum-exps come in the dtype of q, as that function returns them: a query's share of a score is off by up
      to 2^-9 of its log-sum-exp, which is what rounding its logits costs as well.
    """
    del length
    if q.dtype not in (jnp.bfloat16, jnp.float16) and implementation == "cudnn":
        raise NotImplementedError(f"cuDNN attends in 16 bits, these are {q.dtype}")
    if q.shape[-1] > WIDEST or q.shape[-1] % 8:
        raise NotImplementedError(f"cuDNN takes heads of up to {WIDEST} numbers in eights, these have {q.shape[-1]}")
    if cap is not None:
        raise NotImplementedError("cuDNN has no soft cap of logits")
    before = None if window is None else (window - 1, 0)
    try:
        with jax.numpy_dtype_promotion("standard"):  # it mixes dtypes
            out, lse = jax.nn.dot_product_attention(
                q, k, v, scale=scale, is_causal=True, local_window_size=before, return_residual=True,
                implementation=implementation,  # pyright: ignore
            )  # fmt: skip
    except RuntimeError as error:  # as on a machine that plans for a GPU and has none
        raise NotImplementedError(f"JAX says: {error}") from None
    return out, jnp.moveaxis(lse, 1, 2).astype(jnp.float32)
