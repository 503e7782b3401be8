"""The flags of a plan."""

import argparse
from pathlib import Path

from kvjax.cache.pages import LARGEST
from kvjax.cli import command
from kvjax.cli.flags import CONTEXT, DTYPES, add_method_flags
from kvjax.errors import InputError
from kvjax.methods import METHODS
from kvjax.models.named import NAMED
from kvjax.parallel import mesh
from kvjax.parallel.mesh import Size
from kvjax.plan.chips import CHIPS
from kvjax.spec import WEIGHT_BITS

PROG = "kvjax.plan"


def parser() -> command.Parser:
    """The command line's flags; those that `kvjax.generate` has too mean the same."""
    about = """Will it fit, and how fast at best? Plans a model, a method and lengths for a chip that need not be there.

    Programs are compiled for the chip ahead of time (pip install '.[aot]'), or with --estimate counted by formula."""
    p = command.Parser(prog=PROG, description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--model", metavar="M", help=f"directory, GGUF file, config.json, cached hub id, or {', '.join(NAMED)}"
    )
    p.add_argument("--chip", metavar="NAME", help=f"one of {', '.join(CHIPS)}")
    p.add_argument("--context", type=int, default=CONTEXT, metavar="N", help=f"prompt tokens (default: {CONTEXT})")
    p.add_argument("--new-tokens", type=int, default=1024, metavar="N", help="generated tokens (default: 1024)")
    p.add_argument(
        "--serve", action="store_true", help="how many such requests a server runs at once, by formula: see --longest"
    )
    p.add_argument("--longest", type=int, metavar="N", help="tokens of its longest request (default: of these)")
    p.add_argument("--seats", type=int, default=1024, metavar="N", help="most requests at once (default: 1024)")
    p.add_argument("--memory", metavar="24GB", help="usable bytes, with --serve: instead of the chip's")
    p.add_argument("--batch", type=int, default=1, metavar="N", help="sequences (default: 1)")
    add_method_flags(p, method="full")
    p.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights and cache (default: bfloat16)")
    p.add_argument(
        "--weights", choices=WEIGHT_BITS, help="matrices in so few bits, in groups of 32 (default: as stored)"
    )
    command.add_ignore_flag(p)
    p.add_argument("--estimate", action="store_true", help="by formula, nothing is compiled")
    p.add_argument("--exact", action="store_true", help="compile all layers of a step, not 2 and 4 of them")
    p.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compile the largest batch and context too, and the next ones: many minutes (default: they are estimated,"
        " by as much as the estimate missed what was compiled; never for all methods)",
    )
    p.add_argument("--all-methods", action="store_true", help="a table over methods")
    p.add_argument("--only", choices=METHODS, help=argparse.SUPPRESS)  # one of all methods
    p.add_argument("--program", help=argparse.SUPPRESS)  # the only one that `kvjax.plan.compiled` compiles
    p.add_argument(
        "--out", type=Path, nargs="?", const=Path("plan.png"), metavar="FILE.png", help="draw it (default: plan.png)"
    )
    p.add_argument("--mesh", metavar="data=2,model=4", help="devices: bytes and largest sizes are those of each")
    p.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return p


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Flags that can be followed."""
    args = command.parse(parser(), argv)
    if args.batch % devices(args).data:
        raise InputError(f"--batch {args.batch} cannot be split over the devices of --mesh {args.mesh}")
    if args.memory is not None and not args.serve:
        raise InputError("--memory is for --serve: other plans are for a --chip")
    for name, known in {"model": NAMED, "chip": CHIPS}.items():
        if getattr(args, name) is None and (name == "model" or args.memory is None):
            raise InputError(f"--{name} is missing: for example --{name} {next(iter(known))}")
    command.check_numbers(args, context=LARGEST, new_tokens=LARGEST, batch=command.MOST_SEQUENCES)
    if args.serve:
        check_serving(args)
    if args.all_methods and args.method is not None:
        raise InputError(f"--all-methods plans --method {args.method} too: leave one of them out")
    if args.estimate and args.exact:
        raise InputError("--estimate compiles nothing: leave --exact out")
    if args.estimate and args.verify:
        raise InputError("--estimate compiles nothing: leave --verify out")
    return args


def check_serving(args: argparse.Namespace) -> None:
    """Raise `InputError` for what a plan of a server does not have."""
    if args.mesh is not None or args.out is not None:
        raise InputError("--serve plans one device, as a table: leave --mesh and --out out")
    command.check_numbers(args, seats=command.MOST_SEQUENCES)
    if args.longest is not None and args.longest < args.context + args.new_tokens:
        raise InputError(f"--longest {args.longest} is less than --context and --new-tokens together")
    args.memory = None if args.memory is None else command.read_bytes(args.memory, "--memory")


def devices(args: argparse.Namespace) -> Size:
    """The mesh that the flags ask for."""
    return Size() if args.mesh is None else mesh.parse(args.mesh)
