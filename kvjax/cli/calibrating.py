"""What `kvjax.calibrate` does once its flags are read: load, measure, write."""

import argparse
import functools

from rich.console import Console
from rich.progress import track

from kvjax.checkpoint.identity import fingerprint
from kvjax.cli.console import to_stdout
from kvjax.cli.flags import numbers
from kvjax.generation.calibrate import calibrate, sample
from kvjax.generation.model import load_from
from kvjax.policies.budgets import profile


def run(args: argparse.Namespace, text: str | None) -> None:
    """Measure how a model shares a budget on a text; None = the shipped one."""
    model, directory = load_from(args.model, **numbers(args), ignore_config=args.ignore_config)
    counted = functools.partial(track, description="calibrating", console=Console(stderr=True))
    found = calibrate(model, args.method, sample(model, text), counted)
    profile.write(args.out, found, fingerprint(directory), args.method)
    layers, levels = len(found.shares[0]), len(found.levels)
    to_stdout().print(f"{args.out}: shares of {layers} layers at {levels} levels", markup=False, highlight=False)
