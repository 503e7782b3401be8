"""Generate text with a compressed key/value cache.

Without a prompt, the demo model answers questions about a long list, once with the full cache and once with a
compressed one.
"""

import argparse
import io
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from kvjax import command, generation, prefilling, showcase
from kvjax.cache.policy import Recipe
from kvjax.checkpoint import orbax
from kvjax.errors import InputError
from kvjax.generation import Generation, Model
from kvjax.methods import METHODS, default_budget, make, of
from kvjax.report import describe, heading, list_factories, summary
from kvjax.sampling import Sampling

PROG = "kvjax.generate"
NEW_TOKENS = 64
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def parser() -> command.Parser:
    """The command line's flags."""
    p = command.Parser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_flags(p, method="full, or what a retrofitted checkpoint is made for", many="repeatable; ")
    p.add_argument("--max-new-tokens", type=int, metavar="N", help=f"(default: {NEW_TOKENS})")
    p.add_argument(
        "--prefill-chunk", type=int, default=prefilling.CHUNK, metavar="N",
        help=f"tokens of prompts that a layer reads at once, but for attention (default: {prefilling.CHUNK})",
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


def add_shared_flags(p: argparse.ArgumentParser, *, method: str, many: str = "") -> None:
    """Flags that mean the same in every command that runs prompts through a method.

    Args:
      p: the command's parser.
      method: the default one, for its help.
      many: what the help of a prompt begins with.
    """
    p.add_argument("--model", metavar="M", help="Hugging Face directory, hub id or Orbax directory (default: demo)")
    p.add_argument("--prompt", action="append", metavar="TEXT", help=f"{many}- reads standard input")
    p.add_argument("--prompt-file", action="append", metavar="FILE", help=f"{many}a prompt from a file")
    p.add_argument("--prompt-tokens", action="append", metavar="1,2,3", help=f"{many}a prompt as token ids")
    p.add_argument("--chat", action="store_true", help="wrap a prompt in the checkpoint's chat template")
    add_method_flags(p, method=method)
    p.add_argument("--dtype", choices=DTYPES, help="of weights and cache (default: float32 on CPU, else bfloat16)")
    command.add_mesh_flag(p)
    command.add_distributed_flag(p)
    p.add_argument("--ignore-config", action="append", default=[], metavar="FIELD", help="ignore a config.json field")
    p.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def add_method_flags(p: argparse.ArgumentParser, *, method: str) -> None:
    """Flags that say which method and how, as a config file does."""
    p.add_argument("--method", metavar="NAME", help=f"one of {', '.join(METHODS)} (default: {method})")
    p.add_argument("--budget", metavar="512|20%", help="slots per row, in tokens or as a share of the prompt")
    p.add_argument("--decode-budget", metavar="512|20%", help="slots per row while decoding (default: by method)")
    command.add_store_flags(p)
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an argument of the method")
    p.add_argument("--config", type=Path, metavar="FILE.toml", help="options from a file; flags take precedence")


def read_texts(args: argparse.Namespace) -> list[str]:
    """The prompts that are given as text."""
    given = args.prompt or []
    if given.count("-") > 1:
        raise InputError("standard input can be read once only: give --prompt - once")
    texts = [_text("standard input", sys.stdin.buffer.read()) if text == "-" else text for text in given]
    for name in args.prompt_file or ():
        try:
            texts.append(_text(name, Path(name).read_bytes()))
        except OSError as error:
            raise InputError(f"cannot read {name}: {error.strerror}") from None
    for text in texts:
        if not text:
            raise InputError("the prompt is empty")
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # how Python passes on bytes that are not UTF-8
            raise InputError("--prompt is not UTF-8 text")
    return texts


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{name} is not UTF-8 text") from None


def read_ids(text: str) -> list[int]:
    """Token ids that are given as `1,2,3`."""
    try:
        return [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        raise InputError(f"--prompt-tokens {text!r} is not a list of ids such as 1,2,3") from None


def encode(model: Model, text: str, chat: bool) -> list[int]:
    """Token ids of a prompt, in the chat template if asked for."""
    if chat and model.tokenizer is not None:
        return model.tokenizer.chat([{"role": "user", "content": text}])
    return generation.tokens(model, text)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    args, console = command.parse(parser(), argv), Console()
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
    how = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty, args.seed)
    how.check()
    _check(args, prompted)
    texts, ids = read_texts(args), [read_ids(text) for text in args.prompt_tokens or ()]
    command.begin(args)
    command.use_compilation_cache()
    model = generation.load(args.model, dtype=DTYPES.get(args.dtype), ignore_config=args.ignore_config, mesh=args.mesh)
    if not prompted and not args.json and args.dump_cache is None:
        showcase.run(console, model, recipe, budget, args.max_new_tokens, how)
        return
    texts = texts if prompted else showcase.prompts().texts
    out = _generate(args, model, [encode(model, text, args.chat) for text in texts] + ids, recipe, how)
    if args.json:
        print(json.dumps(describe(model, out, budget)), flush=True)
    else:
        console.print(summary([out], [heading(recipe, budget)]))
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
        command.check_writable(args.dump_cache)


def _generate(
    args: argparse.Namespace, model: Model, prompts: list[list[int]], recipe: Recipe, how: Sampling
) -> Generation:
    """Generate, and print the text as it appears or at the end."""
    streaming = len(prompts) == 1 and not args.json and not args.no_stream
    show, finish = _printer(model)
    out = generation.generate(
        model, prompts, recipe, max_new_tokens=args.max_new_tokens, how=how, on_token=show if streaming else None,
        prefill_chunk=args.prefill_chunk,
    )  # fmt: skip
    if streaming:
        finish()
    elif not args.json:
        _print_all(out)
    return out


def _dump(path: Path, model: Model, out: Generation) -> None:
    """Write what was kept; a file is complete or absent."""
    content = io.BytesIO()
    np.savez(content, positions=generation.cached_positions(model, out), logits=out.logits)
    command.write(path, content.getvalue())


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


class _Callable(types.ModuleType):
    """The package exports a function of this module's name; importing the module must not hide it."""

    __call__ = staticmethod(generation.generate)


if __name__ == "__main__":
    command.run(PROG, main)
else:
    sys.modules[__name__].__class__ = _Callable
