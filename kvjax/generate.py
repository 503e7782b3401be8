"""Generate text with a compressed key/value cache.

Without a prompt, the demo model answers questions about a long list, once with the full cache and once with a
compressed one.
"""

import argparse
from pathlib import Path

from kvjax import compilation
from kvjax.cli import command
from kvjax.cli.flags import SHOWCASE_METHOD, add_sampling_flags, add_shared_flags, sampling
from kvjax.cli.prompts import read_ids, read_texts
from kvjax.errors import InputError
from kvjax.files import output
from kvjax.methods import METHODS, default_budget, make, of
from kvjax.spec import PREFILL_CHUNK
from kvjax.tasks.lines import ANSWER_TOKENS

PROG = "kvjax.generate"
NEW_TOKENS = 64


def parser() -> command.Parser:
    """The command line's flags."""
    p = command.Parser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_flags(p, method="full, or what a retrofitted checkpoint is made for", many="repeatable; ")
    p.add_argument("--max-new-tokens", type=int, metavar="N", help=f"(default: {NEW_TOKENS})")
    p.add_argument(
        "--max-length", type=int, metavar="N",
        help="most tokens of any sequence, new ones included: the cache gets the size that this needs, and what is"
        " compiled serves all shorter ones (default: what the prompts need)",
    )  # fmt: skip
    p.add_argument(
        "--prefill-chunk", type=int, default=PREFILL_CHUNK, metavar="N",
        help=f"most tokens of prompts that a layer reads at once, but for attention (default: {PREFILL_CHUNK})",
    )  # fmt: skip
    add_sampling_flags(p)
    p.add_argument(
        "--no-stream", action="store_true", help="print the text when it is complete (so are several prompts)"
    )
    p.add_argument(
        "--question", action="append", metavar="TEXT", help="repeatable; follows the prompt, which is read once for all"
    )
    p.add_argument("--save-context", type=Path, metavar="FILE", help="write the prompt as the method keeps it")
    p.add_argument(
        "--context", type=Path, metavar="FILE", help="ask what --save-context has written, instead of a prompt"
    )
    p.add_argument("--dump-cache", type=Path, metavar="FILE.npz", help="write kept positions and prompt logits")
    p.add_argument("--list-methods", action="store_true", help="show all methods and their arguments")
    return p


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    args = command.parse(parser(), argv)
    if args.list_methods:
        _list_methods()
        return
    prompted = bool(args.prompt or args.prompt_file or args.prompt_tokens or args.context)
    method = args.method or (_made_for(args.model) if prompted else SHOWCASE_METHOD)
    budget = args.budget if args.budget is not None else default_budget(method)
    _check(args, prompted)
    recipe = make(method, budget, args.arguments)
    if args.max_new_tokens is None:
        args.max_new_tokens = NEW_TOKENS if prompted else ANSWER_TOKENS
    how = sampling(args)
    texts, ids = read_texts(args), [read_ids(text) for text in args.prompt_tokens or ()]
    command.begin(args)
    compilation.enable_compilation_cache()
    if args.context or args.save_context or args.question:
        from kvjax.cli import asking

        asking.run(args, [*texts, *ids], method, budget, how)
        return
    from kvjax.cli import generating

    generating.run(args, texts, ids, recipe, budget, how)


def _list_methods() -> None:
    from kvjax.cli.console import to_stdout
    from kvjax.cli.factories import list_factories

    console = to_stdout()
    list_factories(console, METHODS, "method", "what it keeps")
    console.print("Every method but dmc and dms takes windowed=whole, too: it keeps sliding windows as they are.")


def _made_for(model: str | None) -> str:
    """The method that a checkpoint is made for; only converted ones say so."""
    if model is None:
        return "full"
    from kvjax.checkpoint import orbax

    path = Path(model)
    return of(orbax.read_spec(path)) if orbax.is_orbax(path) else "full"


def _check(args: argparse.Namespace, prompted: bool) -> None:
    """Raise `InputError` for flags that cannot be followed, before anything is loaded."""
    if not prompted and (args.model is not None or args.chat or args.stop):
        raise InputError("give a prompt: --prompt TEXT, --prompt-file FILE or --prompt-tokens 1,2,3")
    if args.chat and args.prompt_tokens:
        raise InputError("--chat wraps text: --prompt-tokens are taken as they are")
    given = sum(map(len, (args.prompt or (), args.prompt_file or (), args.prompt_tokens or ())))
    if args.context is not None:
        named = (args.method, args.budget, args.max_length, args.save_context, args.mesh)
        if given or args.chat or args.arguments or any(flag is not None for flag in named):
            raise InputError("--context has a text, a method, a budget and --chat of its own: leave them out")
        if not args.question:
            raise InputError("--context is to be asked: give --question, as often as there are questions")
    elif (args.question or args.save_context) and given != 1:
        raise InputError("--question and --save-context are for one prompt: --prompt, --prompt-file or --prompt-tokens")
    if args.save_context and not args.question and (args.json or args.dump_cache):
        raise InputError("--json and --dump-cache are for answers: give --save-context a --question, or leave them out")
    if args.dump_cache is not None and args.dump_cache in (args.context, args.save_context):
        raise InputError(f"{args.dump_cache} is to be a context and --dump-cache: give another name")
    for path in (args.dump_cache, args.save_context):
        if path is not None:
            output.check_writable(path)


if __name__ == "__main__":
    command.run(PROG, main)
