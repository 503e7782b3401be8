"""Pallas' interpreter of TPU kernels at its strictest: reads beyond an array raise, what nobody wrote is nan."""

from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

STRICT = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")


def races_found() -> bool:
    """Whether a kernel since the last call raced with its copies; the interpreter itself only prints it."""
    races = interpreter.races
    pltpu.reset_tpu_interpret_mode_state()
    return races is not None and races.races_found
