"""Convert a Hugging Face or GGUF checkpoint to Orbax, once: `python -m kvjax.convert SRC DST`.

A DST can be converted to another --dtype, or to --weights of few bits.
"""

import argparse
import re
from pathlib import Path
from typing import get_args

import jax

from kvjax.checkpoint.header import DTYPES
from kvjax.checkpoint.lorc import ranks
from kvjax.cli import command
from kvjax.errors import InputError
from kvjax.spec import WEIGHT_BITS


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = command.Parser(prog="kvjax.convert", description=__doc__)
    parser.add_argument(
        "src", metavar="SRC", help="a Hugging Face directory with safetensors, a GGUF file, a hub id, demo, or a DST"
    )
    parser.add_argument("dst", metavar="DST", type=Path, help="the directory to make; it must not exist")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights in DST (default: as stored in SRC)")
    parser.add_argument("--weights", choices=WEIGHT_BITS, help="matrices in so few bits, in groups of 32 inputs")
    command.add_ignore_flag(parser)
    add_lorc_flags(parser)
    command.add_distributed_flag(parser)
    args = parser.parse_args(argv)
    command.run(parser.prog, lambda: _convert(args))


def _convert(args: argparse.Namespace) -> None:
    options = lorc_options(args)
    if options is None:
        jax.config.update("jax_platforms", "cpu")  # an accelerator is of no use here
    command.begin(args)
    from kvjax.checkpoint.convert import convert

    convert(args.src, args.dst, args.dtype, args.ignore_config, options, args.weights)


def add_lorc_flags(parser: argparse.ArgumentParser, basis: ranks.Basis = ranks.BASIS) -> None:
    """The flags that make keys and values low-rank; `basis` is the default of `--lorc-basis`, as help says it."""
    group = parser.add_argument_group("low-rank keys and values (LoRC)")
    how = group.add_mutually_exclusive_group()
    how.add_argument("--lorc", metavar="HOW", help="keep=60%%, keep=60%%,rule=uniform|energy, or d_max=80%%,d_min=40%%")
    how.add_argument("--lorc-ranks", type=Path, metavar="FILE", help="JSON: [keys, values] for each layer")
    group.add_argument(
        "--lorc-groups",
        default="joint",
        metavar="N",
        help="key/value heads that share a latent: joint, as in the paper, or a number such as 4, 2 or 1",
    )
    group.add_argument(
        "--lorc-basis",
        choices=get_args(ranks.Basis),
        help=f"best for the weights, as in the paper, or for what they make of a text (default: {basis})",
    )
    group.add_argument("--lorc-text", type=Path, metavar="FILE", help="that text (default: look-ups, code and prose)")
    group.add_argument("--lorc-hadamard", action="store_true", help="turn latents, so that low-bit stores lose less")


def lorc_options(args: argparse.Namespace, basis: ranks.Basis = ranks.BASIS) -> ranks.LowRankOptions | None:
    """What the flags of `add_lorc_flags` ask for, `basis` where they do not say; None if it is nothing."""
    request = ranks.parse(args.lorc) if args.lorc is not None else args.lorc_ranks
    if request is None:
        if args.lorc_groups != "joint" or args.lorc_basis or args.lorc_text or args.lorc_hadamard:
            raise InputError("--lorc-groups, --lorc-basis, --lorc-text and --lorc-hadamard need --lorc or --lorc-ranks")
        return None
    if args.lorc_groups != "joint" and not re.fullmatch("[1-9][0-9]{0,3}", args.lorc_groups):
        raise InputError(f"--lorc-groups {args.lorc_groups} is not joint or a number of key/value heads")
    basis = args.lorc_basis or basis
    if args.lorc_text is not None and basis == "plain":
        raise InputError("--lorc-text is for --lorc-basis whiten")
    heads = None if args.lorc_groups == "joint" else int(args.lorc_groups)
    return ranks.LowRankOptions(request, heads, basis, args.lorc_text, args.lorc_hadamard)


if __name__ == "__main__":
    main()
