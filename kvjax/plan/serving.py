"""How many requests an engine runs side by side in a chip's memory, beside the full cache."""

import argparse
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Column, Table

from kvjax.cli.console import to_stdout
from kvjax.engine import capacity
from kvjax.engine.capacity import Asked
from kvjax.engine.schedule import READERS
from kvjax.errors import InputError
from kvjax.methods import METHODS, label_of
from kvjax.models.quantized import asked
from kvjax.plan.chips import GIB, Chip
from kvjax.plan.estimate import decode_temporaries, prefill_temporaries, waiting, weights
from kvjax.plan.report import named
from kvjax.plan.settings import Setting, find_model, method_of, setting

SEATS = 1024  # most that are tried


class Room(NamedTuple):
    """What an engine has room for."""

    method: str
    weights: int  # bytes
    reading: int  # bytes beside the cache: prompts that are read, and a step
    cache: int  # bytes that are left for the pools
    seats: int  # to give it; 0 = not one of the largest requests fits
    at_once: int  # requests of the asked size
    pages: tuple[int, ...]  # of each tier, in these bytes
    promised: tuple[int, ...]  # of these, to one request of the asked size


def room(planned: Setting, longest: int, usable: int, most: int = SEATS) -> Room:
    """What an engine with requests of a setting's lengths has room for.

    Args:
      planned: `context` and `new` are of the usual request.
      longest: tokens of the longest one, new ones included.
      usable: bytes of the device.
      most: seats.
    """
    recipe, size = planned.recipe, Asked(planned.context, planned.new)
    one = capacity.kind_of(planned.model.decoder, recipe, 1, longest, planned.platform)
    reads = planned._replace(batch=1, context=longest - 1, new=1)
    stored = sum(weights(reads))
    beside = READERS * (one.one_bytes + waiting(reads) + prefill_temporaries(reads))
    step, left = decode_temporaries(reads), max(usable - stored - beside, 0)
    seats = min(capacity.at_once(one, left, size, step), most)
    cache = max(left - seats * step, 0)
    kind = capacity.kind_of(planned.model.decoder, recipe, max(seats, 1), longest, planned.platform)
    pages, promised = capacity.within(kind.shapes, cache, kind.longest) if seats else (), kind.promise(*size)
    count = min((seats, *(n // each for n, each in zip(pages, promised, strict=True)))) if seats else 0
    return Room(recipe.name, stored, beside, cache, seats, count, pages, promised)


def run(args: argparse.Namespace, chip: Chip) -> None:
    """Plan what the flags ask for, and print it."""
    spec, source = find_model(args.model, args.ignore_config)
    spec = asked(spec, args.weights)
    longest = args.longest or args.context + args.new_tokens
    methods = METHODS if args.all_methods else dict.fromkeys(("full", method_of(args, spec)))
    rooms, left_out = [], {}
    for method in methods:
        try:
            own = args if method == method_of(args, spec) or args.all_methods else _without_method(args)
            rooms.append(room(setting(own, spec, chip, method), longest, chip.usable, args.seats))
        except InputError as error:
            if not args.all_methods:
                raise
            left_out[method] = str(error)
    about = {"model": args.model, "shape": source, "dtype": args.dtype, "context": args.context}
    about |= {"new_tokens": args.new_tokens, "longest": longest, "budget": args.budget, "chip": chip._asdict()}
    if args.json:
        print(json.dumps(about | {"serving": [each._asdict() for each in rooms], "left_out": left_out}))
    else:
        _show(to_stdout(), about, rooms, left_out)


def _without_method(args: argparse.Namespace) -> argparse.Namespace:
    """The same for `full`, as it comes."""
    return argparse.Namespace(**vars(args) | {"method": "full", "budget": None, "arguments": {}})


def _show(console: Console, about: dict[str, Any], rooms: Sequence[Room], left_out: dict[str, str]) -> None:
    chip = about["chip"]
    asked = f"requests of {about['context']:,} + {about['new_tokens']:,} tokens, at most {about['longest']:,}"
    title = f"{named(about)} in {about['dtype']}, {asked}, in {chip['usable'] / GIB:.2f} GiB"
    console.print(f"{title} of {chip['name']}", highlight=False, markup=False)
    columns = ("weights GiB", "reading GiB", "cache GiB", "pages", "a request", "seats", "at once", "x full")
    table = Table("method", *(Column(name, justify="right") for name in columns))
    full = next((each.at_once for each in rooms if each.method == "full"), 0)
    for each in rooms:
        sizes = (f"{n / GIB:.2f}" for n in (each.weights, each.reading, each.cache))
        tiers = (" + ".join(f"{n:,}" for n in pages) for pages in (each.pages, each.promised))
        times = f"{each.at_once / full:.1f}" if full else ""
        budget = f" {about['budget']}" if about["budget"] and each.method != "full" else ""
        table.add_row(label_of(each.method) + budget, *sizes, *tiers, f"{each.seats:,}", f"{each.at_once:,}", times)
    console.print(table)
    for method, why in left_out.items():
        console.print(f"{method}: left out, {why}", highlight=False, markup=False)
