"""What a retrofit is asked for."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from kvjax.attention import dispatch
from kvjax.errors import InputError
from kvjax.retrofit.schedule import Schedule
from kvjax.spec import GateSpec
from pallas_kernels.implementation import Implementation


@dataclasses.dataclass(frozen=True)
class Options:
    """How a model is retrofitted; the defaults are those of DMC's paper where it has any."""

    model: str | None
    files: tuple[Path, ...]
    gate: GateSpec  # its rate is the target
    schedule: Schedule
    length: int = 4096  # tokens of a sequence
    rows: int = 1024  # sequences of a step
    together: int = 4  # of them, that are computed at once
    distill: bool = False
    teacher: str | None = None  # what to be like; None = the model
    dtype: str = "float32"  # of matrix products
    temperature: float = 0.1
    penalty: float = 1.0  # weight
    weight_decay: float = 0.1
    clip: float = 1.0  # largest norm of a step's gradient
    remat: bool = True
    kernels: Implementation | None = "xla"
    seed: int = 0
    export: tuple[float, ...] = ()  # rates at which a checkpoint is written on the way
    log_every: int = 10
    save_every: int = 100
    keep: int = 2  # checkpoints to continue from
    minutes: float = float("inf")
    mesh: str | None = None  # devices, as `kvjax.load` takes them
    ignore: tuple[str, ...] = ()

    def identity(self) -> dict[str, Any]:
        """What a run that is continued must agree on, as JSON has it."""
        free = ("files", "keep", "minutes", "save_every", "log_every", "remat", "kernels", "export", "mesh")
        found = {key: value for key, value in dataclasses.asdict(self).items() if key not in free}
        return json.loads(json.dumps(found | {"schedule": self.schedule._asdict(), "model": str(self.model)}))

    def check(self) -> None:
        """Raise `InputError` for what is no such number or does not go together, before anything is loaded."""
        least = {"length": (self.length, 2), "batch": (self.rows, 1), "micro-batch": (self.together, 1)}
        least |= {"save-every": (self.save_every, 1), "log-every": (self.log_every, 1), "keep": (self.keep, 1)}
        least |= {"seed": (self.seed, 0), "window": (self.gate.window, 0), "fade-steps": (self.schedule.fade, 0)}
        least |= {"ramp-steps": (self.schedule.ramp, 0), "final-steps": (self.schedule.finish, 0)}
        for name, (value, smallest) in least.items():
            if value < smallest:
                raise InputError(f"--{name} {value} is less than {smallest}")
        positive = {"learning-rate": self.schedule.first_learning_rate, "temperature": self.temperature}
        positive |= {"final-learning-rate": self.schedule.last_learning_rate, "clip": self.clip}
        for name, value in (positive | {"scale": self.gate.scale, "penalty": self.penalty}).items():
            if not 0 < value < math.inf:
                raise InputError(f"--{name} {value} is not above 0")
        if not math.isfinite(self.gate.offset) or not 0 <= self.weight_decay < math.inf:
            raise InputError(f"--offset {self.gate.offset:g}, --weight-decay {self.weight_decay}: not such numbers")
        for rate in self.export:
            if not 1 < rate <= self.gate.rate:
                raise InputError(f"--export {rate:g} is not above 1 and up to --cr {self.gate.rate:g}")
        if self.teacher is not None and not self.distill:
            raise InputError("--teacher is for --distill")
        if self.rows % self.together:
            raise InputError(f"--batch {self.rows} is not a multiple of --micro-batch {self.together}")
        if self.save_every % self.log_every:
            raise InputError(f"--save-every {self.save_every} is not a multiple of --log-every {self.log_every}")
        if self.schedule.steps == self.schedule.fade:
            raise InputError("the gates are never trained: give --ramp-steps or --final-steps")
        if self.export and not self.schedule.ramp:
            raise InputError("--export: without a ramp no rate is passed on the way")
        if self.gate.objective == "dms" and self.gate.window + 1 >= self.length:
            raise InputError(f"--window {self.gate.window}: no sequence of {self.length} tokens would ever lose one")
        dispatch.check(self.kernels)


@dataclasses.dataclass(frozen=True)
class KeepOptions:
    """How gates are trained that tell which tokens to keep: `kvjax.retrofit.keep`."""

    model: str | None
    files: tuple[Path, ...] = ()  # of text; () = prose that comes with the library
    texts: int = 64
    length: int = 1024  # tokens of a text
    steps: int = 1000
    batch: int = 1024  # tokens of a step
    learning_rate: float = 5e-3  # the largest; it falls to nothing along a cosine
    seed: int = 0
    log_every: int = 10
    ignore: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise `InputError` for what is no such number."""
        least = {"texts": (self.texts, 2), "length": (self.length, 16), "final-steps": (self.steps, 1)}
        least |= {"batch": (self.batch, 1), "seed": (self.seed, 0), "log-every": (self.log_every, 1)}
        for name, (value, smallest) in least.items():
            if value < smallest:
                raise InputError(f"--{name} {value} is less than {smallest}")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"--learning-rate {self.learning_rate} is not above 0")
