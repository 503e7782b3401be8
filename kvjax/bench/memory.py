"""How many sequences fit into a device's memory, counted in bytes before anything is allocated."""

import re

import jax
import jax.numpy as jnp

from kvjax import decode
from kvjax.cache.policy import Recipe
from kvjax.errors import InputError
from kvjax.generation import Model
from kvjax.plan import plan
from kvjax.spec import ModelSpec

USABLE = 0.95  # of the memory: programs and what takes bandwidth's measure need some
MOST = 4096  # sequences
BLOCK = 512  # tokens of a block of attention over a prompt
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def read_bytes(text: str) -> int:
    """A size as people write it.

    >>> read_bytes("1.5GB"), read_bytes("80GiB")
    (1500000000, 85899345920)
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if found is None or found[2] not in UNITS:
        raise InputError(f"--memory {text!r} is not a size such as 16GB or 80GiB")
    return int(float(found[1]) * UNITS[found[2]])


def of_device(given: str | None) -> int:
    """Bytes of memory, as given or as the device says."""
    if given is not None:
        return read_bytes(given)
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        raise InputError(f"--batch max: {jax.default_backend()} does not say what memory it has: give --memory 16GB")
    return int(stats["bytes_limit"])


def needed(model: Model, recipe: Recipe, context: int, new: int, batch: int, reader: ModelSpec) -> int:
    """Bytes of weights, cache, and the layer of the prompts that is being read, by a model of the shape `reader`."""
    weights = sum(x.nbytes for x in jax.tree.leaves(model.decoder))
    cache = plan(model, recipe, context, new, batch).bytes["total"]
    return weights + cache + working(reader, model.decoder.dtype, batch, decode.padded_length(context))


def working(spec: ModelSpec, dtype: jnp.dtype, batch: int, padded: int) -> int:
    """Bytes that one layer of the prompts holds while it runs, about: vectors, logits of blocks, scores."""
    heads = spec.num_heads + 2 * spec.num_kv_heads
    vectors = 4 * spec.embed_dim + 3 * spec.mlp_dim + 2 * (heads + spec.num_heads) * spec.head_dim
    logits = 4 * 3 * batch * spec.num_heads * min(BLOCK, padded) ** 2
    return batch * padded * (vectors * dtype.itemsize + 2 * 4 * spec.num_heads) + logits


def largest_batch(model: Model, recipe: Recipe, context: int, new: int, limit: int, reader: ModelSpec) -> int:
    """The most sequences that fit.

    Args:
      model, recipe: what decodes.
      context, new: tokens of each sequence.
      limit: bytes of memory.
      reader: of what reads the prompts.
    """
    fits = lambda batch: needed(model, recipe, context, new, batch, reader) <= USABLE * limit
    if not fits(1):
        least = needed(model, recipe, context, new, 1, reader)
        raise InputError(
            f"{recipe.name}: one sequence of {context} tokens needs {least / 1e9:.2f} GB with the weights, "
            f"of {limit / 1e9:.2f} GB: give a shorter --contexts"
        )
    low, high = 1, MOST
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
