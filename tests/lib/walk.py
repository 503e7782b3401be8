"""What one `generate` walks through: files and named functions of ours, tracing included.

    python -m tests.lib.walk [METHOD [CHECKPOINT]]

Lambdas, comprehensions and closures are counted apart; bodies of modules and classes are not.
"""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import kvjax
import kvjax.generation.generate  # before the walk: `Model.generate` imports it
from pallas_kernels.decode_attention import decode_attention

ROOT = Path(kvjax.__file__).parents[1]
OURS = tuple(str(ROOT / package) for package in ("kvjax", "pallas_kernels"))


class Walk(NamedTuple):
    """What was passed: functions by file, in the order of their first calls."""

    functions: dict[str, list[str]]
    hops: list[str]  # from a layer's decode step to the kernel


def walk(method: str, checkpoint: str | None = None) -> Walk:
    """One `generate`; None = the demo model."""
    model, found, hops = kvjax.load(checkpoint), dict[str, list[str]](), list[str]()

    def note(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        ours = event == "call" and code.co_filename.startswith(OURS) and code.co_flags & inspect.CO_OPTIMIZED
        if ours and code.co_qualname not in found.setdefault(code.co_filename, []):
            found[code.co_filename].append(code.co_qualname)
            if code is decode_attention.__code__:
                hops.extend(reversed(list(callers(frame, "_decode_layer"))))

    sys.setprofile(note)
    try:
        model.generate([list(range(1, 101))], method, "50%", max_new_tokens=2)
    finally:
        sys.setprofile(None)
    return Walk({str(Path(path).relative_to(ROOT)): names for path, names in found.items()}, hops)


def callers(frame: FrameType | None, last: str) -> Iterator[str]:
    """The functions that lead to a frame, itself first, up to the one with a name."""
    while frame is not None:
        yield frame.f_code.co_qualname
        frame = None if frame.f_code.co_name == last else frame.f_back


def main() -> None:
    found, hops = walk(*sys.argv[1:] or ["snapkv"])
    named = {path: [name for name in names if "<" not in name] for path, names in found.items()}
    for path, names in sorted(named.items()):
        print(f"{path}: {', '.join(names)}")
    print(" -> ".join(hops))
    counts = (sum(map(len, group.values())) for group in (named, found))
    print("{} files, {} named functions, {} in all".format(len(found), *counts))


if __name__ == "__main__":
    main()
