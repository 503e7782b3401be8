"""Pallas' interpreter of TPU kernels at its strictest: reads beyond an array raise, what nobody wrote is nan."""

import dataclasses
from typing import Any

from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

# Where JAX can be told: a race raises by itself in the midst of a kernel, and here a test asks at its end.
_ASKED: dict[str, Any] = {x.name: "warn" for x in dataclasses.fields(pltpu.InterpretParams) if x.name == "on_race"}
STRICT = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan", **_ASKED)


def races_found() -> bool:
    """Whether a kernel since the last call raced with its copies; the interpreter itself only prints it."""
    races = interpreter.races
    pltpu.reset_tpu_interpret_mode_state()
    return races is not None and races.races_found
