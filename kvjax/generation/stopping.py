"""What ends a text: stop tokens and stop strings."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvjax.errors import InputError
from kvjax.generation.model import Model
from kvjax.models.tokenizer import Tokenizer


class Stops(NamedTuple):
    """What ends a text.

    Attributes:
      ids: tokens that do.
      strings: a text ends before the first of them.
    """

    ids: tuple[int, ...]
    strings: tuple[str, ...] = ()

    def find(self, text: str) -> int:
        """Where the first stop string of a text begins; -1 if it has none."""
        return min((at for string in self.strings if (at := text.find(string)) >= 0), default=-1)


def stops(model: Model, given: Sequence[str]) -> Stops:
    """What ends a text of a model, and where it is told so.

    Args:
      model: its own stop tokens always count.
      given: stop strings; one that is a special token, which texts do not show, is a stop token.
    """
    if isinstance(given, str):
        raise InputError(f"stop is one text: give a list, stop=[{given!r}]")
    if not all(isinstance(string, str) and string for string in given):
        raise InputError("a stop string is empty, or not a text")
    if given and model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer: a stop string needs one")
    tokens = {string: model.tokenizer.special(string) for string in given} if model.tokenizer is not None else {}
    ids = (i for i in tokens.values() if i is not None)
    return Stops((*model.stop, *ids), tuple(string for string, i in tokens.items() if i is None))


def completing(model: Model, strings: Sequence[str]) -> np.ndarray:
    """Tokens that may complete one of some strings, `[V]`: those that have its last character, or a part of one."""
    found = np.zeros(model.spec.vocab_size, bool)
    if strings and model.tokenizer is not None:
        for last in {string[-1] for string in strings} | {"\ufffd"}:
            ids = np.asarray(model.tokenizer.having.get(last, ()), int)
            found[ids[ids < len(found)]] = True
    return found


class Text:
    """A text as its tokens come; its pieces join to what `Tokenizer.decode` gives, up to the first stop string.

    Held back is what may still change, and what may be the beginning of a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Stops):
        self._stream, self._stops = tokenizer.stream(), stops
        self._held = ""
        self.stopped = False  # by a stop string

    def push(self, token: int) -> str:
        """The text that is certain with `token`; "" while nothing is."""
        if self.stopped:
            return ""
        self._held += self._stream.push(token)
        rest = self._held + self._stream.held
        at = self._stops.find(rest)
        self.stopped = at >= 0
        if self.stopped:
            self._held = ""
            return rest[:at]
        certain = len(self._held) - self._begun()
        piece, self._held = self._held[:certain], self._held[certain:]
        return piece

    @property
    def held(self) -> str:
        """What is held back, as it stands."""
        return "" if self.stopped else self._held + self._stream.held

    def _begun(self) -> int:
        """Characters at the end that a stop string begins with."""
        return max(
            (n for string in self._stops.strings for n in range(len(string)) if self._held.endswith(string[:n])),
            default=0,
        )
