"""The methods: one file and one factory each. A factory's signature is its schema.

>>> from kvjax.methods import METHODS
>>> METHODS["snapkv"](budget="10%", window=16).name
'snapkv'
"""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import get_args

from kvjax.errors import InputError, unknown
from kvjax.methods.adakv import adakv
from kvjax.methods.arguments import read_argument
from kvjax.methods.d2o import d2o
from kvjax.methods.dmc import dmc
from kvjax.methods.dms import dms
from kvjax.methods.dynamickv import dynamickv
from kvjax.methods.expected import expected
from kvjax.methods.fastkvzip import fastkvzip
from kvjax.methods.full import full
from kvjax.methods.h2o import h2o
from kvjax.methods.keydiff import keydiff
from kvjax.methods.kvzip import kvzip
from kvjax.methods.kvzip_plus import kvzip_plus
from kvjax.methods.mikv import mikv
from kvjax.methods.oracle import oracle
from kvjax.methods.pyramidkv import pyramidkv
from kvjax.methods.snapkv import snapkv
from kvjax.methods.streaming_llm import streaming_llm
from kvjax.methods.tova import tova
from kvjax.policies.base import AMOUNTS, Recipe, Windowed
from kvjax.policies.budgets.budget import Keep
from kvjax.spec import ModelSpec
from pallas_kernels.implementation import Implementation

METHODS: dict[str, Callable[..., Recipe]] = {
    "full": full,
    "streaming_llm": streaming_llm,
    "h2o": h2o,
    "tova": tova,
    "snapkv": snapkv,
    "pyramidkv": pyramidkv,
    "adakv": adakv,
    "dynamickv": dynamickv,
    "keydiff": keydiff,
    "kvzip": kvzip,
    "kvzip_plus": kvzip_plus,
    "fastkvzip": fastkvzip,
    "expected": expected,
    "d2o": d2o,
    "mikv": mikv,
    "dmc": dmc,
    "dms": dms,
    "oracle": oracle,
}

COMMON = ("kernels", "windowed")  # arguments that every method has, see `kvjax.policies.base.Recipe`
LEARNED = ("dmc", "dms")  # methods that need a model which was retrofitted for them
GUIDED = ("fastkvzip",)  # methods that need gates beside the model's weights, see `kvjax.models.keep`

KERNELS: dict[str, Implementation | None] = {key: key for key in get_args(Implementation)} | {"auto": None}

__all__ = [
    "GUIDED",
    "KERNELS",
    "LEARNED",
    "METHODS",
    "adakv",
    "d2o",
    "dmc",
    "dms",
    "dynamickv",
    "expected",
    "fastkvzip",
    "full",
    "h2o",
    "keydiff",
    "kvzip",
    "kvzip_plus",
    "make",
    "mikv",
    "oracle",
    "pyramidkv",
    "resolve",
    "snapkv",
    "streaming_llm",
    "tova",
]


def make(name: str, budget: Keep | None = None, arguments: Mapping[str, object] | None = None) -> Recipe:
    """A recipe from what a command line or a config file says.

    Args:
      name: a key of `METHODS`.
      budget: `512` or `"20%"`; None = the method's default.
      arguments: the method's own arguments, strings being read as the type of the argument's default; and what every
        method has: `kernels`, which read the cache, and `windowed`, what becomes of layers with a sliding window.

    >>> make("h2o", "256", {"recent": "0.25"}).name
    'h2o'
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    parameters = inspect.signature(METHODS[name]).parameters
    given = dict(arguments or {})
    kernels, windowed = given.pop("kernels", "cpu"), given.pop("windowed", "compressed")
    if kernels not in KERNELS:
        raise InputError(f"kernels={kernels} is not one of {', '.join(KERNELS)}")
    if windowed not in get_args(Windowed):
        raise InputError(f"windowed={windowed} is not one of {', '.join(get_args(Windowed))}")
    if "budget" in given:
        raise InputError("the budget is an option of its own, not a method argument")
    if budget is not None:
        if "budget" not in parameters:
            why = "lets its model decide" if name in LEARNED else "keeps everything"
            raise InputError(f"method {name} {why} and takes no budget")
        given["budget"] = budget
    for key, value in given.items():
        if key not in parameters:
            raise InputError(f"method {name} has no argument {key!r}: it takes {', '.join(accepted_arguments(name))}")
        if key not in AMOUNTS:  # parsed by the factory
            given[key] = read_argument(f"method {name}", parameters[key], value)
    common = {"kernels": KERNELS[str(kernels)], "windowed": windowed}
    recipe = METHODS[name](**given)
    other = recipe._replace(**common)
    return recipe if other == recipe else other  # the same one, for whoever compares identities


def resolve(spec: ModelSpec, method: str | Recipe | None = None, budget: Keep | None = None) -> Recipe:
    """The recipe of a method that is given by name or as a recipe.

    Args:
      spec: the model's.
      method: a recipe, a name with arguments as in `read_entry`, or None: what the model is made for, see `of`.
      budget: `512` or `"20%"`, beside a name; None = the method's default.

    Raises:
      InputError: no such method, or a budget beside a recipe, which has its own.

    >>> import kvjax
    >>> resolve(kvjax.load().spec, "h2o+store=int4", "10%").stores[0].name
    'int4'
    """
    if isinstance(method, Recipe):
        if budget is not None:
            raise InputError(f"the recipe {method.name} has a budget of its own: give it to the recipe's factory")
        return method
    if method is not None and not isinstance(method, str):
        raise InputError(f"method {method!r} is not a name or a recipe of kvjax.methods")
    name, arguments = (of(spec), {}) if method is None else read_entry(method)
    return make(name, budget, arguments)


def accepted_arguments(name: str) -> list[str]:
    """The names of a method's own arguments."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return [key for key in inspect.signature(METHODS[name]).parameters if key != "budget"]


def read_entry(text: str) -> tuple[str, dict[str, str]]:
    """A method and its arguments, as a command line lists several.

    >>> read_entry("mikv+low_store=int4+recent=0.25")
    ('mikv', {'low_store': 'int4', 'recent': '0.25'})
    """
    name, *settings = text.split("+")
    found: dict[str, str] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if not key or not value or key in found:
            raise InputError(f"method {text!r}: {setting!r} is not one key=value, as in mikv+low_store=int4")
        found[key] = value
    return name, found


def write_entry(name: str, arguments: Mapping[str, object]) -> str:
    """A method and its arguments as `read_entry` reads them.

    >>> write_entry("mikv", {"low_store": "int4", "recent": 0.25})
    'mikv+low_store=int4+recent=0.25'
    """
    return "+".join([name, *(f"{key}={value}" for key, value in arguments.items())])


def of(spec: ModelSpec) -> str:
    """The method that a model is made for: what its gate decides, or the full cache.

    >>> import kvjax
    >>> of(kvjax.load().spec)
    'full'
    """
    return "full" if spec.gate is None else spec.gate.objective


def arguments_of(name: str, given: Mapping[str, object] | None = None) -> dict[str, object]:
    """All of a method's own arguments with the values in force; those that every method has are not among them.

    >>> arguments_of("snapkv", {"window": "16"})
    {'window': 16, 'kernel': 5, 'pooling': 'avg', 'split': 'row', 'decode_budget': '', 'store': 'dense'}
    """
    parameters = inspect.signature(METHODS[name]).parameters
    values = {key: parameter.default for key, parameter in parameters.items() if key != "budget"}
    read = lambda key, value: value if key in AMOUNTS else read_argument(f"method {name}", parameters[key], value)
    return values | {key: read(key, value) for key, value in (given or {}).items() if key not in COMMON}


def taken(name: str, arguments: Mapping[str, str]) -> dict[str, str]:
    """Those of the arguments that a method has."""
    return {key: value for key, value in arguments.items() if key in (*accepted_arguments(name), *COMMON)}


def label_of(entry: str) -> str:
    """A method in a table: with a warning where its budget saves nothing.

    >>> label_of("oracle"), label_of("h2o+store=int4")
    ('oracle (frees nothing)', 'h2o+store=int4')
    """
    return f"{entry} (frees nothing)" if re.match(r"oracle\b", entry) else entry


def default_budget(name: str) -> str | int | None:
    """The budget that a method takes when none is given; None if it takes none."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    parameter = inspect.signature(METHODS[name]).parameters.get("budget")
    return None if parameter is None else parameter.default
