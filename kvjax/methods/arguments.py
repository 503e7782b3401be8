"""A factory's signature is its schema: reading what a command line or a config file says about an argument."""

import inspect
import typing

from kvjax.errors import InputError


def read_argument(owner: str, parameter: inspect.Parameter, value: object) -> object:
    """A value as the type of the parameter's default.

    Args:
      owner: whose argument it is, for errors.
      parameter: annotated with a `Literal`, or with a default of type bool, int, float or str.
      value: a text, or already of that type.
    """
    kind, key = type(parameter.default), parameter.name
    choices = typing.get_args(parameter.annotation) if typing.get_origin(parameter.annotation) is typing.Literal else ()
    if choices and value not in choices:
        raise InputError(f"{owner}: {key}={value} is not one of {', '.join(map(str, choices))}")
    if kind is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        return value
    if kind in (int, float) and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            return kind(value)
        except (ValueError, OverflowError):
            pass
    raise InputError(f"{owner}: {key}={value} is not {'an' if kind is int else 'a'} {kind.__name__}")
