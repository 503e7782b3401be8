"""Retrofit a checkpoint, so that it decides by itself what its cache merges (DMC) or evicts (DMS).

DST becomes a checkpoint that every command takes as --model. A run that was killed goes on where it was when it is
started again with the same flags.

--objective keep leaves the model as it is and trains the gates of fastkvzip: DST is their file. In the model's
directory as kvjax-gate.safetensors, or beside a GGUF file as FILE.gguf.kvjax-gate.safetensors, the method finds it.
"""

import argparse
import math
from pathlib import Path
from typing import TypeVar

import jax.numpy as jnp

from kvjax import compilation
from kvjax.cli import command
from kvjax.errors import InputError
from kvjax.files import output
from kvjax.methods import KERNELS
from kvjax.retrofit.options import KeepOptions, Options
from kvjax.retrofit.schedule import Schedule
from kvjax.spec import GateSpec

T = TypeVar("T")
PROG = "kvjax.retrofit"
KEEP = "keep"
FLAGS = ("model", "out", "data", "objective", "texts", "length", "batch", "final_steps", "learning_rate", "seed")
FLAGS += ("log_every", "ignore_config", "config")  # those that it has
WINDOW = {"dmc": 12, "dms": 256}  # tokens
SCALE = {"dmc": 1.0, "dms": 100.0}
FADE, FINISH, RAMP = (
    250,
    {"dmc": 2000, "dms": 34},
    {"dmc": 3000, "dms": 100},
)  # steps; the ramp's are per unit of the rate
LENGTH, LEARNING_RATE = 4096, 3e-5
DECAY = {"dmc": 0.1, "dms": 0.0}


def parser() -> command.Parser:
    """The command line's flags."""
    p = command.Parser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--model", metavar="SRC", help="Hugging Face directory, GGUF file, hub id or Orbax directory (default: demo)")
    add("--out", type=Path, metavar="DST", help="the directory to make, or to go on with")
    add(
        "--data", nargs="+", action="extend", metavar="FILE", help=".jsonl with text or tokens; others are one document"
    )
    add("--cr", type=float, default=4.0, help="compression rate: tokens per slot (default: 4)")
    add("--config", type=Path, metavar="FILE.toml", help="options from a file; flags take precedence")
    gate = p.add_argument_group("gate")
    gate.add_argument("--objective", choices=(*WINDOW, KEEP), default="dmc", help="(default: dmc)")
    gate.add_argument("--window", type=int, help="dmc: tokens that a slot remembers, 0 = all (12); dms: delay (256)")
    gate.add_argument("--neuron", type=int, default=-1, help="coordinate that the gate borrows (default: -1, the last)")
    gate.add_argument("--adapter", action="store_true", help="dms: a projection of its own, which alone is trained")
    gate.add_argument("--offset", type=float, default=5.0, help="how closed gates begin (default: 5)")
    gate.add_argument("--scale", type=float, help="of what it reads (default: dmc 1; dms 100)")
    gate.add_argument("--temperature", type=float, default=0.1, help="of relaxed decisions (default: 0.1)")
    time = p.add_argument_group("schedule")
    time.add_argument("--fade-steps", type=int, help=f"while the coordinate fades (default: {FADE}; --adapter: 0)")
    time.add_argument("--ramp-steps", type=int, help="while the rate grows (default: --cr x 3000; dms: x 100)")
    time.add_argument("--final-steps", type=int, help="at the final rate (default: 2000; dms: 34); keep: all (1000)")
    time.add_argument("--learning-rate", type=float, help="(default: 3e-5; keep: 5e-3)")
    time.add_argument("--final-learning-rate", type=float, help="of the last step (default: a tenth)")
    time.add_argument("--minutes", type=float, default=math.inf, help="stop after about so long; start again to go on")
    train = p.add_argument_group("training")
    train.add_argument("--length", type=int, help="tokens of a sequence (default: 4096; keep: 1024)")
    train.add_argument("--batch", type=int, default=1024, help="sequences of a step, keep: tokens (default: 1024)")
    train.add_argument("--texts", type=int, help="keep: sequences that are read, once each (default: 64)")
    train.add_argument("--micro-batch", type=int, default=4, help="of them, computed at once (default: 4)")
    train.add_argument("--distill", action=argparse.BooleanOptionalAction, help="be like SRC (default: only for dms)")
    train.add_argument("--teacher", metavar="M", help="--distill: be like this model instead (default: SRC)")
    train.add_argument("--penalty", type=float, default=1.0, help="weight of too many slots (default: 1)")
    train.add_argument("--dtype", choices=("float32", "bfloat16"), help="(default: float32 on CPU, else bfloat16)")
    train.add_argument("--weight-decay", type=float, help="(default: 0.1; dms: 0)")
    train.add_argument("--clip", type=float, default=1.0, help="largest norm of a gradient (default: 1)")
    train.add_argument("--remat", action=argparse.BooleanOptionalAction, default=True, help="save memory (default)")
    command.add_kernels_flag(train, "what merges keys and values", default="xla")
    train.add_argument("--seed", type=int, default=0, help="of order and noise (default: 0)")
    train.add_argument(
        "--ignore-config", action="append", default=[], metavar="FIELD", help="ignore a config.json field"
    )
    devices = p.add_argument_group("devices")
    command.add_mesh_flag(devices)
    command.add_distributed_flag(devices)
    files = p.add_argument_group("files")
    files.add_argument("--export", type=float, nargs="+", action="extend", metavar="CR", help="also write DST/rateCR")
    files.add_argument("--save-every", type=int, default=100, help="steps (default: 100)")
    files.add_argument("--keep", type=int, default=2, help="how many of those stay (default: 2)")
    files.add_argument("--log-every", type=int, default=10, help="steps (default: 10)")
    return p


def _check(args: argparse.Namespace) -> None:
    """Raise `InputError` for flags that do not go together; `Options.check` looks at what they ask for."""
    if args.out is None or not args.data:
        raise InputError("--out DST and --data FILE are needed")
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out {args.out} is a file")
    if not 1 <= args.cr <= 1000:
        raise InputError(f"--cr {args.cr:g}: tokens per slot are 1 or more")
    if args.texts is not None:
        raise InputError("--texts is for --objective keep")
    if args.adapter and args.objective != "dms":
        raise InputError("--adapter is for --objective dms")
    if args.adapter and args.fade_steps:
        raise InputError("--adapter borrows nothing that could fade: leave --fade-steps out")


def _schedule(args: argparse.Namespace) -> Schedule:
    """When what is done."""
    return Schedule(
        fade=0 if args.adapter else _chosen(args.fade_steps, FADE),
        ramp=_chosen(args.ramp_steps, math.ceil(RAMP[args.objective] * args.cr)),
        finish=_chosen(args.final_steps, FINISH[args.objective]),
        rate=args.cr,
        first_learning_rate=(rate := _chosen(args.learning_rate, LEARNING_RATE)),
        last_learning_rate=_chosen(args.final_learning_rate, rate / 10),
    )


def options(args: argparse.Namespace) -> Options:
    """What the flags ask for."""
    _check(args)
    from kvjax.models.decoder import native_dtype

    dms, schedule = args.objective == "dms", _schedule(args)
    gate = GateSpec(
        objective=args.objective,
        rate=args.cr,
        window=_chosen(args.window, WINDOW[args.objective]),
        neuron=None if args.adapter else args.neuron,
        offset=args.offset,
        scale=_chosen(args.scale, SCALE[args.objective]),
    )
    found = Options(
        model=args.model,
        files=tuple(map(Path, args.data)),
        gate=gate,
        schedule=schedule,
        length=_chosen(args.length, LENGTH),
        rows=args.batch,
        together=args.micro_batch,
        distill=_chosen(args.distill, dms),
        teacher=args.teacher,
        dtype=args.dtype or jnp.dtype(native_dtype()).name,
        temperature=args.temperature,
        penalty=args.penalty,
        weight_decay=_chosen(args.weight_decay, DECAY[args.objective]),
        clip=args.clip,
        remat=args.remat,
        kernels=KERNELS[args.kernels],
        seed=args.seed,
        export=tuple(args.export or ()),
        log_every=args.log_every,
        save_every=args.save_every,
        keep=args.keep,
        minutes=args.minutes,
        mesh=args.mesh,
        ignore=tuple(args.ignore_config),
    )
    found.check()
    return found


def keep_options(args: argparse.Namespace, p: command.Parser) -> KeepOptions:
    """What the flags ask for with --objective keep."""
    if args.out is None:
        raise InputError("--out FILE is needed")
    for name, value in vars(args).items():
        if name not in FLAGS and value != p.get_default(name):
            raise InputError(f"--{name.replace('_', '-')} is not for --objective keep")
    output.check_writable(args.out)
    given = {"texts": args.texts, "steps": args.final_steps, "length": args.length, "learning_rate": args.learning_rate}
    found = KeepOptions(
        model=args.model,
        files=tuple(map(Path, args.data or ())),
        batch=args.batch,
        seed=args.seed,
        log_every=args.log_every,
        ignore=tuple(args.ignore_config),
        **{name: value for name, value in given.items() if value is not None},
    )
    found.check()
    return found


def _chosen(given: T | None, default: T) -> T:
    return default if given is None else given


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    p = parser()
    args = p.parse_args(argv)
    if args.config is not None:
        flags = command.config_flags(args.config, command.read_config(args.config), p, args)
        args = p.parse_args([*flags, *command.given(argv)])
    command.begin(args)
    chosen = keep_options(args, p) if args.objective == KEEP else options(args)
    compilation.enable_compilation_cache()
    from kvjax.retrofit import run

    if isinstance(chosen, KeepOptions):
        run.keep(chosen, args.out)
    else:
        run.run(chosen, args.out)


if __name__ == "__main__":
    command.run(PROG, main)
