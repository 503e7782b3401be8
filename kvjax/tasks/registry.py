"""The evaluation tasks by name; see `python -m kvjax.evaluate --list-tasks`."""

import inspect
from collections.abc import Callable, Mapping

from kvjax.errors import InputError, unknown
from kvjax.methods.arguments import read_argument
from kvjax.tasks.aggregation import common_words, frequent_words, variable_tracking
from kvjax.tasks.facts import facts
from kvjax.tasks.gsm8k import gsm8k
from kvjax.tasks.longbench import longbench
from kvjax.tasks.retrieval import lines, needle, niah_multikey, niah_multiquery, niah_multivalue, niah_single, passkey
from kvjax.tasks.squad import squad
from kvjax.tasks.task import Task
from kvjax.tasks.text import kl, perplexity

TASKS: dict[str, Callable[..., Task]] = {
    "lines": lines,
    "needle": needle,
    "facts": facts,
    "passkey": passkey,
    "niah_single": niah_single,
    "niah_multikey": niah_multikey,
    "niah_multivalue": niah_multivalue,
    "niah_multiquery": niah_multiquery,
    "variable_tracking": variable_tracking,
    "common_words": common_words,
    "frequent_words": frequent_words,
    "perplexity": perplexity,
    "kl": kl,
    "longbench": longbench,
    "squad": squad,
    "gsm8k": gsm8k,
}


def make_task(name: str, arguments: Mapping[str, object] | None = None) -> Task:
    """A task from what a command line says.

    Args:
      name: a key of `TASKS`.
      arguments: the task's own; texts are read as the type of the argument's default.

    >>> make_task("needle", {"depths": "3"}).better
    'higher'
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    parameters, given = inspect.signature(TASKS[name]).parameters, dict(arguments or {})
    for key, value in given.items():
        if key not in parameters:
            raise InputError(f"task {name} has no argument {key!r}: it takes {', '.join(parameters) or 'none'}")
        given[key] = read_argument(f"task {name}", parameters[key], value)
    return TASKS[name](**given)
