"""Mutated input: what is drawn of a text, a document or bytes, and how a property of it is tried.

    python -m tests.lib.mutate KIND COUNT FILE  # in a process whose memory is bounded and that ends where a case hangs

FILE is where the case is that is being tried.

A kind is an input that kvjax reads. Its property: a mutated one is refused with one line, or what is read of it is what
an independent reading says.
"""

import copy
import faulthandler
import json
import math
import resource
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisWarning

from kvjax.errors import InputError

REFUSED = object()
LONGEST = 1200  # characters of a refusal
SECONDS, WAIT = 20, 200  # of a processor that a case may take; until it ends, on a busy machine
MEMORY = 4 * 2**30  # bytes that a process of cases may take
NUMBERS = [0, 1, -1, 2, 7, 2**31 - 1, 2**31, 2**63, 10**309, 0.5, -0.5, 1e-50, 1e30, 1e308, math.nan, math.inf]
WORDS = ["", "x", "true", "1", "\ud800", "\x1b[31mred", "a\nb", "\x00", "a" * 300, "../x", "/", "-", "--", "é", "%"]
ODD = [None, True, False, *NUMBERS, *WORDS, [], {}, [0], [[]], {"a": 1}, ["x"], [None], [1, 1, 1], 10**5000]
DEEP = [b"[" * 100_000, b'{"a":' * 100_000, b"[" * 100_000 + b"]" * 100_000, b"a." * 10_000 + b"a = 1"]


class Kind(NamedTuple):
    """An input that is read.

    Attributes:
      cases: mutated inputs.
      holds: `(case, empty folder)`; raises where the property does not hold.
      known: cases that once were wrong.
    """

    cases: st.SearchStrategy
    holds: Callable[[Any, Path], None]
    known: Sequence[Any] = ()


def refused(read: Callable[[], Any]) -> Any:
    """What a reading gives; `REFUSED` where it is refused as it should be: with one line that a terminal can show."""
    try:
        return read()
    except InputError as error:
        line = str(error)
        assert line and line.isprintable() and len(line) < LONGEST, line
        return REFUSED


def reading(parse: Callable[[Any], Any], content: Any) -> Any:
    """What an independent parser gives; `REFUSED` where it gives up."""
    try:
        return parse(content)
    except (ValueError, RecursionError):
        return REFUSED


# Strategies


@st.composite
def edited(draw: st.DrawFn, document: Any) -> Any:
    """A JSON document of which one place or two are other values, gone, twice or under another name."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        places = list(_places(document))
        if not places:
            return document
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        what = draw(st.sampled_from(["odd", "odd", "near", "near", "gone", "moved"]))
        if what == "odd":
            holder[key] = copy.deepcopy(ODD[draw(st.integers(0, len(ODD) - 1))])
        elif what == "near":
            holder[key] = draw(_near(holder[key]))
        elif what == "gone":
            del holder[key]
        elif isinstance(holder, dict):
            holder[draw(st.sampled_from([f"{key}_", key.upper(), "extra", *map(str, holder)]))] = holder.pop(key)
        else:
            holder.insert(0, holder[key])
    return document


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a document: what holds it, and under which key."""
    pairs = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(pairs):
        yield document, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _near(value: Any) -> st.SearchStrategy:
    """Values like one that is right."""
    if isinstance(value, bool) or value is None:
        return st.sampled_from([True, False, None])
    if isinstance(value, int):
        return st.sampled_from([value + 1, value - 1, 2 * value, -value, float(value), str(value), [value]])
    if isinstance(value, float):
        return st.sampled_from([value / 2, value * 2, -value, int(value) if math.isfinite(value) else 0, str(value)])
    if isinstance(value, str):
        return st.sampled_from([value[1:], value + "x", value.upper(), value * 2, [value]])
    if isinstance(value, list):
        return st.sampled_from([value[1:], value * 2, value[::-1], [value]])
    return st.sampled_from([dict(list(value.items())[1:]), [value], value | {"extra": 1}])


@st.composite
def mangled(draw: st.DrawFn, raw: bytes) -> bytes:
    """Bytes that are cut, flipped, put in, doubled, or in another encoding."""
    what = draw(st.sampled_from(["cut", "flip", "insert", "drop", "double", "bom", "crlf", "utf16", "deep"]))
    at, end = sorted(draw(st.tuples(*[st.integers(0, len(raw))] * 2)))
    if what == "flip":
        at = min(at, len(raw) - 1)
        return raw[:at] + bytes([raw[at] ^ 1 << draw(st.integers(0, 7))]) + raw[at + 1 :]
    if what == "insert":
        return raw[:at] + draw(st.binary(min_size=1, max_size=8)) + raw[at:]
    if what == "deep":
        return raw[:at] + draw(st.sampled_from(DEEP)) + raw[at:]
    return {
        "cut": raw[:at],
        "drop": raw[:at] + raw[end:],
        "double": raw[:end] + raw[at:],
        "bom": b"\xef\xbb\xbf" + raw,
        "crlf": raw.replace(b"\n", b"\r\n"),
        "utf16": b"\x00".join(raw[i : i + 1] for i in range(len(raw))),
    }[what]


def dump(document: Any) -> bytes:
    """A document as JSON, integers of any length."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(document, indent=1).encode()
    finally:
        sys.set_int_max_str_digits(limit)


def json_of(document: Any) -> st.SearchStrategy[bytes]:
    """Mutated JSON: twice as often a document that still is one."""
    texts = edited(document).map(dump)
    return st.one_of(texts, texts, mangled(dump(document)))


# Trying


def explore(kind: Kind, count: int, watched: Path | None = None) -> None:
    """Try a kind's property on known cases and on as many drawn ones.

    With a file to write each case to, the process ends where a case hangs.
    """

    def holds(case: Any) -> None:
        if watched is not None:
            watched.write_text(repr(case)[:4000])
            faulthandler.dump_traceback_later(WAIT, exit=True)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            with tempfile.TemporaryDirectory() as folder:
                kind.holds(case, Path(folder))
        finally:
            faulthandler.cancel_dump_traceback_later()
            signal.setitimer(signal.ITIMER_PROF, 0)

    for case in kind.known:
        holds = example(case)(holds)
    usual = settings(
        max_examples=count, deadline=None, database=None, derandomize=True, phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HypothesisWarning)  # cases are long
        usual(given(kind.cases)(holds))()


if __name__ == "__main__":
    from tests.test_mutations import KINDS

    chosen = KINDS[sys.argv[1]]
    faulthandler.register(signal.SIGPROF, chain=True)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    explore(chosen, int(sys.argv[2]), Path(sys.argv[3]))
