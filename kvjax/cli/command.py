"""What the command lines share: one clear line for bad input, TOML configs, several processes."""

import argparse
import itertools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from kvjax import interrupts
from kvjax.compilation import announced
from kvjax.errors import InputError, one_line, unknown
from kvjax.files.text import read_toml
from kvjax.methods import KERNELS, read_entry

HEARTBEAT = 30  # seconds without a sign of life until a process counts as dead
MOST_SEQUENCES = 2**16
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def run(prog: str, main: Callable[[], None]) -> None:
    """Run a command; bad input is one line on stderr and exit code 2."""
    try:
        with announced():
            main()
    except InputError as error:
        fail(prog, str(error))
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        line = f"{called(prog)}: error: another process of the run has ended ({str(error).splitlines()[0]})"
        print(line, file=sys.__stderr__)
        os._exit(1)  # the others do not answer when this one says that it leaves
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a name too long for a file, a full disk
        fail(prog, f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except MemoryError as error:
        fail(prog, f"there is not enough memory: {error}" if str(error) else "there is not enough memory")
    except KeyboardInterrupt:  # where `kvjax.interrupts` does not listen
        sys.exit(interrupts.STATUS)


def fail(prog: str, message: str) -> None:
    """Exit with code 2 and one line on stderr."""
    print(f"{called(prog)}: error: {one_line(message)}", file=sys.stderr)
    sys.exit(2)


def called(prog: str) -> str:
    """A command's name as it was called: `kvjax.bench decode`, or `kvjax bench decode` by `kvjax.__main__`."""
    spaced = prog.replace(".", " ", 1)
    return spaced if spaced.split()[:2] == sys.argv[0].split(" ") else prog


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line; `prog` is what the command is called by."""

    def __init__(self, prog: str, **settings: Any):
        super().__init__(called(prog), **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse `--flag=--`, which some releases of argparse read as an empty list."""
        for arg in given(args):
            if arg.startswith("--") and arg.endswith("=--"):
                self.error(f"argument {arg.partition('=')[0]}: -- is no value")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Exit with code 2."""
        fail(self.prog, f"{message} (see --help)")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Flags, with the options of the `--config` file before them; `arguments` are the method's own, from both."""
    args = parser.parse_args(argv)
    arguments = {}
    if args.config is not None:
        config = read_config(args.config)
        arguments = config.pop("arguments", {})
        flags = config_flags(args.config, config, parser, args)
        args = parser.parse_args([*flags, *given(argv)])
    entry, settings = {}, read_settings(args.set)
    if args.method is not None:
        args.method, entry = read_entry(args.method)
    by = {"a flag": flag_arguments(args), "--set": settings, "--method": entry}
    for one, other in itertools.combinations(by, 2):
        for key in by[one].keys() & by[other].keys():
            raise InputError(f"{key} is given twice: by {one} and by {other}")
    args.arguments = arguments | flag_arguments(args) | settings | entry
    return args


def given(argv: list[str] | None) -> list[str]:
    """What the command line says."""
    return sys.argv[1:] if argv is None else argv


def flag_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that are arguments of a method."""
    decoding = {} if args.decode_budget is None else {"decode_budget": args.decode_budget}
    return decoding | stores(args)


def add_store_flags(parser: argparse.ArgumentParser) -> None:
    """Flags for number formats, and for what reads them."""
    names = "dense, int8, int4, int3, int2, fp8, kivi4, kivi2"
    parser.add_argument("--store", metavar="NAME", help=f"number format of the cache: {names} (default: dense)")
    parser.add_argument("--key-store", metavar="NAME", help="of keys (default: --store)")
    parser.add_argument("--value-store", metavar="NAME", help="of values (default: --store)")
    parser.add_argument("--low-store", metavar="NAME", help="of mikv's unimportant tokens (default: int2)")
    add_kernels_flag(parser, "what reads the cache")


def add_kernels_flag(parser: Any, what: str, default: str | None = None) -> None:
    """The flag for kernels; `parser` may be a group of one."""
    help_ = f"{what}; cpu = in C++ on CPUs, else xla; auto = the platform's kernel (default: {default or 'cpu'})"
    parser.add_argument("--kernels", choices=KERNELS, default=default, help=help_)


def check_numbers(args: argparse.Namespace, **most: int) -> None:
    """Raise `InputError` for a number that is not from 1 to the most of its flag; None is none."""
    for name, largest in most.items():
        number = getattr(args, name)
        if number is not None and not 1 <= number <= largest:
            raise InputError(f"--{name.replace('_', '-')} {number} is not a whole number from 1 to {largest}")


def read_bytes(text: str, flag: str) -> int:
    """A size as people write it.

    >>> read_bytes("1.5GB", "--memory"), read_bytes("80GiB", "--memory")
    (1500000000, 85899345920)
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if found is None or found[2] not in UNITS:
        raise InputError(f"{flag} {text!r} is not a size such as 16GB or 80GiB")
    return int(float(found[1]) * UNITS[found[2]])


def stores(args: argparse.Namespace) -> dict[str, str]:
    """The flags for number formats and kernels as arguments of a method."""
    found = {} if args.store is None else {"store": args.store}
    if args.kernels is not None:
        found["kernels"] = args.kernels
    if args.key_store is not None or args.value_store is not None:
        both = args.store or "dense"
        if "/" in both or both.startswith("kivi"):
            raise InputError(f"--store {both} says what keys and values are: leave --key-store and --value-store out")
        found["store"] = f"{args.key_store or both}/{args.value_store or both}"
    return found if args.low_store is None else found | {"low_store": args.low_store}


def read_config(path: Path) -> dict[str, Any]:
    """The options of a TOML file."""
    config = read_toml(path)
    if not isinstance(config.get("arguments", {}), dict):
        raise InputError(f"{path}: 'arguments' is a table: write [arguments] and one line per argument")
    return config


def config_flags(
    path: Path, config: dict[str, Any], parser: argparse.ArgumentParser, given: argparse.Namespace
) -> list[str]:
    """A config's options as flags, to be put before the given ones, so that the parser checks them.

    Args:
      path: where they come from, for errors.
      config: long flag names with underscores and their values.
      parser: knows the flags.
      given: what the command line says; a repeatable flag that is given replaces the config's.
    """
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config", "set")}
    flags: list[str] = []
    for key, value in config.items():
        if any("\0" in item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)):
            raise InputError(f"{path}: {key} has a null character, which no name of a file and no text has")
        if key not in actions:
            raise InputError(f"{path}: {unknown('option', key, sorted(actions))}")
        flag, kind = actions[key].option_strings[-1], type(actions[key]).__name__
        if kind == "_StoreTrueAction":
            if not isinstance(value, bool):
                raise InputError(f"{path}: {key} = {value!r} is not true or false")
            flags += [flag] * value
        elif kind == "BooleanOptionalAction":
            if not isinstance(value, bool):
                raise InputError(f"{path}: {key} = {value!r} is not true or false")
            flags.append(flag if (flag.startswith("--no-") != value) else actions[key].option_strings[0])
        elif kind in ("_AppendAction", "_ExtendAction"):
            items = str if actions[key].type is None else str | int | float
            if not isinstance(value, list) or not all(isinstance(item, items) for item in value):
                raise InputError(
                    f"{path}: {key} = {value!r} is not a list of {'strings' if items is str else 'numbers'}"
                )
            flags += [] if getattr(given, key) else [f"{flag}={item}" for item in value]
        elif isinstance(value, bool) or not isinstance(value, str | int | float):
            raise InputError(f"{path}: {key} = {value!r} is not a string or a number")
        else:
            flags.append(f"{flag}={value}")
    return flags


def read_settings(pairs: list[str]) -> dict[str, str]:
    """`--set key=value` flags as a dict."""
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InputError(f"--set {pair!r} is not key=value")
        settings[key] = value
    return settings


def add_ignore_flag(parser: Any) -> None:
    """The flag for fields of a model's configuration that kvjax does not know."""
    parser.add_argument(
        "--ignore-config", action="append", default=[], metavar="FIELD",
        help="repeatable; treat this field of config.json as absent",
    )  # fmt: skip


def add_mesh_flag(parser: Any) -> None:
    """The flag for more devices than one."""
    parser.add_argument(
        "--mesh", metavar="data=2,model=4", help="split sequences over data, weights and heads over model devices"
    )


def add_distributed_flag(parser: Any) -> None:
    """The flag for several processes."""
    parser.add_argument(
        "--distributed", nargs="?", const="", metavar="HOST:PORT,COUNT,INDEX",
        help="one of several processes, each with devices of its own: where the first listens, how many they are,"
        " which this is (default: what the cluster says)",
    )  # fmt: skip


def begin(args: argparse.Namespace) -> None:
    """Join the other processes, if there are any; only the first one prints."""
    if args.distributed is None:
        return
    settings: dict[str, Any] = {}
    if args.distributed:
        found = re.fullmatch(r"(.+:\d{1,5}),(\d{1,6}),(\d{1,6})", args.distributed)
        if found is None or not int(found[3]) < int(found[2]):
            raise InputError(f"--distributed {args.distributed!r} is not HOST:PORT,COUNT,INDEX, INDEX from 0")
        settings = dict(coordinator_address=found[1], num_processes=int(found[2]), process_id=int(found[3]))
    try:
        jax.distributed.initialize(**settings, heartbeat_timeout_seconds=HEARTBEAT)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"--distributed: {str(error).splitlines()[0]}") from None
    ours = os.devnull if jax.process_index() else os.dup(1)
    os.dup2(2, 1)  # libraries announce their connections on standard output
    sys.stdout = open(ours, "w")
