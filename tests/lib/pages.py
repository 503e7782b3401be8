"""Parts of pages that say what the code says: written from it, between two marks.

    python -m tests.lib.pages

A part stands between `<!-- NAME -->` and `<!-- /NAME -->`, NAME being a key of `PARTS`.
"""

import inspect
import re
from collections.abc import Callable
from pathlib import Path

from kvjax import METHODS
from tests import test_house
from tests.lib import configs

ROOT = Path(__file__).parents[2]
PLACES = ("*.md", "docs/**/*.md", "colab/*.md", "configs/*.md", "kvjax/demo/**/*.md")
ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")


def pages() -> list[Path]:
    """What people read: the README and the like, docs/, the models' cards."""
    return sorted(path for where in PLACES for path in ROOT.glob(where))


def methods() -> str:
    """A row for each method: what its factory's docstring says first, its default budget, its paper."""
    rows = ["| method | what it does | budget |", "|---|---|---|"]
    for name, factory in METHODS.items():
        doc = inspect.getdoc(factory) or ""
        budget = inspect.signature(factory).parameters.get("budget")
        source = ARXIV.search(doc[doc.index("Source:") :])
        paper = f" ([paper](https://arxiv.org/abs/{source[1]}))" if source else ""
        summary = doc.splitlines()[0].removesuffix(".")
        rows.append(f"| `{name}`{paper} | {summary} | {'–' if budget is None else budget.default} |")
    return "\n".join(rows) + "\n"


def factories() -> str:
    """Where the site puts each factory's docstring."""
    entry = "::: kvjax.methods.{0}.{0}\n"
    return "\n".join(entry.format(name) for name in METHODS)


PARTS: dict[str, Callable[[], str]] = {
    "configs": lambda: configs.table(configs.every()),
    "factories": factories,
    "imports": test_house.picture,
    "methods": methods,
}


def renewed(text: str) -> str:
    """A page's text with all parts as they should be."""
    part = re.compile(r"^(<!-- (\w+) -->\n)(.*?)^(<!-- /\2 -->\n)", re.DOTALL | re.MULTILINE)
    return part.sub(lambda found: f"{found[1]}\n{PARTS[found[2]]()}\n{found[4]}", text)


def write() -> None:
    """Write all parts of all pages anew."""
    for path in pages():
        path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write()
