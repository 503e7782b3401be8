"""Generate text with a compressed key/value cache.

Without a prompt, the demo model answers questions about a long list, once with the full cache and once with a
compressed one.
"""

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kvjax.checkpoint import orbax
from kvjax.cli import command, showcase
from kvjax.cli.flags import DTYPES, add_shared_flags, encode, read_ids, read_texts
from kvjax.cli.tables import describe, dtype_of, heading, list_factories, summary, to_stdout
from kvjax.errors import InputError
from kvjax.files import output
from kvjax.generation import prefill
from kvjax.generation.generate import cached_positions
from kvjax.generation.model import Model, load
from kvjax.generation.results import Generation
from kvjax.generation.sampling import Sampling
from kvjax.methods import METHODS, default_budget, make, of
from kvjax.policies.base import Recipe

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
        "--prefill-chunk", type=int, default=prefill.CHUNK, metavar="N",
        help=f"tokens of prompts that a layer reads at once, but for attention (default: {prefill.CHUNK})",
    )  # fmt: skip
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    p.add_argument("--top-k", type=int, default=0, help="0 keeps all tokens (default: 0)")
    p.add_argument("--top-p", type=float, default=1.0, help="(default: 1)")
    p.add_argument("--min-p", type=float, default=0.0, help="(default: 0)")
    p.add_argument("--repetition-penalty", type=float, default=1.0, help="1 is off (default: 1)")
    p.add_argument("--seed", type=int, default=0, help="of the first prompt; prompt i has SEED + i (default: 0)")
    p.add_argument(
        "--no-stream", action="store_true", help="print the text when it is complete (so are several prompts)"
    )
    p.add_argument("--dump-cache", type=Path, metavar="FILE.npz", help="write kept positions and prompt logits")
    p.add_argument("--list-methods", action="store_true", help="show all methods and their arguments")
    return p


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    args, console = command.parse(parser(), argv), to_stdout()
    if args.list_methods:
        list_factories(console, METHODS, "method", "what it keeps")
        console.print("Every method but dmc and dms takes windowed=whole, too: it keeps sliding windows as they are.")
        return
    prompted = bool(args.prompt or args.prompt_file or args.prompt_tokens)
    method = args.method or (_made_for(args.model) if prompted else showcase.METHOD)
    budget = args.budget if args.budget is not None else default_budget(method)
    recipe = make(method, budget, args.arguments)
    if args.max_new_tokens is None:
        args.max_new_tokens = NEW_TOKENS if prompted else showcase.NEW_TOKENS
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty, args.seed)
    sampling.check()
    _check(args, prompted)
    texts, ids = read_texts(args), [read_ids(text) for text in args.prompt_tokens or ()]
    command.begin(args)
    command.use_compilation_cache()
    model = load(args.model, dtype=DTYPES.get(args.dtype), ignore_config=args.ignore_config, mesh=args.mesh)
    if not prompted and not args.json and args.dump_cache is None:
        showcase.run(console, model, recipe, budget, args.max_new_tokens, sampling)
        return
    texts = texts if prompted else showcase.prompts().texts
    out = _generate(args, model, [encode(model, text, args.chat) for text in texts] + ids, recipe, sampling)
    if args.json:
        print(json.dumps(describe(model, out, budget)), flush=True)
    else:
        console.print(summary([out], [heading(recipe, budget)], dtype_of(model)))
    if args.dump_cache is not None:
        _dump(args.dump_cache, model, out)


def _made_for(model: str | None) -> str:
    """The method that a checkpoint is made for; only converted ones say so."""
    path = Path(model or "")
    return of(orbax.read_spec(path)) if model is not None and orbax.is_orbax(path) else "full"


def _check(args: argparse.Namespace, prompted: bool) -> None:
    """Raise `InputError` for flags that cannot be followed, before anything is loaded."""
    if not prompted and (args.model is not None or args.chat):
        raise InputError("give a prompt: --prompt TEXT, --prompt-file FILE or --prompt-tokens 1,2,3")
    if args.chat and args.prompt_tokens:
        raise InputError("--chat wraps text: --prompt-tokens are taken as they are")
    if args.dump_cache is not None:
        output.check_writable(args.dump_cache)


def _generate(
    args: argparse.Namespace, model: Model, prompts: list[list[int]], recipe: Recipe, sampling: Sampling
) -> Generation:
    """Generate, and print the text as it appears or at the end."""
    streaming = len(prompts) == 1 and not args.json and not args.no_stream
    show, finish = _printer(model)
    out = model.generate(
        prompts, recipe, max_new_tokens=args.max_new_tokens, sampling=sampling, on_token=show if streaming else None,
        prefill_chunk=args.prefill_chunk, max_length=args.max_length,
    )  # fmt: skip
    if streaming:
        finish()
    elif not args.json:
        _print_all(out)
    return out


def _dump(path: Path, model: Model, out: Generation) -> None:
    """Write what was kept; a file is complete or absent."""
    content = io.BytesIO()
    np.savez(content, positions=cached_positions(model, out), logits=out.logits)
    output.write(path, content.getvalue())


def _printer(model: Model) -> tuple[Callable[[int, int], None], Callable[[], None]]:
    """Functions that print text as it appears, and its end."""
    stream = None if model.tokenizer is None else model.tokenizer.stream()

    def show(sequence: int, token: int) -> None:
        del sequence
        print(f"{token} " if stream is None else stream.push(token), end="", flush=True)

    def finish() -> None:
        print("" if stream is None else stream.finish(), flush=True)

    return show, finish


def _print_all(out: Generation) -> None:
    for i, sequence in enumerate(out.sequences):
        if len(out.sequences) > 1:
            print(f"--- {i + 1}")
        print(" ".join(map(str, sequence.tokens)) if sequence.text is None else sequence.text)


if __name__ == "__main__":
    command.run(PROG, main)
