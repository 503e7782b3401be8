"""Tables of methods and tasks: what a factory's signature and docstring say."""

import inspect
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.table import Table


def list_factories(console: Console, factories: Mapping[str, Callable], kind: str, what: str) -> None:
    """A table of methods or tasks, their arguments with defaults, and where they come from."""
    table = Table(show_lines=True)
    for column in (kind, what, "arguments (--set)", "source"):
        table.add_column(column, overflow="fold")
    for name, factory in factories.items():
        doc = inspect.getdoc(factory) or ""
        arguments = [f"{key}={parameter.default}" for key, parameter in inspect.signature(factory).parameters.items()]
        source = next((line.removeprefix("Source: ") for line in doc.splitlines() if line.startswith("Source:")), "")
        table.add_row(name, doc.splitlines()[0], "\n".join(arguments), source)
    console.print(table)
