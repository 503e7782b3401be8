"""llama.cpp in a process of its own, through node-llama-cpp: its own loop, greedy, on the same weights in float32."""

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np

from kvjax.bench import weights
from kvjax.bench.shapes import LLAMA_CPP
from kvjax.errors import InputError
from kvjax.generation.model import Model

STORES = {"f16": 16.0, "q8_0": 8.5, "q4_0": 4.5}  # formats of its cache: bits of a number, with scales
SCRIPT = Path(__file__).with_suffix(".mjs")


class LlamaCpp:
    """A process that holds the model and one sequence.

    Args:
      model: whose weights it has.
      most: tokens of a sequence.
      folder: where its file of weights goes; one that is there already is taken.
      store: of its cache, of `STORES`.
    """

    def __init__(self, model: Model, most: int, folder: Path, store: str = "f16"):
        self.name = "llama.cpp" if store == "f16" else f"llama.cpp+{store}"
        self.store, self.spec, file = store, model.spec, folder / "weights.gguf"
        if not file.exists():
            weights.write_gguf(model, file)
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        home = str(Path(os.environ[LLAMA_CPP]).resolve())
        self.command = ["node", str(SCRIPT), home, str(file), str(most), str(threads), store]
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.tokens: list[int] = []  # the newest ones
        self._answer()

    def read(self, prompts: np.ndarray) -> float:
        """Read a prompt from its beginning to the next token [s]."""
        (prompt,) = prompts.tolist()
        return self._ask({"read": prompt})

    def go_on(self, steps: int) -> float:
        """Greedy tokens after it [s]."""
        return self._ask({"steps": steps})

    def cache_bytes(self, batch: int, context: int) -> int:
        """Of that many tokens."""
        spec = self.spec
        numbers = 2 * spec.num_layers * batch * spec.num_kv_heads * context * spec.head_dim
        return int(numbers * STORES[self.store] / 8)

    def peak_bytes(self) -> int | None:
        """The most memory that its process had; None where the system does not say."""
        try:
            found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        except OSError:
            return None
        return int(found[1]) * 1024 if found else None

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()

    def _ask(self, what: dict) -> float:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it has ended, and `_answer` says how
        return self._answer()

    def _answer(self) -> float:
        assert self.process.stdout is not None
        try:
            seconds, self.tokens = parsed(self.process.stdout)
        except ValueError:
            self.process.kill()
            raise InputError(f"{self.name} has ended: {last(self.process.communicate()[1])}") from None
        return seconds


def parsed(lines) -> tuple[float, list[int]]:
    """Seconds and tokens of the next line that is an answer; what the library prints besides is skipped.

    Raises `ValueError` where there is none.
    """
    for line in lines:
        if line.startswith("{"):
            found = json.loads(line)
            return float(found.get("seconds", 0.0)), list(found.get("tokens", []))
    raise ValueError("no answer")


def last(text: str) -> str:
    """What a program ended with: the last line that names an error, else the last one.

    >>> last("Error: no such file\\n    at main.js:1\\nNode.js v20\\n")
    'Error: no such file'
    """
    lines = text.strip().splitlines() or ["it said nothing"]
    return next((line for line in reversed(lines) if re.match(r"\w*Error: ", line)), lines[-1])
