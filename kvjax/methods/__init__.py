"""The methods: one file and one factory each. A factory's signature is its schema.

>>> from kvjax.methods import METHODS
>>> METHODS["snapkv"](budget="10%", window=16).name
'snapkv'
"""

import inspect
import typing
from collections.abc import Callable, Mapping

from kvjax.cache.policy import Recipe
from kvjax.errors import InputError
from kvjax.methods.full import full
from kvjax.methods.h2o import h2o
from kvjax.methods.pyramidkv import pyramidkv
from kvjax.methods.snapkv import snapkv
from kvjax.methods.streaming_llm import streaming_llm
from kvjax.methods.tova import tova

METHODS: dict[str, Callable[..., Recipe]] = {
    "full": full,
    "streaming_llm": streaming_llm,
    "h2o": h2o,
    "tova": tova,
    "snapkv": snapkv,
    "pyramidkv": pyramidkv,
}

__all__ = ["METHODS", "full", "h2o", "make", "pyramidkv", "snapkv", "streaming_llm", "tova"]


def make(name: str, budget: str | int | None = None, arguments: Mapping[str, object] | None = None) -> Recipe:
    """A recipe from what a command line or a config file says.

    Args:
      name: a key of `METHODS`.
      budget: `512` or `"20%"`; None = the method's default.
      arguments: the method's own arguments; strings are read as the type of the argument's default.

    >>> make("h2o", "256", {"recent": "0.25"}).name
    'h2o'
    """
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}: choose from {', '.join(METHODS)}")
    parameters = inspect.signature(METHODS[name]).parameters
    given = dict(arguments or {})
    if "budget" in given:
        raise InputError("the budget is an option of its own, not a method argument")
    if budget is not None:
        if "budget" not in parameters:
            raise InputError(f"method {name} keeps everything and takes no budget")
        given["budget"] = budget
    accepted = [key for key in parameters if key != "budget"]
    for key, value in given.items():
        if key not in parameters:
            raise InputError(f"method {name} has no argument {key!r}: it takes {', '.join(accepted) or 'none'}")
        if key != "budget":
            given[key] = _read(name, parameters[key], value)
    return METHODS[name](**given)


def default_budget(name: str) -> str | int | None:
    """The budget that a method takes when none is given; None if it takes none."""
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}: choose from {', '.join(METHODS)}")
    parameter = inspect.signature(METHODS[name]).parameters.get("budget")
    return None if parameter is None else parameter.default


def _read(method: str, parameter: inspect.Parameter, value: object) -> object:
    """A value as the type of the parameter's default."""
    kind, key = type(parameter.default), parameter.name
    choices = typing.get_args(parameter.annotation) if typing.get_origin(parameter.annotation) is typing.Literal else ()
    if choices and value not in choices:
        raise InputError(f"method {method}: {key}={value} is not one of {', '.join(map(str, choices))}")
    if kind is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        return value
    if kind in (int, float) and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            return kind(value)
        except ValueError:
            pass
    raise InputError(f"method {method}: {key}={value} is not {'an' if kind is int else 'a'} {kind.__name__}")
