"""The course of the training: documents grow when what is asked of the present ones is answered.

A stage is left when the accuracy of a block of steps reaches its target, at the latest when its part of the steps is
over. The accuracy is that of looking up, in documents of the stage's own lengths.
"""

from typing import NamedTuple

import numpy as np

from kvjax.corpus import data


class Stage(NamedTuple):
    """A part of the training."""

    lengths: tuple[int, ...]  # drawn from [tokens]
    share: float  # of a document that may be context
    target: float  # accuracy that ends it
    end: float  # share of the steps at which it ends anyway


# A skill is learned on short documents with many questions; longer documents then only stretch it. So short ones stay:
# what is hard to learn, such as following chains of names, would otherwise never be.
COURSE = (
    Stage((64,), 0.4, 0.60, 0.10),
    Stage((64, 128), 0.9, 0.80, 0.25),
    Stage((64, 128, 256), 0.95, 0.85, 0.40),
    Stage((64, 128, 256, 512, 512), 0.95, 0.88, 0.52),
    Stage((64, 128, 256, 512, 1024, 1024), 0.95, 0.90, 0.66),
    Stage((64, 128, 256, 512, 1024, 2048), 0.95, 0.90, 0.70),
    Stage((64, 128, 256, 512, 1024, 2048, 4096, 4096), 0.95, 2.0, 1.0),
)


def shape(seed: int, step: int, stage: int, tokens: int, longest: int) -> tuple[int, int]:
    """Documents of a step and their length [tokens]; `longest` cuts the stage's lengths."""
    lengths = COURSE[stage].lengths
    choice = np.random.default_rng([data.TRAINING, seed, step, 1]).integers(len(lengths))
    length = min(lengths[choice], longest)
    return max(1, tokens // length), length


def looked_up(accuracy: dict[str, float]) -> float:
    """The mean accuracy of the kinds of documents that look something up; 0 where none was asked."""
    found = [accuracy.get(name, 0.0) for name, kind in data.KINDS.items() if kind.looks_up]
    return round(float(np.mean(found)), 4)


def advance(stage: int, accuracy: float, done: float) -> int:
    """The stage after a block of steps with this accuracy, `done` being the share of the steps that are done."""
    over = accuracy >= COURSE[stage].target or done >= COURSE[stage].end
    return stage + 1 if over and stage + 1 < len(COURSE) else stage
