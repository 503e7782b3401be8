"""Modules that take seconds to import, for the few tests that need them: every worker collects all tests."""

import warnings
from typing import Any

import pytest


class Later:
    """A module that is imported once a test asks for something in it; the test is skipped where it is not installed."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("_", "pytest")):  # what collecting asks of everything
            raise AttributeError(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs
            return getattr(pytest.importorskip(self._name), name)
