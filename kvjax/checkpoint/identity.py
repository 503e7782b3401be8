"""Which model a checkpoint holds, so that results and caches of one are not taken for those of another."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.checkpoint import digest, hf, orbax
from kvjax.errors import InputError
from kvjax.models import small_files
from kvjax.models.decoder import Decoder

SAMPLE = 1024


def fingerprint(directory: Path) -> str:
    """A name for the model that a checkpoint holds: 32 hexadecimal digits, equal for equal ones, wherever they are.

    Every weight counts, and everything in `config.json`; what a conversion made of the model counts, too, but not the
    files that Orbax cuts it into. Tokenizer and generation settings do not count.

    Args:
      directory: in the Hugging Face layout, or converted; or a GGUF file.

    Cost: reads all weights once. Hugging Face files are hashed as they are, in a constant amount of memory, at the
      speed of the disk or else at 6 GB/s; of a converted checkpoint Orbax reads a part at a time, at 0.7 GB/s.
    """
    content = _converted(directory) if orbax.is_orbax(directory) else _files(directory)
    described = [small_files.config(directory), content]
    return digest.of_bytes(json.dumps(described, sort_keys=True).encode())


def of_model(decoder: Decoder) -> str:
    """A name for a model in memory, in the dtype that it computes in: 32 hexadecimal digits.

    Its shape counts, and of each parameter up to `SAMPLE` numbers spread over it: no two checkpoints that were trained
    agree in these.
    """
    sample = lambda x: np.asarray(x.reshape(-1)[:: max(1, x.size // SAMPLE)])
    found = {name: [x.dtype.name, list(x.shape), digest.of_array(sample(x))] for name, x in hf.parameters(decoder)}
    spec = dataclasses.replace(decoder.spec, profile=None)  # a profile makes no other model
    return digest.of_bytes(json.dumps([repr(spec), found], sort_keys=True).encode())


def _files(directory: Path) -> list[Any]:
    files = sorted({stored.file for stored in hf.headers(directory).values()})
    try:
        return [[file.name, digest.of_file(file)] for file in files]
    except OSError as error:
        raise InputError(f"{directory}: its weights cannot be read ({error.strerror or error})") from error


def _converted(directory: Path) -> list[Any]:
    arrays = {
        target: [array.dtype.name, array.shape, digest.of_array(array)]
        for _, part in orbax.read_parts(directory)
        for target, array in part.items()
    }
    about = orbax.read_about(directory)
    return [{key: about[key] for key in orbax.CHANGES if key in about}, arrays]
