"""What one `generate` walks through: files and named functions of ours, tracing included.

    python -m tests.walk [METHOD]

Lambdas, comprehensions and closures are counted apart; bodies of modules and classes are not.
"""

import inspect
import sys
from pathlib import Path
from types import FrameType

import kvjax
import kvjax.generation.generate  # before the walk: `Model.generate` imports it

ROOT = Path(kvjax.__file__).parents[1]
OURS = tuple(str(ROOT / package) for package in ("kvjax", "pallas_kernels"))


def walk(method: str) -> dict[str, list[str]]:
    """Functions by file, in the order of their first calls."""
    model, found = kvjax.load(), dict[str, list[str]]()

    def note(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        ours = event == "call" and code.co_filename.startswith(OURS) and code.co_flags & inspect.CO_OPTIMIZED
        if ours and code.co_qualname not in found.setdefault(code.co_filename, []):
            found[code.co_filename].append(code.co_qualname)

    sys.setprofile(note)
    try:
        model.generate([list(range(1, 101))], method, "50%", max_new_tokens=2)
    finally:
        sys.setprofile(None)
    return {str(Path(path).relative_to(ROOT)): names for path, names in found.items()}


def main() -> None:
    found = walk(sys.argv[1] if len(sys.argv) > 1 else "snapkv")
    named = {path: [name for name in names if "<" not in name] for path, names in found.items()}
    for path, names in sorted(named.items()):
        print(f"{path}: {', '.join(names)}")
    counts = (sum(map(len, group.values())) for group in (named, found))
    print("{} files, {} named functions, {} in all".format(len(found), *counts))


if __name__ == "__main__":
    main()
