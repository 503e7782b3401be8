"""The grid of an evaluation: methods and their budgets, as flags and config files name them."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kvjax.cli import command
from kvjax.cli.flags import add_method_flags
from kvjax.errors import InputError
from kvjax.methods import GUIDED, LEARNED, METHODS, arguments_of, default_budget, make, read_entry, taken
from kvjax.policies.base import Recipe
from kvjax.policies.budgets.budget import parse_keep

BATCH_TOKENS = 8192  # tokens of the prompts that are run together, unless it is said
Entry = tuple[str, str | int | None]  # a method as `read_entry` takes it; its budget, None = the default


class Point(NamedTuple):
    """One place in the grid: a method with a budget."""

    method: str
    budget: str | None
    recipe: Recipe


def build_grid(args: argparse.Namespace, settings: dict[str, dict[str, str]]) -> list[Point]:
    """The methods and budgets that the flags name; `settings` are arguments by method."""
    stores = command.stores(args)
    names = ("" if args.config else "all") if args.methods is None else args.methods
    entries = [*_named(names), *(configured(file, settings, stores) for file in args.config)]
    return points(entries, budgets(args), settings, stores)


def budgets(args: argparse.Namespace) -> list[str] | None:
    """Those of `--budgets`; None = each method's own."""
    return None if args.budgets is None else split(args.budgets)


def split(names: str) -> list[str]:
    """Names between commas, each once."""
    return list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))


def _named(methods: str) -> list[Entry]:
    every = [name for name in METHODS if name not in (*LEARNED, *GUIDED)]  # that any model can run
    return [(entry, None) for entry in (every if methods == "all" else split(methods))]


def configured(path: Path, settings: dict[str, dict[str, str]], stores: dict[str, str]) -> Entry:
    """The method of a config file, with the arguments that are not the method's defaults; its budget.

    `settings` and `stores` are the command line's, which take the place of the file's.
    """
    p = command.Parser(prog="kvjax.evaluate")
    add_method_flags(p, method="none")
    args = command.parse(p, ["--config", str(path)])
    if args.method is None:
        raise InputError(f"{path} names no method")
    given = stores.keys() | settings.get(args.method, {}).keys()
    chosen = {key: value for key, value in args.arguments.items() if key not in given}
    make(args.method, args.budget, chosen)  # raises what is wrong with them
    usual = arguments_of(args.method) | {"kernels": "cpu"}
    own = {key: value for key, value in chosen.items() if value != usual[key]}
    return "".join([args.method, *(f"+{key}={value}" for key, value in own.items())]), args.budget


def points(
    entries: Sequence[Entry],
    budgets: list[str] | None,
    settings: dict[str, dict[str, str]] | None = None,
    stores: dict[str, str] | None = None,
) -> list[Point]:
    """The grid's methods with their budgets; a method that takes no budget appears once.

    `budgets` are those of all methods; None = an entry's own, or its method's default. `settings` are arguments of the
    methods that they name, `stores` of all that have them: these become part of the method's name.
    """
    grid, left = [], set(stores or {})
    for budget in budgets or ():
        parse_keep(budget, "--budgets")
    for entry, own in entries:
        name, arguments = read_entry(entry)
        takes, common = default_budget(name), taken(name, stores or {})
        left -= common.keys()
        full_name = entry + "".join(f"+{key}={value}" for key, value in common.items() if key not in arguments)
        given = common | (settings or {}).get(name, {}) | arguments
        for budget in [takes if own is None else own] if takes is None or not budgets else budgets:
            label = None if budget is None else str(budget)
            grid.append(Point(full_name, label, make(name, budget, given)))
    if left:
        raise InputError(f"no method of this run takes {', '.join(sorted(left))}")
    if budgets and all(point.budget is None for point in grid):
        raise InputError("no method of this run takes a budget: leave --budgets out")
    return list({(point.method, point.budget): point for point in grid}.values())
