"""What the devices of a mesh tell each other while they run a program; on one device, nothing.

The axes of a mesh are those of `kvjax.parallel.mesh`, which runs the programs. Results are the same on all devices of
an axis.
"""

import contextlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

DATA, HEADS, COPIES = "data", "heads", "copies"
MODEL = (HEADS, COPIES)

Axes = str | tuple[str, ...]


def count(axes: Axes) -> int:
    """Devices that a program is split over along some axes; 1 outside of one."""
    return jax.lax.axis_size(axes) if _split(axes) else 1


def add(x: Array, axes: Axes) -> Array:
    """The sum over devices."""
    return jax.lax.psum(x, axes) if _split(axes) else x


def mean(x: Array, axis: int) -> Array:
    """The mean over an axis of heads, those of all devices: they have equally many."""
    here = x.mean(axis=axis)
    return jax.lax.pmean(here, HEADS) if _split(HEADS) else here


def gather(x: Array, axis: int, axes: Axes = HEADS) -> Array:
    """An axis with the entries of all devices."""
    return jax.lax.all_gather(x, axes, axis=axis, tiled=True) if _split(axes) else x


def own(x: Array, axis: int, axes: Axes = HEADS) -> Array:
    """Of an axis with the entries of all devices, this device's: what `gather` put together."""
    if not _split(axes):
        return x
    size = x.shape[axis] // count(axes)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * size, size, axis)


def look_up(
    take: Callable[[Int[Array, "*b"]], Float[Array, "*b D"]], rows: int, index: Int[Array, "*b"], size: int
) -> Float[Array, "*b D"]:
    """Rows of a table of `size` rows, which are all here or spread over the model's devices.

    Args:
      take: those of the `rows` that are here.
      rows: how many that are.
      index: which ones of all.
      size: of the table.
    """
    if rows == size:
        return take(index)
    here = index - jax.lax.axis_index(MODEL) * rows
    found = jnp.where(((here >= 0) & (here < rows))[..., None], take(jnp.clip(here, 0, rows - 1)), 0)
    return add(found, MODEL)


@contextlib.contextmanager
def on_the_host() -> Iterator[None]:
    """Compute with known numbers at once, also inside a program that is being traced."""
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())), jax.ensure_compile_time_eval():
        yield


def _split(axes: Axes) -> bool:
    """Whether this is a program that runs on devices of these axes."""
    names = (axes,) if isinstance(axes, str) else axes
    return bool(names) and set(names) <= set(jax.sharding.get_abstract_mesh().manual_axes)
