"""Read a model from whatever form its checkpoint has."""

from collections.abc import Collection
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from kvjax.checkpoint import hf, keep_gate, orbax
from kvjax.errors import InputError
from kvjax.models.decoder import Decoder, native_dtype
from kvjax.parallel.mesh import Size
from kvjax.policies.budgets import profile
from kvjax.spec import DTYPES


def load_model(
    name: str,
    dtype: DTypeLike | None = None,
    ignore: Collection[str] = (),
    size: Size | None = None,
    weights: str | None = None,
) -> tuple[Decoder, Path]:
    """A decoder and the directory, or the GGUF file, that its tokenizer and configuration are in.

    Args:
      name: a converted directory, a Hugging Face directory, a GGUF file, or a hub id; see `hf.resolve`.
      dtype: dtype of weights and activations; None = `native_dtype`.
      ignore: fields of `config.json` to treat as absent; a converted directory remembers those it was made with.
      size: of the mesh to put it on; None = one device.
      weights: int8 or int4, what matrices are encoded in as they are read; None = as they are.
    """
    wanted = native_dtype() if dtype is None else _floating(dtype)
    path = Path(name)
    if orbax.is_orbax(path):
        decoder = orbax.load(path, wanted, ignore, size, weights)
    else:
        path = hf.resolve(name)
        decoder = hf.load(path, wanted, ignore, size=size, quantize=weights)
    decoder.spec = profile.noted(decoder.spec, path)
    return keep_gate.noted(decoder, path), path


def _floating(dtype: DTypeLike) -> DTypeLike:
    try:
        if jnp.dtype(dtype).name in DTYPES:
            return dtype
    except TypeError:  # what NumPy does not know
        pass
    raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
