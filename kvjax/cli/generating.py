"""What `kvjax.generate` does once its flags are read: load, generate, print."""

import argparse
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from kvjax.cli import showcase
from kvjax.cli.console import to_stdout
from kvjax.cli.flags import DTYPES
from kvjax.cli.tables import describe, dtype_of, heading, summary
from kvjax.files import output
from kvjax.generation import stopping
from kvjax.generation.generate import cached_positions
from kvjax.generation.model import Model, encode_text, load
from kvjax.generation.results import Generation
from kvjax.generation.sampling import Sampling
from kvjax.policies.base import Recipe


def run(
    args: argparse.Namespace,
    texts: list[str],
    ids: list[list[int]],
    recipe: Recipe,
    budget: str | int | None,
    sampling: Sampling,
) -> None:
    """Answer prompts, given as texts or token ids; without any, those of the showcase."""
    model = load(args.model, dtype=DTYPES.get(args.dtype), ignore_config=args.ignore_config, mesh=args.mesh)
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
    streaming = len(prompts) == 1 and not args.json and not args.no_stream
    show, finish = printer(model, args.stop)
    out = model.generate(
        prompts, recipe, max_new_tokens=args.max_new_tokens, sampling=sampling, stop=args.stop,
        on_token=show if streaming else None, prefill_chunk=args.prefill_chunk, max_length=args.max_length,
    )  # fmt: skip
    if streaming:
        finish()
    elif not args.json:
        print_all(out)
    return out


def dump(path: Path, model: Model, out: Generation) -> None:
    """Write what was kept; a file is complete or absent."""
    content = io.BytesIO()
    np.savez(content, positions=cached_positions(model, out), logits=out.logits)
    output.write(path, content.getvalue())


def printer(model: Model, stop: Sequence[str]) -> tuple[Callable[[int, int], None], Callable[[], None]]:
    """Functions that print text as it appears, up to a stop string, and its end."""
    stops = stopping.stops(model, stop)
    stream = None if model.tokenizer is None else stopping.Text(model.tokenizer, stops)

    def show(sequence: int, token: int) -> None:
        del sequence
        print(f"{token} " if stream is None else stream.push(token), end="", flush=True)

    def finish() -> None:
        print("" if stream is None else stream.finish(), flush=True)

    return show, finish


def print_all(out: Generation, titles: Sequence[str] = ()) -> None:
    """Print all texts under their titles, or numbered if there are several."""
    for i, sequence in enumerate(out.sequences):
        if titles or len(out.sequences) > 1:
            print(f"--- {titles[i] if titles else i + 1}")
        print(" ".join(map(str, sequence.tokens)) if sequence.text is None else sequence.text)
