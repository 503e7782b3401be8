"""What a request of lm-evaluation-harness asks of generation: its `generation_kwargs`, checked and typed."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kvjax.cache.pages import LARGEST
from kvjax.errors import InputError
from kvjax.generation.sampling import Sampling

NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one given counts
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


class GenerationArguments(NamedTuple):
    """What a request's generation arguments ask for; requests with equal ones are run together."""

    until: tuple[str, ...]  # stop strings
    new: int  # most tokens
    sampling: Sampling


def read_generation_arguments(arguments: Mapping[str, Any], max_gen_toks: int) -> GenerationArguments:
    """A task's `generation_kwargs`.

    Args:
      arguments: `until`, `do_sample`, the most tokens under any of lm_eval's names, and fields of `Sampling`.
      max_gen_toks: where they do not say.

    `do_sample: false` is greedy whatever the temperature; `do_sample: true` alone has temperature 1.

    >>> read_generation_arguments({"until": "\\n", "do_sample": False, "temperature": 0.7}, 256)[:2]
    (('\\n',), 256)
    """
    left = {key: value for key, value in arguments.items() if value is not None}
    until = left.pop("until", ())
    new = next(iter([left.pop(name) for name in NEW_TOKENS if name in left]), max_gen_toks)
    draw = left.pop("do_sample", None)
    if not isinstance(draw, bool | None):
        raise InputError(f"generation_kwargs: do_sample={draw} is not true or false")
    if left.get("num_beams") == 1:
        del left["num_beams"]
    given = {name: _number(name, left.pop(name)) for name in SAMPLING if name in left}
    if left:
        accepted = ", ".join(("until", NEW_TOKENS[0], "do_sample", *SAMPLING))
        raise InputError(f"generation_kwargs: kvjax has no {', '.join(left)}: it takes {accepted}")
    temperature = given.get("temperature", 1.0 if draw else 0.0)
    sampling = Sampling(**given | {"temperature": 0.0 if draw is False else temperature})  # pyright: ignore[reportArgumentType]
    sampling.check()
    until = (until,) if isinstance(until, str) else tuple(until)
    return GenerationArguments(until, whole_number("max_gen_toks", new), sampling)


def cut_at(text: str, until: Sequence[str]) -> str:
    """A text up to the first of the stop strings.

    >>> cut_at("4 apples. Q: 3 pears. A: 7", ["A:", "Q:"])
    '4 apples. '
    """
    return text[: min((text.find(stop) for stop in until if stop and stop in text), default=len(text))]


def whole_number(name: str, value: object, most: int = LARGEST) -> int:
    """A count that an argument gives."""
    text = str(value)
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise InputError(f"{name}={value} is not a whole number from 1 to {most}")
    return int(text)


def _number(name: str, value: Any) -> int | float:
    """A sampling parameter as the type of its default."""
    try:
        number = type(Sampling._field_defaults[name])(value)
        if number == float(value):
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    kind = "whole number" if isinstance(Sampling._field_defaults[name], int) else "number"
    raise InputError(f"generation_kwargs: {name}={value} is not a {kind}")
