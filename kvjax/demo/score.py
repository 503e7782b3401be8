"""Score a model on line retrieval: `python -m kvjax.demo.score --method snapkv --budget 20%`.

A prompt is a list of lines and one question about a line at a uniformly random depth; an answer counts when both of
its numbers are exact. The prompts are a function of the seed and the length, and were never trained on.
"""

import argparse
import json
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from kvjax import command, generation
from kvjax.cache.policy import Recipe
from kvjax.demo import lines
from kvjax.errors import InputError
from kvjax.generation import Model
from kvjax.methods import METHODS, default_budget, make

PROG = "kvjax.demo.score"
BATCH_TOKENS = 8192  # tokens of the prompts that are answered at once


def prompts(seed: int, tokens: int, samples: int) -> tuple[list[str], list[str]]:
    """Prompts of one length and their answers."""
    rng = lines.scoring_rng(seed, tokens)
    pairs = [lines.prompt(rng, tokens) for _ in range(samples)]
    return [prompt for prompt, _ in pairs], [answer for _, answer in pairs]


def answers(model: Model, prompts: Sequence[str], recipe: Recipe | None = None) -> list[str]:
    """What the model says after each prompt, greedily, up to the length of an answer."""
    longest = max(len(generation.tokens(model, prompt)) for prompt in prompts)
    rows, out = max(1, BATCH_TOKENS // longest), []
    for start in range(0, len(prompts), rows):
        chunk = prompts[start : start + rows]
        padded = [*chunk, *[chunk[0]] * (rows - len(chunk))]  # one shape, compiled once
        given = generation.generate(model, padded, recipe, max_new_tokens=lines.ANSWER_TOKENS)
        out += [sequence.text or "" for sequence in given.sequences[: len(chunk)]]
    return out


def score(model: Model, tokens: int, samples: int, seed: int, recipe: Recipe | None = None) -> float:
    """Share of prompts of `tokens` tokens that are answered exactly."""
    asked, expected = prompts(seed, tokens, samples)
    return float(np.mean([got == answer for got, answer in zip(answers(model, asked, recipe), expected, strict=True)]))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = command.Parser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", metavar="M", help="Hugging Face or Orbax directory with the demo's tokenizer (default: demo)")
    add("--lengths", default="128,256,512,1024", help="prompt lengths [tokens] (default: 128,256,512,1024)")
    add("--samples", type=int, default=200, metavar="N", help="prompts per length (default: 200)")
    add("--seed", type=int, default=0, help="of the prompts (default: 0)")
    add("--method", default="full", metavar="NAME", help=f"one of {', '.join(METHODS)} (default: full)")
    add("--budget", metavar="512|20%", help="slots per row, in tokens or as a share of the prompt")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="an argument of the method")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args(argv)
    try:
        args.lengths = [int(length) for length in args.lengths.split(",")]
    except ValueError:
        raise InputError(f"--lengths {args.lengths!r} is not a list of lengths such as 128,256") from None
    if args.samples < 1:
        raise InputError(f"--samples {args.samples} is not at least 1")
    return args


def main(argv: list[str] | None = None) -> None:
    """Print the share of exact answers per length."""
    args = parse(argv)
    budget = default_budget(args.method) if args.budget is None else args.budget
    recipe = make(args.method, budget, command.read_settings(args.set))
    command.use_compilation_cache()
    model = generation.load(args.model)
    exact = {length: score(model, length, args.samples, args.seed, recipe) for length in args.lengths}
    if args.json:
        setting = {"model": model.name, "method": args.method, "budget": budget}
        print(json.dumps({**setting, "samples": args.samples, "seed": args.seed, "exact": exact}))
        return
    name = f"{args.method} {budget or ''}".strip()
    table = Table("tokens", f"exact, {name}")
    for length, share in exact.items():
        table.add_row(str(length), f"{share:.1%}")
    console = Console()
    console.print(f"line retrieval, {model.name} model, {args.samples} prompts per length")
    console.print(table)


if __name__ == "__main__":
    command.run(PROG, main)
