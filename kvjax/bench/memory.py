"""How many sequences fit into a device's memory, counted in bytes before anything is allocated."""

import jax

from kvjax.cli.command import read_bytes
from kvjax.errors import InputError
from kvjax.generation.model import Model
from kvjax.parallel.mesh import Size, size_of
from kvjax.plan import estimate, search
from kvjax.plan.settings import Setting
from kvjax.policies.base import Recipe
from kvjax.spec import ModelSpec

USABLE = 0.95  # of the memory: programs and what takes bandwidth's measure need some
MOST = 4096  # sequences


def of_device(given: str | None) -> int:
    """Bytes of memory, as given or as the device says."""
    if given is not None:
        return read_bytes(given, "--memory")
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        raise InputError(f"--batch max: {jax.default_backend()} does not say what memory it has: give --memory 16GB")
    return int(stats["bytes_limit"])


def setting(model: Model, recipe: Recipe, context: int, new: int, batch: int) -> Setting:
    """A generation as `kvjax.plan` describes it."""
    platform = "tpu" if jax.default_backend() == "tpu" else "gpu"
    devices = Size() if model.mesh is None else size_of(model.mesh)
    return Setting(model.spec, model.decoder.dtype.name, recipe, context, new, batch, platform, devices)


def needed(model: Model, recipe: Recipe, context: int, new: int, batch: int, reader: ModelSpec) -> int:
    """Bytes of weights, cache and temporaries, as `kvjax.plan` estimates them; `reader` reads the prompts."""
    planned = setting(model, recipe, context, new, batch)
    parts = estimate.estimate(planned)
    prefill = estimate.waiting(planned) + estimate.prefill_temporaries(planned._replace(spec=reader))
    return parts._replace(prefill=prefill).peak


def largest_batch(model: Model, recipe: Recipe, context: int, new: int, limit: int, reader: ModelSpec) -> int:
    """The most sequences that fit.

    Args:
      model, recipe: what decodes.
      context, new: tokens of each sequence.
      limit: bytes of memory.
      reader: of what reads the prompts.
    """
    needs = lambda batch: needed(model, recipe, context, new, batch, reader)
    found = search.largest(needs, int(USABLE * limit), MOST)
    if not found:
        raise InputError(
            f"{recipe.name}: one sequence of {context} tokens needs {needs(1) / 1e9:.2f} GB with the weights, "
            f"of {limit / 1e9:.2f} GB: give a shorter --contexts"
        )
    return found
