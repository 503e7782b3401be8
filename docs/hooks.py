"""The site beside `mkdocs.yml`: pages of the repository that lie outside docs/, and docstrings' own sections."""

import posixpath
import re
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
OUTSIDE = {  # where a page of the repository is on the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "configs/README.md": "configs.md",
    "colab/README.md": "colab.md",
    "kvjax/demo/README.md": "demo-model.md",
    "kvjax/demo/dmc/README.md": "demo-dmc.md",
}
PLACES = {place: source for source, place in OUTSIDE.items()}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)")
EXAMPLE = re.compile(r"^>>> (?:.+\n?)+", re.MULTILINE)
SECTION = re.compile(r"^(Source|Differs|Cost): ((?:.*)(?:\n[ ]+.*)*)", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/."""
    for source, place in OUTSIDE.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are from the page's place on the site; what the site does not have keeps its name only."""
    place = page.file.src_uri
    here = posixpath.dirname(PLACES.get(place, f"docs/{place}"))

    def moved(found: re.Match[str]) -> str:
        image, label, target, anchor = found.groups()
        source = posixpath.normpath(posixpath.join(here, target))
        wanted = OUTSIDE.get(source, source.removeprefix("docs/"))
        if (source not in OUTSIDE and not source.startswith("docs/")) or files.get_file_from_path(wanted) is None:
            return label
        return f"{image}[{label}]({posixpath.relpath(wanted, posixpath.dirname(place) or '.')}{anchor or ''})"

    return LINK.sub(moved, markdown)


class Sections(griffe.Extension):
    """`Source:`, `Differs:` and `Cost:` as paragraphs of their own, examples as code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Rewrite a docstring before it is parsed."""
        if obj.docstring is not None:
            whole = lambda found: f"\n**{found[1]}:** " + re.sub(r"\n\s+", " ", found[2]) + "\n"
            text = SECTION.sub(whole, obj.docstring.value)
            obj.docstring.value = EXAMPLE.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", text)
