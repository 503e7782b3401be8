"""What is planned: the flags, and what they mean."""

import argparse
import functools
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from kvjax import methods
from kvjax.cache.pages import LARGEST
from kvjax.cli import command
from kvjax.cli.flags import DTYPES
from kvjax.errors import InputError
from kvjax.generation import prefill
from kvjax.generation.model import Model
from kvjax.methods import METHODS, default_budget, make
from kvjax.models.named import NAMED, named
from kvjax.parallel import mesh
from kvjax.parallel.collectives import HEADS
from kvjax.parallel.mesh import Size
from kvjax.plan.chips import CHIPS, Chip, Platform
from kvjax.plan.dry_run import read_spec, without_weights
from kvjax.policies.base import Recipe
from kvjax.spec import WEIGHT_BITS, Lengths, ModelSpec

PROG = "kvjax.plan"


class Setting(NamedTuple):
    """What is planned; hashable."""

    spec: ModelSpec
    dtype: str
    recipe: Recipe
    context: int  # tokens of each prompt
    new: int  # tokens that may follow
    batch: int
    platform: Platform
    devices: Size = Size()

    @property
    def mesh(self) -> AbstractMesh | None:
        """The mesh, of devices that need not be there; None = one device."""
        return None if self.devices == Size() else mesh.imagined(self.devices, self.spec)

    @property
    def share(self) -> "Setting":
        """What one device has, as if it were alone: fewer sequences, heads and hidden numbers."""
        if self.mesh is None:
            return self
        own = mesh.share(self.spec, self.mesh.shape[HEADS])
        own = replace(own, mlp_dim=own.mlp_dim // self.devices.model)
        return self._replace(spec=own, batch=self.batch // self.devices.data, devices=Size())

    @property
    def lengths(self) -> Lengths:
        """What a cache is made for."""
        padded = prefill.padded_length(self.context)
        return Lengths((self.context,) * self.batch, self.new, padded, self.devices.data, self.platform)

    @property
    def model(self) -> Model:
        """Shapes only."""
        return _model(self.spec, self.dtype, self.mesh)


@functools.lru_cache(maxsize=64)
def _model(spec: ModelSpec, dtype: str, devices: AbstractMesh | None) -> Model:
    model = without_weights(spec, jnp.dtype(dtype), None, "")
    return replace(model, decoder=mesh.placed(devices, mesh.weights, model.decoder))


def parser() -> command.Parser:
    """The command line's flags; those that `kvjax.generate` has too mean the same."""
    about = """Will it fit, and how fast at best? Plans a model, a method and lengths for a chip that need not be there.

    Programs are compiled for the chip ahead of time (pip install '.[aot]'), or with --estimate counted by formula."""
    p = command.Parser(prog=PROG, description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--model", metavar="M", help=f"directory, GGUF file, config.json, cached hub id, or {', '.join(NAMED)}"
    )
    p.add_argument("--chip", metavar="NAME", help=f"one of {', '.join(CHIPS)}")
    p.add_argument("--context", type=int, default=4096, metavar="N", help="prompt tokens (default: 4096)")
    p.add_argument("--new-tokens", type=int, default=1024, metavar="N", help="generated tokens (default: 1024)")
    p.add_argument("--batch", type=int, default=1, metavar="N", help="sequences (default: 1)")
    p.add_argument("--method", metavar="NAME", help=f"one of {', '.join(METHODS)} (default: full)")
    p.add_argument("--budget", metavar="512|20%", help="slots per row, in tokens or as a share of the prompt")
    p.add_argument("--decode-budget", metavar="512|20%", help="slots per row while decoding (default: by method)")
    command.add_store_flags(p)
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an argument of the method")
    p.add_argument("--config", type=Path, metavar="FILE.toml", help="options from a file; flags take precedence")
    p.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights and cache (default: bfloat16)")
    p.add_argument(
        "--weights", choices=WEIGHT_BITS, help="matrices in so few bits, in groups of 32 (default: as stored)"
    )
    p.add_argument("--ignore-config", action="append", default=[], metavar="FIELD", help="ignore a config.json field")
    p.add_argument("--estimate", action="store_true", help="by formula, nothing is compiled")
    p.add_argument("--exact", action="store_true", help="compile all layers of a step, not 2 and 4 of them")
    p.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile the largest batch and context too, and the next ones (default: yes, but not for all methods)",
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
    for name, known in {"model": NAMED, "chip": CHIPS}.items():
        if getattr(args, name) is None:
            raise InputError(f"--{name} is missing: for example --{name} {next(iter(known))}")
    command.check_numbers(args, context=LARGEST, new_tokens=LARGEST, batch=command.MOST_SEQUENCES)
    if args.all_methods and args.method is not None:
        raise InputError(f"--all-methods plans --method {args.method} too: leave one of them out")
    if args.estimate and args.exact:
        raise InputError("--estimate compiles nothing: leave --exact out")
    return args


def devices(args: argparse.Namespace) -> Size:
    """The mesh that the flags ask for."""
    return Size() if args.mesh is None else mesh.parse(args.mesh)


def find_model(name: str, ignore: Collection[str] = ()) -> tuple[ModelSpec, str]:
    """The shape of a model and where it is from; nothing is downloaded.

    Args:
      name: a directory, GGUF file or `config.json`, a key of `NAMED`, or a hub id whose config is in the hub's cache or
        whose shape is known.
      ignore: config fields that may be ignored although kvjax does not know them.
    """
    path, known = Path(name), named(name)
    if path.exists():
        return read_spec(path, ignore), f"{path if path.is_file() else path / 'config.json'}"
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        import huggingface_hub

        found = huggingface_hub.try_to_load_from_cache(name, "config.json")
        if isinstance(found, str):
            return read_spec(Path(found), ignore), f"{name} in the hub's cache"
    if known is None:
        raise InputError(
            f"{name}: no such directory or config.json, not in the hub's cache, and not a shape that is known"
            f" ({', '.join(NAMED)}); a plan downloads nothing"
        )
    return NAMED[known], f"the known shape {known}"


def setting(args: argparse.Namespace, spec: ModelSpec, chip: Chip, method: str) -> Setting:
    """What the flags say of one method."""
    arguments: Mapping[str, object] = args.arguments
    budget = args.budget
    if args.all_methods:  # as far as a method has them
        arguments = methods.taken(method, args.arguments)
        budget = None if default_budget(method) is None else budget
    recipe = make(method, budget if budget is not None else default_budget(method), arguments)
    if recipe.kernels not in ("xla", "cpu", None, chip.platform):
        raise InputError(f"kernels={recipe.kernels} cannot run on {chip.name}: use auto or xla")
    kernels = {None: chip.platform, "cpu": "xla"}.get(recipe.kernels, recipe.kernels)  # no plan is for a CPU
    recipe = recipe._replace(kernels=kernels)
    longer = replace(spec, max_position=2 * LARGEST)  # bytes do not depend on what a model is made for
    return Setting(longer, args.dtype, recipe, args.context, args.new_tokens, args.batch, chip.platform, devices(args))


def method_of(args: argparse.Namespace, spec: ModelSpec) -> str:
    """The method that is planned: the given one, or what the model is made for."""
    return args.method or methods.of(spec)
