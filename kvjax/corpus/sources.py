"""Text to learn from: the standard library of the running Python, and generated sentences.

The library's sources and documentation are under the PSF licence and come with every interpreter, hence nothing is
shipped or downloaded. The evaluation's text (`kvjax/evaluation/text.txt`) is not part of it.
"""

import ast
import functools
import hashlib
import sysconfig
import warnings
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from kvjax.tasks import words

Split = Literal["training", "held-out"]
# Tests, tables of characters, what is not in every version or not on every platform.
LEFT_OUT = {
    "site-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "lib2to3",
    "distutils",
    "ensurepip",
    "__pycache__",
}
HELD_OUT = 16  # one module of so many is held out


class Module(NamedTuple):
    """A module of the library."""

    name: str  # its path in the library: `json/decoder.py`
    source: str


@functools.cache
def modules(split: Split) -> tuple[Module, ...]:
    """The library's modules in the order of their names; what is held out depends on the name alone."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if LEFT_OUT.isdisjoint(name.split("/")[:-1]) and not name.startswith("_sysconfigdata"):
            if (zlib.crc32(name.encode()) % HELD_OUT == 0) == (split == "held-out"):
                found.append(Module(name, _plain(path.read_text("utf-8", errors="replace"))))
    return tuple(module for module in found if module.source.strip())


def _plain(text: str) -> str:
    """The lines of ASCII letters, without trailing spaces and tabs."""
    return "".join(f"{line.rstrip()}\n" for line in text.expandtabs().splitlines() if line.isascii())


def prose(source: str) -> str:
    """What a module says about itself: its documentation strings, or its longest texts where it is made of those."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about escapes that newer versions refuse
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    if not any(found[1:]):  # pydoc's topics are a dictionary
        texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
        found += [text for text in texts if isinstance(text, str) and len(text) > 400]
    return _plain("\n\n".join(text for text in found if len(text) > 80))


@functools.cache
def documentation(split: Split) -> tuple[str, ...]:
    """The prose of the modules that have any."""
    found = (prose(module.source) for module in modules(split))
    return tuple(text for text in found if text.strip())


def sentences(rng: np.random.Generator, count: int) -> str:
    """A paragraph of generated English; a subject stays for a few sentences."""
    pick = lambda options: options[int(rng.integers(len(options)))]
    thing = lambda: (
        f"the {pick(words.ADJECTIVES)} {pick(words.nouns())}" if rng.random() < 0.5 else f"a {pick(words.nouns())}"
    )
    verb = lambda: pick(words.VERBS)
    out, subject = [], thing()
    for _ in range(count):
        if rng.random() < 0.4:
            subject = thing()
        forms = (
            f"{subject} will {verb()} {thing()}.",
            f"{subject} can {verb()} and {verb()}, but {thing()} cannot.",
            f"did {subject} {verb()} {thing()}?",
            f"{thing()} and {subject} {verb()} near {thing()}.",
            f"when {thing()} began to {verb()}, {subject} had to {verb()} at once.",
        )
        sentence = pick(forms)
        out.append(sentence[0].upper() + sentence[1:])
    lines = [" ".join(out[start : start + 2]) for start in range(0, count, 2)]
    return "\n".join(lines) + "\n"


@functools.cache
def haystack(split: Split) -> str:
    """Prose for needles to be hidden in: documentation, and one generated line for two of its lines."""
    rng = np.random.default_rng(zlib.crc32(split.encode()))
    lines = [line for text in documentation(split) for line in text.splitlines() if line]
    made = sentences(rng, len(lines)).splitlines()
    order = [line for index, line in enumerate(lines) for line in (line, *made[index // 2 : index // 2 + index % 2])]
    return "\n".join(order) + "\n"


def fingerprint() -> str:
    """What tells one interpreter's text from another's: a run is continued on the same text only."""
    digest = hashlib.sha256()
    for module in modules("training"):
        digest.update(f"{module.name}\0{module.source}\0".encode())
    return digest.hexdigest()[:16]
