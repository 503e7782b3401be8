"""Low-rank projections of keys and values: the two factors of each.

A layer's key projection is a matrix [D K*H], as is its value projection. Its columns are split into C groups of n
neighbouring channels: the heads that share a latent, R numbers of which are cached per token. All factors come from a
group's moments [n n]: those of its columns, `W^T W`, or those of its outputs on calibration texts, `W^T X^T X W`.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Float64

from kvjax.errors import InputError


def gram(kernel: Float[np.ndarray, "D KH"], n: int) -> Float64[np.ndarray, "C n n"]:
    """The moments `W^T W` of each group of n columns."""
    groups = np.moveaxis(kernel.astype(np.float64).reshape(len(kernel), -1, n), 1, 0)
    return groups.mT @ groups


def spectrum(moments: Float[np.ndarray, "C n n"]) -> Float64[np.ndarray, "C n"]:
    """Singular values of each group's columns, or of its outputs, descending.

    Those below about 1e-8 of the largest are lost in rounding.
    """
    scale, values = _solve("eigvalsh", moments)
    return np.sqrt(np.maximum(values[:, ::-1], 0)) * math.sqrt(scale)


def factors(
    kernel: Float[np.ndarray, "D KH"], moments: Float[np.ndarray, "C n n"], rank: int, hadamard: bool = False
) -> tuple[Float32[np.ndarray, "D C R"], Float32[np.ndarray, "C R n"]]:
    """`down` makes a group's latent, `up` makes its channels from that: `W = down up`, the best of this rank.

    With E the leading eigenvectors of a group's moments, `down = W E` and `up = E^T`: the moments of columns give the
    truncated SVD of W, those of outputs the least error of the outputs `X W`. The rows of `up` are orthonormal, so the
    latent is as large as the keys or values that it stands for, its channels in descending order of size.

    Args:
      kernel: the projection.
      moments: of its groups, from `gram` or from calibration.
      rank: R, from 1 to n.
      hadamard: turn the latent, so that its channels are of like size and lose less in a low-bit store.

    Source: LoRC (arXiv 2410.03111), the SVD of the weights of all heads together; Palu (arXiv 2407.21118) for groups of
      heads and for the Hadamard matrix (here of any size, see `_mixing`); SVD-LLM (arXiv 2403.07378) for the error of
      the outputs.
    Differs: eigenvectors of n x n moments instead of an SVD, which gives the same factors; for outputs the same optimum
      as SVD-LLM's whitening, without a Cholesky factor or its inverse.
    Cost: O(C n^3) for the eigenvectors, in float64 on a GPU or else on the host, and O(D n C R); on one CPU core 0.3 s
      for 8192 x 1024, and 0.2 s for `gram`.
    """
    n = moments.shape[-1]
    if not 1 <= rank <= n:
        raise InputError(f"rank {rank} is not from 1 to {n}, the channels of a group")
    _, (_, vectors) = _solve("eigh", moments)
    basis = vectors[..., : -rank - 1 : -1]
    if hadamard:
        basis = basis @ _mixing(rank)
    basis = basis.astype(np.float32)
    groups = np.moveaxis(kernel.astype(np.float32).reshape(len(kernel), -1, n), 1, 0)
    return np.ascontiguousarray(np.moveaxis(groups @ basis, 0, 1)), np.ascontiguousarray(basis.mT)


def _solve(solver: str, moments: Float[np.ndarray, "C n n"]) -> tuple[float, Any]:
    """A scale, and what `linalg.eigh` or `linalg.eigvalsh` makes of the moments divided by it, as numpy arrays."""
    if not np.isfinite(moments).all():
        raise InputError("a projection, or its outputs on the calibration texts, holds NaN or infinity")
    scale = float(np.abs(moments).max()) or 1.0
    scaled = moments / scale
    if jax.default_backend() != "gpu":  # TPUs have no float64; on CPUs XLA takes three times as long
        return scale, getattr(np.linalg, solver)(scaled)
    with jax.enable_x64(True):
        return scale, jax.tree.map(np.asarray, getattr(jnp.linalg, solver)(jnp.asarray(scaled, jnp.float64)))


def _mixing(rank: int) -> Float64[np.ndarray, "R R"]:
    """An orthogonal matrix that mixes all channels, none of its entries above sqrt(2 / rank).

    Hadamard's of the largest power of two that divides the rank, times Hartley's of the odd rest.

    Source: Hartley, 1942: cos + sin of what a Fourier transform has as the angle of a complex exponential.
    """
    power = rank & -rank
    odd = rank // power
    angle = np.outer(np.arange(odd), np.arange(odd)) % odd * (2 * math.pi / odd)
    doubled = [np.array([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2)] * (power.bit_length() - 1)
    return functools.reduce(np.kron, [*doubled, (np.cos(angle) + np.sin(angle)) / math.sqrt(odd)])
