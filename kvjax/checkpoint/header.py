"""What a tensor of a checkpoint is, before it is read."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

DTYPES = ("bfloat16", "float32")  # what converted weights can be


class Stored(NamedTuple):
    """Where a tensor is and what it is, from its file's header."""

    file: Path
    name: str  # in the file
    dtype: str  # as safetensors call it
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]  # raises `InputError` where the file has been damaged since
    others: tuple["Stored", ...] = ()  # tensors of the other experts, where each has one; of MXFP4, the scales
