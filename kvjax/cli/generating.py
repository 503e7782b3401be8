"""What `kvjax.generate` does once its flags are read: load, generate, print."""

import argparse
import functools
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from kvjax.cli import flags, showcase
from kvjax.cli.console import to_stdout
from kvjax.cli.flags import numbers
from kvjax.cli.tables import describe, dtype_of, heading, summary
from kvjax.files import output
from kvjax.generation.generate import Pieces, cached_positions
from kvjax.generation.model import Model, encode_text, load
from kvjax.generation.results import Generation
from kvjax.generation.sampling import Sampling
from kvjax.generation.steps import drain
from kvjax.policies.base import Recipe

T = TypeVar("T")


def run(
    args: argparse.Namespace,
    texts: list[str],
    ids: list[list[int]],
    recipe: Recipe,
    budget: str | int | None,
    sampling: Sampling,
) -> None:
    """Answer prompts, given as texts or token ids; without any, those of the showcase."""
    model = load(args.model, **numbers(args), ignore_config=args.ignore_config, mesh=args.mesh)
    sampling = flags.sampling(args, model) if args.chat else sampling
    console, prompted = to_stdout(), bool(texts or ids)
    if not prompted and not args.json and args.dump_cache is None:
        showcase.run(console, model, recipe, budget, args.max_new_tokens, sampling)
        return
    texts = texts if prompted else showcase.prompts().texts
    out = _generate(args, model, [encode_text(model, text, args.chat) for text in texts] + ids, recipe, sampling)
    if args.json:
        print(json.dumps(describe(model, out, budget)), flush=True)
    else:
        console.print(summary([out], [heading(recipe, budget)], dtype_of(model)))
    if args.dump_cache is not None:
        dump(args.dump_cache, model, out)


def _generate(
    args: argparse.Namespace, model: Model, prompts: list[list[int]], recipe: Recipe, sampling: Sampling
) -> Generation:
    """Generate, and print the text as it appears or at the end."""
    how = {"max_new_tokens": args.max_new_tokens, "sampling": sampling, "stop": args.stop}
    how |= {"prefill_chunk": args.prefill_chunk, "max_length": args.max_length}
    if len(prompts) == 1 and not args.json and not args.no_stream:
        return show(model.stream(prompts[0], recipe, **how))
    out = model.generate(prompts, recipe, **how)
    if not args.json:
        print_all(out)
    return out


def dump(path: Path, model: Model, out: Generation) -> None:
    """Write what was kept; a file is complete or absent."""
    content = io.BytesIO()
    np.savez(content, positions=cached_positions(model, out), logits=out.logits)
    output.write(path, content.getvalue())


def show(pieces: Pieces[T]) -> T:
    """Print pieces of text as they appear, and give what is returned then."""
    found = drain(pieces, functools.partial(print, end="", flush=True))
    print(flush=True)
    return found


def print_all(out: Generation, titles: Sequence[str] = ()) -> None:
    """Print all texts under their titles, or numbered if there are several."""
    for i, sequence in enumerate(out.sequences):
        if titles or len(out.sequences) > 1:
            print(f"--- {titles[i] if titles else i + 1}")
        print(" ".join(map(str, sequence.tokens)) if sequence.text is None else sequence.text)
