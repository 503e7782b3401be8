"""The pages: what they take from the code is what it says."""

from pathlib import Path

import pytest

from tests import pages

every_page = pytest.mark.parametrize("path", pages.pages(), ids=lambda path: str(path.relative_to(pages.ROOT)))


@every_page
def test_parts_are_those_of_the_code(path: Path):
    text = path.read_text(encoding="utf-8")
    assert text == pages.renewed(text), "python -m tests.pages"
