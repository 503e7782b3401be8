"""Flags that mean the same in every command."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from kvjax.cli import command
from kvjax.errors import say_once
from kvjax.generation.sampling import SETTINGS, Sampling
from kvjax.methods import METHODS
from kvjax.spec import DTYPES as NAMES
from kvjax.spec import WEIGHT_BITS

if TYPE_CHECKING:
    from kvjax.generation.model import Model

SHOWCASE_METHOD = "snapkv"  # of a run without a prompt
CHAT_LENGTH = 4096  # tokens of a conversation, unless it is said
CONTEXT = 4096  # prompt tokens of a cache that is only planned
DTYPES = {name: getattr(jnp, name) for name in NAMES}


def add_shared_flags(p: argparse.ArgumentParser, *, method: str, many: str = "") -> None:
    """Flags that mean the same in every command that runs prompts through a method.

    Args:
      p: the command's parser.
      method: the default one, for its help.
      many: what the help of a prompt begins with.
    """
    p.add_argument(
        "--model", metavar="M", help="Hugging Face directory, GGUF file, hub id or Orbax directory (default: demo)"
    )
    p.add_argument("--prompt", action="append", metavar="TEXT", help=f"{many}- reads standard input")
    p.add_argument("--prompt-file", action="append", metavar="FILE", help=f"{many}a prompt from a file")
    p.add_argument("--prompt-tokens", action="append", metavar="1,2,3", help=f"{many}a prompt as token ids")
    p.add_argument("--chat", action="store_true", help="wrap a prompt in the checkpoint's chat template")
    add_method_flags(p, method=method)
    add_number_flags(p)
    command.add_mesh_flag(p)
    command.add_distributed_flag(p)
    command.add_ignore_flag(p)
    p.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def add_number_flags(p: argparse.ArgumentParser) -> None:
    """Flags that say which numbers a model has; `numbers` reads them."""
    p.add_argument("--dtype", choices=DTYPES, help="of weights and cache (default: float32 on CPU, else bfloat16)")
    p.add_argument(
        "--weights", choices=WEIGHT_BITS, help="matrices in so few bits, in groups of 32 (default: as stored)"
    )


def numbers(args: argparse.Namespace) -> dict[str, Any]:
    """What `load` is given of `add_number_flags`."""
    return {"dtype": DTYPES.get(args.dtype), "weights": args.weights}


def add_sampling_flags(p: argparse.ArgumentParser) -> None:
    """Flags that say how tokens are chosen; `sampling` reads them."""
    p.add_argument(
        "--temperature", type=float, help="0 is greedy (default: 0; in chats, of this and the next: as the model says)"
    )
    p.add_argument("--top-k", type=int, help="0 keeps all tokens (default: 0)")
    p.add_argument("--top-p", type=float, help="(default: 1)")
    p.add_argument("--min-p", type=float, help="(default: 0)")
    p.add_argument("--repetition-penalty", type=float, help="1 is off (default: 1)")
    p.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help=r"repeatable; text ends before it; a line: $'\n'"
    )
    p.add_argument("--seed", type=int, default=0, help="of the first prompt; prompt i has SEED + i (default: 0)")


def sampling(args: argparse.Namespace, model: "Model | None" = None) -> Sampling:
    """How tokens are chosen, once it makes sense: as flags say, else as a chat model itself does, which is said.

    Args:
      args: with the flags of `add_sampling_flags`.
      model: the one to chat with; None = only flags count.
    """
    given = {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}
    own = Sampling() if model is None else model.sampling
    if given.get("temperature") == 0:  # filters have nothing to act on
        own = Sampling(repetition_penalty=own.repetition_penalty)
    if model is not None and (taken := own.changed([name for name in SETTINGS if name not in given])):
        say_once(f"sampling as {model.sampling_source} says: {', '.join(taken)}")
    found = own._replace(**given, seed=args.seed)
    found.check()
    return found


def add_method_flags(p: argparse.ArgumentParser, *, method: str) -> None:
    """Flags that say which method and how, as a config file does."""
    p.add_argument(
        "--method",
        metavar="NAME",
        help=f"one of {', '.join(METHODS)}; or with arguments, h2o+store=int4 (default: {method})",
    )
    p.add_argument("--budget", metavar="512|20%", help="slots per row, in tokens or as a share of the prompt")
    p.add_argument("--decode-budget", metavar="512|20%", help="slots per row while decoding (default: by method)")
    command.add_store_flags(p)
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an argument of the method")
    p.add_argument("--config", type=Path, metavar="FILE.toml", help="options from a file; flags take precedence")
