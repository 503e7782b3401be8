"""What the files in configs/ say of themselves, and the table of them that `tests.lib.pages` writes.

    python -m tests.lib.configs kivi2 mikv     # runs what these files say, and notes what the demo model answers

The comment at the top of a file says what it reproduces, how it is run, and what the demo model then answers; what has
not been measured is `?`.
"""

import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from kvjax import METHODS
from kvjax.checkpoint import shipped
from kvjax.evaluation import results

FOLDER = Path(__file__).parents[2] / "configs"
TABLE = ("config", "method", "budget", "stores", "what it is", "look-ups", "bytes")
SAYS = "The demo model answers {}% of 20 look-ups at {}% of the full cache's bytes in 16 bits"
ANSWERS = re.compile(SAYS.format(*[r"(\d+|\?)"] * 2))


class Config(NamedTuple):
    """A file of configs/."""

    path: Path
    about: str  # what it reproduces
    commands: list[list[str]]  # what runs it and measures it, without `python -m`
    answers: tuple[int, int] | None  # of the demo model: right answers and bytes of the full cache in 16 bits [%]
    options: dict[str, Any]

    @property
    def method(self) -> str:
        """The method it is for; of a retrofit, what the model is retrofitted for."""
        return self.options.get("method") or self.options["objective"]

    @property
    def retrofits(self) -> bool:
        """Whether it is for `kvjax.retrofit`."""
        return "objective" in self.options


def read(path: Path) -> Config:
    """A config and its head."""
    text = path.read_text(encoding="utf-8")
    lines = [line[1:] for line in text.splitlines() if line.startswith("#")]
    is_command = [line.startswith("   python -m ") for line in lines]
    about = " ".join(line.strip() for line in lines[: is_command.index(True)])
    commands = [shlex.split(line)[2:] for line, runs in zip(lines, is_command, strict=True) if runs]
    prose = " ".join(line.strip() for line, runs in zip(lines, is_command, strict=True) if not runs)
    found = ANSWERS.search(prose)
    answers = None if found is None or "?" in found.groups() else (int(found[1]), int(found[2]))
    return Config(path, about, commands, answers, tomllib.loads(text))


def every() -> list[Config]:
    """All configs, in the order of `METHODS`."""
    found = map(read, FOLDER.glob("*.toml"))
    return sorted(found, key=lambda config: (list(METHODS).index(config.method), config.path.stem))


def measure(config: Config, folder: Path) -> tuple[float, float]:
    """Run what a config says of the demo model, in an empty folder: right answers and bytes of the full cache [%]."""
    places = {f"configs/{config.path.name}": str(config.path), "kvjax/demo": str(shipped.directory())}
    for program, *flags in config.commands:
        if program == "kvjax.evaluate" or "kvjax/demo" in flags:
            subprocess.run([sys.executable, "-m", program, *(places.get(x, x) for x in flags)], cwd=folder, check=True)
    found = results.read(folder / "out" / "samples.jsonl")
    total = lambda key: sum(line[key] for line in found)
    return 100 * total("score") / len(found), 100 * total("cache_bytes") / total("full_bytes")


def note(config: Config) -> None:
    """Write what the demo model answers into a config's head."""
    with tempfile.TemporaryDirectory() as folder:
        right, size = measure(config, Path(folder))
    line = SAYS.format(f"{right:.0f}", f"{size:.0f}")
    config.path.write_text(ANSWERS.sub(line, config.path.read_text(encoding="utf-8")), encoding="utf-8")


def table(configs: list[Config]) -> str:
    """A row for each config, in Markdown."""
    rows = [f"| {' | '.join(TABLE)} |", "|---" * len(TABLE) + "|"]
    for config in configs:
        stores = [config.options[key] for key in ("store", "low_store") if key in config.options]
        right, size = ("–", "–") if config.answers is None else (f"{share}%" for share in config.answers)
        cells = (
            f"[{config.path.stem}]({config.path.name})",
            f"`{config.method}`" + (" (retrofit)" if config.retrofits else ""),
            str(config.options.get("budget", "–")),
            ", ".join(f"`{store}`" for store in stores) or "–",
            config.about.removesuffix("."),
            right,
            size,
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        note(read(FOLDER / f"{name}.toml"))
