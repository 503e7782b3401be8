"""Keep off stderr what Orbax says while it fails: what it raises becomes our one line."""

import functools
import inspect
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_LOGGERS = ("absl", "asyncio")


@contextmanager
def quiet() -> Iterator[None]:
    """Drop Orbax's logs, and its coroutines' errors that nobody waited for.

    A call that fails closes its event loop under tensorstore's threads, and each of them says so in a traceback, some
    of them when the call is over. So what drops them stays where the block fails.
    """
    hook = sys.unraisablehook
    if getattr(hook, "func", None) is not _show:
        sys.unraisablehook = functools.partial(_show, hook)
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_is_of_others)
    try:
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
            yield
    except BaseException:
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        raise
    for name in _LOGGERS:
        logging.getLogger(name).removeFilter(_is_of_others)
    sys.unraisablehook = hook


def _is_of_others(record: logging.LogRecord) -> bool:
    return not re.search(r"orbax[./\\]checkpoint|tensorstore|OCDBT", f"{record.pathname} {record.getMessage()}")


def _show(hook: Callable[[Any], object], event: Any) -> None:
    if not inspect.iscoroutine(event.object) and str(event.exc_value) != "Event loop is closed":
        hook(event)
