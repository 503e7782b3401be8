"""What `kvjax.generate` does with a context: read it or load it, save it, ask it."""

import argparse
import json

from kvjax.cli import flags
from kvjax.cli.console import to_stdout
from kvjax.cli.flags import numbers
from kvjax.cli.generating import dump, print_all, show
from kvjax.cli.tables import describe, dtype_of, heading, summary
from kvjax.generation.context import Context
from kvjax.generation.model import load
from kvjax.generation.sampling import Sampling
from kvjax.methods import write_entry


def run(
    args: argparse.Namespace,
    prompts: list[str | list[int]],
    method: str,
    budget: str | int | None,
    sampling: Sampling,
) -> None:
    """Answer the questions to a prompt, or to a file's context; write it first, if asked to."""
    model = load(args.model, **numbers(args), ignore_config=args.ignore_config, mesh=args.mesh)
    if args.context is not None:
        context = model.load_context(args.context)
        assert context.named is not None
        budget = context.named[1]
    else:
        context = model.read(
            prompts[0], write_entry(method, args.arguments), budget, prefill_chunk=args.prefill_chunk,
            max_length=args.max_length, chat=args.chat,
        )  # fmt: skip
    sampling = flags.sampling(args, model) if context.chat else sampling
    console = to_stdout()
    if args.save_context is not None:
        context.save(args.save_context)
    if not args.json:
        name = args.context or args.save_context or "the prompt"
        console.print(f"{name}: {_size(context)}", soft_wrap=True, highlight=False)
    if not args.question:
        return
    how = {"max_new_tokens": args.max_new_tokens, "sampling": sampling, "stop": args.stop}
    if len(args.question) == 1 and not args.json and not args.no_stream:
        out = show(context.stream(args.question[0], **how))
    else:
        out = context.ask(args.question, **how)
        if not args.json:
            print_all(out, [" ".join(question.split()) for question in args.question])
    if args.json:
        print(json.dumps(describe(model, out, budget)), flush=True)
    else:
        console.print(summary([out], [heading(context.recipe, budget)], dtype_of(model)))
    if args.dump_cache is not None:
        dump(args.dump_cache, model, out)


def _size(context: Context) -> str:
    size, full, compared, _ = context.footprint
    return (
        f"{len(context.tokens):,} tokens, {context.recipe.name}, {size.total:,} bytes; the full cache {full:,};"
        f" {compared.share:.1%} of it, both in 16 bits"
    )
