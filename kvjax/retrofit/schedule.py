"""When a retrofit does what: three stages, each with a learning rate; the optimiser starts anew in each.

    fade      what the gate will borrow is scaled down to nothing; not needed by a gate with weights of its own
    ramp      the target rate grows from 1, or from what the model has, linearly in the step
    finish    the target stays, the learning rate falls

Source: DMC (arXiv 2403.09636); Megatron-LM, branch `dmc`, `examples/dmc/train.sh`, `get_prior_and_cr`.
"""

import math
from typing import Literal, NamedTuple

Stage = Literal["fade", "ramp", "finish"]


class Schedule(NamedTuple):
    """Steps of each stage, and what they lead to."""

    fade: int
    ramp: int
    finish: int
    rate: float  # tokens per slot in the end
    first_learning_rate: float
    last_learning_rate: float  # at the end of the last stage
    start: float = 1.0  # tokens per slot that the model has

    @property
    def steps(self) -> int:
        """Of all stages."""
        return self.fade + self.ramp + self.finish

    def stage(self, step: int) -> tuple[Stage, int]:
        """The stage of a step, and how many of its steps were before."""
        if step < self.fade:
            return "fade", step
        if step < self.fade + self.ramp:
            return "ramp", step - self.fade
        return "finish", step - self.fade - self.ramp

    def begins(self, step: int) -> bool:
        """Whether a stage begins with this step."""
        return self.stage(step)[1] == 0

    def keep(self, step: int) -> float:
        """What is left of the borrowed coordinate while it fades: nothing in the stage's last fifth."""
        return 0.0 if step >= self.fade else max(0.0, 1 - step / (0.8 * self.fade))

    def target(self, step: int) -> float:
        """The rate that a step aims at."""
        stage, done = self.stage(step)
        share = {"fade": 0.0, "ramp": done / max(self.ramp, 1), "finish": 1.0}[stage]
        return self.start + (self.rate - self.start) * share

    def passes(self, step: int, rate: float) -> bool:
        """Whether the target reaches a rate with this step."""
        return self.stage(step)[0] == "ramp" and self.target(step + 1) >= rate > self.target(step)

    def learning_rate(self, step: int) -> float:
        """Constant, in the last stage half a cosine down to what it ends with."""
        stage, done = self.stage(step)
        if stage != "finish":
            return self.first_learning_rate
        share = (1 + math.cos(math.pi * done / max(self.finish, 1))) / 2
        return self.last_learning_rate + (self.first_learning_rate - self.last_learning_rate) * share
