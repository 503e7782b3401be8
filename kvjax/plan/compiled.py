"""The programs of a plan, compiled for a chip that is not there.

    python -m kvjax.plan.compiled v5p FLAGS OF kvjax.plan

prints a JSON line for each program; `measure` runs it in a process of its own and adds up.
"""

import argparse
import functools
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh

from kvjax.cache import layout
from kvjax.cli import command
from kvjax.generation import allocate, decode, prefill, sampling
from kvjax.models.decoder import Decoder
from kvjax.models.quantized import asked
from kvjax.parallel import mesh
from kvjax.plan import aot, estimate
from kvjax.plan.chips import Chip, find
from kvjax.plan.estimate import Parts, abstract_cache, size
from kvjax.plan.flags import parse
from kvjax.plan.settings import Setting, find_model, method_of, setting
from kvjax.policies.budgets import profile
from kvjax.policies.layers import layer_recipe
from kvjax.spec import ModelSpec, PyTree

FEW = (2, 4)  # layers of a step that stand for all: what it takes beside weights and cache grows by the layer
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Program(NamedTuple):
    """Something to be compiled."""

    name: str
    fn: Any  # jitted
    args: tuple[PyTree, ...]
    static: dict[str, Any]
    there: int  # bytes of arguments that are weights and cache
    held: int = 0  # bytes of what waits beside it
    layers: int = 0  # of a step; 0 for programs of prefill
    split: tuple[mesh.Kind, ...] | None = None  # how arguments are split over a mesh; None = as `fn.given` says


class Measured(NamedTuple):
    """Parts, and what is known of them."""

    parts: Parts
    programs: list[dict[str, Any]]  # a line each
    refused: list[str]  # programs that the compiler refused for want of memory
    guessed: list[str]  # of these, those whose bytes it did not say: the estimate stands in


def programs(setting: Setting, steps: Sequence[int]) -> Iterator[Program]:
    """Everything that a generation runs, the largest last.

    Args:
      setting: what is planned.
      steps: layers of the decoding steps.
    """
    spec, cache, batch = setting.spec, abstract_cache(setting), setting.batch
    model, ints = setting.model.decoder, lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    stream = jax.ShapeDtypeStruct((batch, setting.lengths.padded, spec.embed_dim), model.dtype)
    head = size(model.norm) + size(model.embedding if model.head is None else model.head)
    yield Program("embed", prefill._embed, (model, ints(*stream.shape[:2])), {}, size(model.embedding))
    yield Program("last logits", prefill._last_logits, (model, stream, ints(batch)), {}, head)
    yield from _allocation(setting, cache)
    for index in _kinds(spec):
        waits = max(0, estimate.waiting(setting) - _found_bytes(setting, index))
        args, static = estimate.layer_arguments(setting, cache, index)
        there = size(args[0]) + size(args[2])
        yield Program(f"prefill of layer {index}", prefill._prefill_layer, args, static, there, waits)
    for layers in steps:
        yield _step(setting._replace(spec=_first(spec, layers)), layers)


def _found_bytes(setting: Setting, index: int) -> int:
    budget = layer_recipe(setting.spec, setting.recipe, index).budget
    return 0 if budget is None or budget.allocate is None else size(estimate.found_in_a_layer(setting, index))


def _kinds(spec: ModelSpec) -> list[int]:
    """One layer of each kind: of cached widths and of sliding window."""
    kinds = {(spec.widths(i), spec.window(i)): i for i in reversed(range(spec.num_layers))}
    return sorted(kinds.values())


def _allocation(setting: Setting, cache: layout.Cache) -> Iterator[Program]:
    """What distributes slots over layers, and fills the rows with what has waited for them."""
    held, ints = estimate.waiting(setting), lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    for group, tiers in zip(layout.layer_groups(setting.spec), cache, strict=True):
        recipe = layer_recipe(setting.spec, setting.recipe, group.index[0])
        if recipe.budget is None or recipe.budget.allocate is None:
            continue
        found = estimate.found_in_a_layer(setting, group.index[0])
        slots, n = ints(len(group.index), setting.batch, setting.spec.num_rows), len(group.index)
        args = ([found.stats] * n, ints(), ints(setting.batch), slots, ints(setting.batch))
        split = mesh.ROWS, mesh.EVERYWHERE, mesh.SEQUENCES, mesh.LAYERS, mesh.SEQUENCES
        there = n * size(found.stats)
        yield Program("allocate", allocate._run_allocate, args, {"recipe": recipe}, there, held, split=split)
        yield Program("trim", allocate._trim, (tiers, slots, slots), {}, size(tiers), held)
        if recipe.policy.prompt_hooks.write_selected is not None:
            args = (tiers, found.pending, ints(), ints(*slots.shape[1:]))
            there = size(tiers) + size(found.pending)
            yield Program("write_selected", allocate._write_selected, args, {"recipe": recipe}, there, held)


def _first(spec: ModelSpec, layers: int) -> ModelSpec:
    """The model with its first layers only."""
    latent = None if spec.latent is None else replace(spec.latent, ranks=spec.latent.ranks[:layers])
    few = profile.first(spec.profile, layers)
    return replace(spec, num_layers=layers, windows=spec.windows[:layers], latent=latent, profile=few)


def _step(setting: Setting, layers: int) -> Program:
    """The decode loop of so many layers."""
    dtype = jnp.dtype(setting.dtype)
    model = nnx.eval_shape(lambda: Decoder(setting.spec, dtype=dtype, rngs=nnx.Rngs(0)))
    model = mesh.placed(setting.mesh, mesh.weights, model)
    cache, batch = abstract_cache(setting), setting.batch
    of: Any = lambda kind, *shape: jax.ShapeDtypeStruct(shape, kind)
    chooser = jax.eval_shape(functools.partial(sampling.chooser, sampling.Sampling(), batch))
    seen = of(jnp.int32, batch, setting.spec.vocab_size)
    numbers = of(jnp.int32, batch)
    state = decode.DecodeState(cache, numbers, numbers, of(jnp.bool, batch), numbers, seen)
    args = model, state, chooser, decode.Ends(of(jnp.int32, batch, decode.STOPS), numbers)
    static = {"recipe": setting.recipe, "chunk": 16}
    return Program("step", decode.decode_loop, args, static, size(model) + size(cache), layers=layers)


def compile_program(target: aot.Target, program: Program, devices: AbstractMesh | None = None) -> dict[str, Any]:
    """Bytes of a program as the compiler counts them; `beside` is what it takes beside weights and cache."""
    line: dict[str, Any] = {"program": program.name, "layers": program.layers, "there": program.there}
    start, args = time.perf_counter(), program.args
    if devices is not None:
        kinds = program.fn.given if program.split is None else program.split
        args = tuple(mesh.placed(devices, kind, arg) for kind, arg in zip(kinds, args, strict=True))
    try:
        memory = target.compile(program.fn, *args, **program.static).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        total = refused_bytes(str(error))
        beside = None if total is None else total - program.there + program.held
        return line | {"refused": True, "beside": beside, "message": str(error).splitlines()[0]}
    names = ("argument", "output", "temp", "generated_code", "alias")
    counted = {name: int(getattr(memory, f"{name}_size_in_bytes")) for name in names}
    total = sum(counted.values()) - 2 * counted["alias"]
    beside = total - program.there + program.held
    return line | counted | {"refused": False, "beside": beside, "seconds": time.perf_counter() - start}


def refused_bytes(message: str) -> int | None:
    """What a TPU's compiler says that a program needs, where it refuses it.

    >>> refused_bytes("Ran out of memory in memory space hbm. Used 26.50G of 15.75G hbm.") / 2**30
    26.5
    """
    found = re.search(r"Used ([\d.]+)([KMGT]?) of|HLO temporaries \(([\d.]+)([KMGT]?)\)", message)
    if found is None:
        return None
    number, unit = found[1] or found[3], found[2] or found[4]
    return int(float(number) * UNITS[unit or ""])


def measure(argv: Sequence[str], chip: Chip, planned: Setting, *, exact: bool, changes: Sequence[str] = ()) -> Measured:
    """Compile a plan's programs in a process of its own, and add up.

    Args:
      argv: the flags of `kvjax.plan`.
      chip: what is compiled for.
      planned: what they mean, with the changes.
      exact: compile all layers of a step.
      changes: flags that take the place of earlier ones.
    """
    assert chip.target is not None
    guess = estimate.estimate(planned)  # first: it may raise what a user can mend
    lines = aot.run(chip.target, "kvjax.plan.compiled", *argv, *changes, heard=_say)
    return add_up(lines, guess, planned.spec.num_layers, exact=exact)


def _say(line: dict[str, Any]) -> None:
    """A program that is compiled, for whoever waits."""
    how = "refused, too large" if line["refused"] else f"{line['seconds']:.1f} s"
    of = f" of {line['layers']} layers" if line["layers"] else ""
    print(f"  {line['program']}{of}: {how}", file=sys.stderr, flush=True)


def add_up(lines: list[dict[str, Any]], guess: Parts, layers: int, *, exact: bool) -> Measured:
    """The parts of a plan from its programs' lines; a step of a few layers is continued to all."""
    refused = [line["program"] for line in lines if line["refused"]]
    guessed = [line["program"] for line in lines if line["refused"] and line["beside"] is None]
    prefill = [guess.prefill if line["beside"] is None else line["beside"] for line in lines if not line["layers"]]
    steps = {line["layers"]: line["beside"] for line in lines if line["layers"]}
    if None in steps.values():
        step = guess.decode
    elif exact or layers in steps:
        step = steps[layers]
    else:
        (few, less), (more, most) = sorted(steps.items())
        step = most + (layers - more) * (most - less) // (more - few)
    return Measured(guess._replace(prefill=max(prefill), decode=step), lines, refused, guessed)


def steps_of(args: argparse.Namespace, spec: ModelSpec) -> tuple[int, ...]:
    """Layers of the steps that are compiled: all where the first few do not stand for the others."""
    mixed = len(set(spec.windows)) > 1
    return (spec.num_layers,) if args.exact or mixed or spec.num_layers <= max(FEW) else FEW


def main() -> None:
    """Compile, and print."""
    args = parse(sys.argv[2:])
    spec, _ = find_model(args.model, args.ignore_config)
    spec = asked(spec, args.weights)
    planned = setting(args, spec, find(args.chip), args.only or method_of(args, spec))
    target = aot.Target(sys.argv[1], planned.devices.data * planned.devices.model)
    for program in programs(planned, steps_of(args, spec)):
        if args.program in (None, program.name):
            print(json.dumps(compile_program(target, program, planned.mesh)), flush=True)


if __name__ == "__main__":
    command.run("kvjax.plan", main)
