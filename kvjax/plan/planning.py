"""What `kvjax.plan` does once its flags are read: a plan for each method, and what fits."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from kvjax.cli.console import to_stdout
from kvjax.errors import InputError
from kvjax.methods import LEARNED, METHODS
from kvjax.models.quantized import asked
from kvjax.plan import compiled, report, search
from kvjax.plan.chips import Chip
from kvjax.plan.estimate import bound, estimate
from kvjax.plan.search import MOST, UNIT, Largest
from kvjax.plan.settings import Setting, find_model, method_of, setting
from kvjax.spec import ModelSpec

FLAGS = {"batch": "--batch", "context": "--context"}


def run(args: argparse.Namespace, argv: Sequence[str], chip: Chip) -> None:
    """Plan what the flags `argv`, read as `args`, ask for, and print it."""
    spec, source = find_model(args.model, args.ignore_config)
    spec = asked(spec, args.weights)
    if args.all_methods:
        plans, left_out = plan_all(args, argv, spec, chip)
    else:
        method = method_of(args, spec)
        plans, left_out = [plan_one(args, argv, setting(args, spec, chip, method), chip)], {}
    found = report.described(args, chip, spec, source, plans, left_out)
    if args.out is not None:
        report.draw(args.out, found)
    if args.json:
        print(json.dumps(found))
    else:
        report.show(to_stdout(), found)


def plan_all(
    args: argparse.Namespace, argv: Sequence[str], spec: ModelSpec, chip: Chip
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A plan for every method, and why others have none."""
    plans, left_out = [], {}
    for method in METHODS:
        if method in LEARNED and (spec.gate is None or spec.gate.objective != method):
            left_out[method] = "its model is made by python -m kvjax.retrofit"
            continue
        try:
            planned = setting(args, spec, chip, method)
            plans.append(plan_one(args, [*argv, "--only", method], planned, chip))
        except InputError as error:
            left_out[method] = str(error)
    return plans, left_out


def plan_one(args: argparse.Namespace, argv: Sequence[str], planned: Setting, chip: Chip) -> dict[str, Any]:
    """A plan as plain data."""
    if args.estimate:
        parts, about = estimate(planned), {"compiled": False, "refused": [], "guessed": []}
    else:
        print(
            f"compiling {planned.recipe.name} for {chip.name} (minutes; --estimate goes by formula) ...",
            file=sys.stderr,
            flush=True,
        )
        measured = compiled.measure(argv, chip, planned, exact=args.exact)
        parts = measured.parts
        about = {"compiled": True, "refused": measured.refused, "guessed": measured.guessed}
        about["programs"] = measured.programs
    return {
        "method": planned.recipe.name,
        "stores": [store.name for store in planned.recipe.stores],
        "bytes": parts._asdict() | {"cache": parts.cache, "peak": parts.peak},
        "fits": parts.peak <= chip.usable and not about["refused"],
        "largest": {
            name: _largest(name, args, argv, planned, chip, parts.peak)._asdict() for name in ("batch", "context")
        },
        "bound": bound(planned, chip)._asdict(),
        **about,
    }


def _largest(
    name: str, args: argparse.Namespace, argv: Sequence[str], planned: Setting, chip: Chip, peak: int
) -> Largest:
    """The largest batch or context that fits, the other one being as planned."""
    unit = UNIT[name] * (planned.devices.data if name == "batch" else 1)
    most = MOST[name] // unit
    changed = lambda n: planned._replace(**{name: n * unit})

    def needs(n: int) -> int:
        try:
            return estimate(changed(n)).peak
        except InputError:  # more pages than tables can number
            return 2**62

    if args.estimate or args.all_methods or not args.verify:
        missed = peak / estimate(planned).peak  # 1 if nothing was compiled
        size = search.largest(lambda n: int(needs(n) * missed), chip.usable, most)
        return Largest(size * unit, False)

    def measured(n: int) -> int:
        print(f"compiling at a {name} of {n * unit:,} ...", file=sys.stderr, flush=True)
        changes = (FLAGS[name], str(n * unit))
        found = compiled.measure(argv, chip, changed(n), exact=args.exact, changes=changes)
        return max(found.parts.peak, chip.usable + 1 if found.refused else 0)

    at = -(-getattr(planned, name) // unit)
    if getattr(planned, name) % unit:
        peak = measured(at)
    found = search.verified(needs, measured, chip.usable, most, (at, peak))
    return found._replace(size=found.size * unit)
