"""Talk with a chat model on one growing, compressed key/value cache.

Lines of standard input are what you say. /bytes shows what the cache takes, /save FILE writes the conversation with its
cache and /load FILE goes on with it, /method NAME BUDGET takes another method, which reads the conversation again,
/reset begins another conversation, /quit or the end of the input ends the program.
"""

import argparse
from pathlib import Path

from kvjax import compilation
from kvjax.cli import command
from kvjax.cli.flags import CHAT_LENGTH, add_method_flags, add_number_flags, add_sampling_flags, sampling
from kvjax.cli.prompts import read_messages
from kvjax.errors import InputError
from kvjax.methods import make

PROG = "kvjax.chat"
NEW_TOKENS = 256


def parser() -> command.Parser:
    """The command line's flags."""
    p = command.Parser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--model", metavar="M", required=True, help="Hugging Face directory, GGUF file, hub id or Orbax directory"
    )
    p.add_argument("--system", metavar="TEXT", help="what the system says first")
    p.add_argument(
        "--messages", type=Path, metavar="FILE",
        help='a conversation to go on with, a JSON list of {"role": ..., "content": ...}; what a user says last is'
        " answered",
    )  # fmt: skip
    add_method_flags(p, method="full, or what a retrofitted checkpoint is made for")
    p.add_argument(
        "--max-new-tokens", type=int, default=NEW_TOKENS, metavar="N", help=f"of an answer (default: {NEW_TOKENS})"
    )
    p.add_argument(
        "--max-length", type=int, metavar="N",
        help="most tokens of the conversation: the cache has this size from the start"
        f" (default: {CHAT_LENGTH}, or the context limit where that is less)",
    )  # fmt: skip
    add_sampling_flags(p)
    add_number_flags(p)
    command.add_ignore_flag(p)
    return p


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    args = command.parse(parser(), argv)
    if args.method is not None:
        make(args.method, args.budget, args.arguments)  # what is wrong is said before anything is loaded
    sampling(args)
    messages = [] if args.messages is None else read_messages(args.messages)
    if args.system is not None:
        if any(message["role"] == "system" for message in messages):
            raise InputError(f"{args.messages} has what the system says: leave --system out")
        messages.insert(0, {"role": "system", "content": args.system})
    compilation.enable_compilation_cache()
    from kvjax.cli import chatting

    chatting.run(args, messages)


if __name__ == "__main__":
    command.run(PROG, main)
