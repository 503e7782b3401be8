"""Serve a model to many clients at once, over HTTP as OpenAI's API has it, with a compressed key/value cache.

The model is loaded and everything compiled before the port answers. SIGTERM lets requests end that have begun.
"""

import argparse
import sys
from pathlib import Path

from kvjax import compilation
from kvjax.cli import command
from kvjax.cli.flags import CHAT_LENGTH, add_method_flags, add_number_flags
from kvjax.errors import InputError
from kvjax.files.text import read_text
from kvjax.methods import make

PROG = "kvjax.serve"
PACKAGES = ("starlette", "uvicorn", "prometheus_client")


def parser() -> command.Parser:
    """The command line's flags."""
    p = command.Parser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--model", metavar="M", help="Hugging Face directory, GGUF file, hub id or Orbax directory (default: demo)"
    )
    p.add_argument("--alias", metavar="NAME", help="what clients call the model (default: its file's name)")
    add_method_flags(p, method="full, or what a retrofitted checkpoint is made for")
    p.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    p.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    p.add_argument("--seats", type=int, default=8, metavar="N", help="sequences that decode side by side (default: 8)")
    p.add_argument(
        "--max-length", type=int, metavar="N",
        help=f"most tokens of a sequence, new ones included (default: {CHAT_LENGTH}, or the context limit)",
    )  # fmt: skip
    p.add_argument(
        "--max-new-tokens",
        type=int,
        default=1024,
        metavar="N",
        help="of a chat that asks for no number (default: 1024)",
    )
    p.add_argument(
        "--cache", metavar="4GB", help="bytes of the cache (default: for the longest sequence in every seat)"
    )
    p.add_argument(
        "--contexts", type=int, default=0, metavar="N", help="texts that clients may have kept at a time (default: 0)"
    )
    p.add_argument(
        "--context-cache", metavar="4GB", help="bytes for those and what follows them (default: for the longest)"
    )
    p.add_argument(
        "--after-context", type=int, default=1024, metavar="N",
        help="most tokens that may follow a context, new ones included (default: 1024)",
    )  # fmt: skip
    p.add_argument("--max-queue", type=int, default=256, metavar="N", help="requests that may wait (default: 256)")
    p.add_argument(
        "--stall", type=float, default=0.1, metavar="S",
        help="seconds that decoding may wait for prompts; on accelerators at least for a layer of one (default: 0.1)",
    )  # fmt: skip
    p.add_argument(
        "--drain", type=float, default=30.0, metavar="S", help="seconds that SIGTERM leaves to requests (default: 30)"
    )
    p.add_argument(
        "--watchdog", type=float, default=60.0, metavar="S",
        help="seconds without a sign of life after which health checks fail (default: 60)",
    )  # fmt: skip
    p.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys, one a line, of which clients show one")
    p.add_argument(
        "--cors-origin", action="append", default=[], metavar="URL", help="repeatable; web pages that may ask; * = all"
    )
    p.add_argument("--max-body", default="8MiB", metavar="8MiB", help="most bytes of a request (default: 8MiB)")
    add_number_flags(p)
    p.add_argument("--ignore-config", action="append", default=[], metavar="FIELD", help="ignore a config.json field")
    return p


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    args = command.parse(parser(), argv)
    if args.method is not None:
        make(args.method, args.budget, args.arguments)  # what is wrong is said before anything is loaded
    command.check_numbers(args, seats=command.MOST_SEQUENCES, max_new_tokens=2**31 - 1, max_queue=2**31 - 1)
    if args.contexts != 0:
        command.check_numbers(args, contexts=command.MOST_SEQUENCES, after_context=2**31 - 1)
    elif args.context_cache is not None:
        raise InputError("--context-cache is for contexts: say how many, as in --contexts 4")
    if not 0 <= args.port < 2**16:
        raise InputError(f"--port {args.port} is not a whole number from 0 to {2**16 - 1}")
    for name in ("stall", "drain", "watchdog"):
        if not 0 <= getattr(args, name) < float("inf"):
            raise InputError(f"--{name} {getattr(args, name)} is not a number of seconds")
    args.max_body = command.read_bytes(args.max_body, "--max-body")
    args.cache = None if args.cache is None else command.read_bytes(args.cache, "--cache")
    args.context_cache = (
        None if args.context_cache is None else command.read_bytes(args.context_cache, "--context-cache")
    )
    args.keys = () if args.api_key_file is None else _keys(args.api_key_file)
    try:
        from kvjax.server import run
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in PACKAGES:
            raise
        raise InputError(f"a server needs the package {package}: pip install 'kvjax[serve]'") from None
    compilation.enable_compilation_cache()
    sys.exit(run.run(args))


def _keys(path: Path) -> tuple[str, ...]:
    """The lines of a file, but for empty ones."""
    found = tuple(key for line in read_text(path).splitlines() if (key := line.strip()))
    if not found:
        raise InputError(f"{path} has no key")
    return found


if __name__ == "__main__":
    command.run(PROG, main)
