"""Compile whole decoding steps of Llama-3-8B for chips that are not there: rows of a table in docs/performance.md.

python -m tests.lib.whole_step h200 "v5e model=8"
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from kvjax.methods import LEARNED, METHODS, default_budget
from kvjax.plan import aot
from kvjax.plan.chips import find

LENGTHS = ("--context", "32768", "--new-tokens", "1024", "--batch", "4")
BUDGETS = {name: () if default_budget(name) is None else ("--budget", "20%") for name in METHODS if name not in LEARNED}
TABLE = Path(__file__).parents[2] / "docs" / "performance.md"
ROW = r"\| (\w+(?: [\w=,]+)?) \| (\w+) \| (\w+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|"


class Step(NamedTuple):
    """A step of all layers, as the compiler counts it [bytes]."""

    chip: str  # and a mesh of them
    method: str
    kernels: str
    arguments: int
    in_place: int  # of these, what the results take the place of
    temporary: int


def compile_step(chip: str, method: str, kernels: str) -> tuple[Step, int]:
    """A whole step, and the bytes of weights and cache by their shapes."""
    name, *mesh = chip.split()
    target, flags = find(name).target, ("--model", "llama-3-8b", "--chip", name, *LENGTHS)
    assert target is not None
    flags += tuple(word for size in mesh for word in ("--mesh", size))
    chosen = ("--method", method, *BUDGETS[method], "--kernels", kernels, "--exact", "--program", "step")
    (line,) = aot.run(target, "kvjax.plan.compiled", *flags, *chosen)
    return Step(chip, method, kernels, line["argument"], line["alias"], line["temp"]), line["there"]


def stated() -> Iterator[Step]:
    """The rows of the table."""
    for found in re.findall(ROW, TABLE.read_text()):
        yield Step(*found[:3], *(int(number.replace(",", "")) for number in found[3:]))


if __name__ == "__main__":
    for chip in sys.argv[1:]:
        for method in BUDGETS:
            for kernels in ("xla", "auto"):
                step, _ = compile_step(chip, method, kernels)
                print("|", " | ".join(x if isinstance(x, str) else f"{x:,}" for x in step), "|", flush=True)
