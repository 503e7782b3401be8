"""The program that renders a chat template; `chat_template` starts it, tells it the template, asks for conversations.

A template is a program that came with a checkpoint: here it can use up a process's time and memory, and nothing else.
Lines of JSON go in and out: `[source, special tokens, seconds, bytes]`, then lists of messages; `["text", TEXT]` or
`["error", WHY]` for each. The file is run by its path and imports nothing of kvjax, so that it starts at once.
"""

import contextlib
import json
import math
import resource
import sys
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

LONGER, MORE = 8, 2**20  # a text may have so many times the characters of its messages, and so many more


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that templates are written for."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _render(source: str, special: dict[str, str], line: str) -> tuple[str, str]:
    """A conversation's text, or why there is none.

    Source: transformers `apply_chat_template`.
    """
    try:
        text = _environment().from_string(source).render(
            messages=json.loads(line), tools=None, documents=None, add_generation_prompt=True, **special
        )  # fmt: skip
    except MemoryError:
        return "error", "it needs too much memory"
    except Exception as error:
        return "error", " ".join(str(error).split())
    most = LONGER * len(line) + MORE
    return ("text", text) if len(text) <= most else ("error", f"it makes {len(text):,} characters of {len(line):,}")


def _allow(seconds: int) -> None:
    """End the process when it has computed for some seconds more."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used.ru_utime + used.ru_stime) + seconds, hard))


def _main() -> None:
    source, special, seconds, size = json.loads(sys.stdin.readline())
    with contextlib.suppress(ValueError):  # where the system has no such limit, or a lower one already
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    for line in sys.stdin:
        _allow(seconds)
        print(json.dumps(_render(source, special, line)), flush=True)


if __name__ == "__main__":
    _main()
