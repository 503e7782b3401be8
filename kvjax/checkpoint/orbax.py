"""A converted checkpoint: Orbax parameters beside the model's own configuration and tokenizer.

    DST/config.json, generation_config.json, tokenizer files   copied from the source
    DST/kvjax.json                                             what the conversion did
    DST/params/PART/                                           Orbax: a flat dict, parameter path -> array

A PART is the embedding, a layer, or the final norm with the head; small neighbours share one, under the first's name.
A DST is complete or absent: it is built beside its place and renamed into it.
"""

import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from orbax.checkpoint import v1 as ocp

from kvjax import interrupts, mesh
from kvjax.checkpoint import hf, noted
from kvjax.errors import InputError
from kvjax.models.decoder import Decoder
from kvjax.models.hf_config import read_config
from kvjax.spec import ModelSpec
from kvjax.text_files import read_json

FORMAT = 2
ABOUT = "kvjax.json"
PARAMS = "params"
CHANGES = ("ignore_config", "latent", "gate")  # what `ABOUT` says of the model beside its `config.json`
COPIED = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt"),
)
_IN_FLIGHT = 64 * 2**20  # bytes that Orbax may hold beside the arrays; at least the largest array
_TOGETHER = 64 * 2**20  # bytes; an Orbax checkpoint takes a dozen files and 50 ms whatever its size


def is_orbax(path: Path) -> bool:
    """Whether `path` is a converted checkpoint."""
    return (path / ABOUT).is_file()


def save(dst: Path, src: Path, parts: Iterable[tuple[str, hf.Part]], about: Mapping[str, Any]) -> None:
    """Write a converted checkpoint, part by part as they arrive.

    Args:
      dst: the directory to make; it must not exist.
      src: the directory that the configuration and tokenizer files are copied from.
      parts: (name, parameters by path) of every part, in the model's order.
      about: what to note in `kvjax.json` beside the format. Read after the last part, so that what is learned while
        parts are made can still be noted.

    Of several processes, which share the directory, all call this; Orbax has the first one write.

    Cost: host memory of the largest part and of its largest array, and at most `_TOGETHER + _IN_FLIGHT` bytes, whatever
      the model's size. Weights hardly compress, and compressing holds a second copy, so they are stored plain.
    """
    with _staged(dst) as stage, interrupts.removing(stage):
        _write(stage, src, parts, about)


def save_into(dst: Path, src: Path, parts: Iterable[tuple[str, hf.Part]], about: Mapping[str, Any]) -> None:
    """Like `save`, but `dst` exists and holds other things. It is complete once `kvjax.json` is there."""
    made, first = dst / ".model", jax.process_index() == 0
    for left in (made, dst / PARAMS):  # by a call that was killed
        if first:
            shutil.rmtree(left, ignore_errors=True)
    mesh.meet(f"{dst} is cleared")
    with _staged(made) as stage, interrupts.removing(stage):
        _write(stage, src, parts, about)
    if first:
        for path in sorted(made.iterdir(), key=lambda path: path.name == ABOUT):
            path.replace(dst / path.name)
        made.rmdir()


def _write(stage: Path, src: Path, parts: Iterable[tuple[str, hf.Part]], about: Mapping[str, Any]) -> None:
    first = jax.process_index() == 0
    for name in COPIED:
        if first and (src / name).is_file():
            shutil.copyfile(src / name, stage / name)
    for name, arrays in _grouped(parts):
        with _context(max(_IN_FLIGHT, 1 + max(array.nbytes for array in arrays.values()))):
            try:
                ocp.save(str((stage / PARAMS / name).absolute()), arrays)
            except ValueError as error:  # how tensorstore reports a full or failing disk
                raise OSError(_reason(error)) from error
        del arrays  # before the next part is made
    if first:
        (stage / ABOUT).write_text(json.dumps({"format": FORMAT, **about}, indent=2) + "\n")


def load(
    path: Path, dtype: DTypeLike | None = None, ignore: Collection[str] = (), size: mesh.Size | None = None
) -> Decoder:
    """A decoder from a converted checkpoint.

    Args:
      path: the directory.
      dtype: cast to it; None for the dtype it was converted to.
      ignore: fields of `config.json` to treat as absent, beside those it was converted with.
      size: of the mesh to put it on, each device's part read for itself; None = one device.

    Cost: host memory of the parameters in `dtype` and of about the largest part, as stored, for buffers. The C library
      may keep a few hundred MB of the buffers below 32 MiB.
    """
    spec = read_spec(path, ignore)
    wanted, tree = hf.abstract(spec, dtype or read_about(path)["dtype"])
    where = None if size is None else mesh.make(size, spec)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    place = {n: one if where is None else mesh.weight(n, leaf.shape, where) for n, leaf in wanted.items()}
    arrays = {}
    try:
        stored = {part: ocp.metadata(str(part)).metadata for part in (path / PARAMS).absolute().iterdir()}
        shapes = {name: leaf.shape for leaves in stored.values() for name, leaf in leaves.items()}
        if shapes != {name: leaf.shape for name, leaf in wanted.items()}:
            raise ValueError("config.json describes other shapes")
        for part, leaves in stored.items():
            arrays |= ocp.load(str(part), {name: wanted[name].update(sharding=place[name]) for name in leaves})
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: params cannot be read, convert the source again ({_reason(error)})") from error
    return jax.tree.unflatten(tree, [arrays[target] for target in wanted])


def read(path: Path, names: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (parameter path, array) of chosen parameters of a converted checkpoint, in any order, as stored.

    Cost: host memory of those of a part.
    """
    missing = set(names)
    try:
        for part in (path / PARAMS).absolute().iterdir():
            stored = ocp.metadata(str(part)).metadata
            if here := stored.keys() & missing:
                arrays = ocp.load(str(part), {name: leaf if name in here else ... for name, leaf in stored.items()})
                yield from ((name, np.asarray(arrays[name])) for name in here)
                missing -= here
        if missing:
            raise ValueError(f"{min(missing)} is missing")
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: params cannot be read, convert the source again ({_reason(error)})") from error


def read_parts(path: Path, dtype: np.dtype | None = None) -> Iterator[tuple[str, hf.Part]]:
    """The parts of a converted checkpoint, as it groups them, in another dtype; None = as stored.

    Cost: host memory of the largest, in both.
    """
    for part in sorted((path / PARAMS).absolute().iterdir()):
        try:
            arrays = ocp.load(str(part), ocp.metadata(str(part)).metadata)
        except (ValueError, OSError) as error:
            raise InputError(f"{part}: cannot be read ({_reason(error)})") from error
        read = {name: np.asarray(array) for name, array in arrays.items()}
        yield part.name, read if dtype is None else {name: array.astype(dtype) for name, array in read.items()}


def read_spec(path: Path, ignore: Collection[str] = ()) -> ModelSpec:
    """The model in a converted checkpoint: its `config.json`, as the conversion read and changed it.

    Args:
      path: the directory; its parameters need not be there.
      ignore: fields of `config.json` to treat as absent, beside those it was converted with.
    """
    about, file = read_about(path), path / ABOUT
    spec = read_config(path, ignored(path) | set(ignore))
    return replace(spec, latent=noted.latent(about, spec, file), gate=noted.gate(about, spec, file))


def ignored(path: Path) -> set[str]:
    """Fields of `config.json` that a conversion treated as absent; none if `path` is not a converted checkpoint."""
    return set(read_about(path).get("ignore_config", ())) if is_orbax(path) else set()


def read_about(path: Path) -> dict[str, Any]:
    """What a converted checkpoint notes of itself."""
    about = read_json(path / ABOUT)
    noted.check(about, path / ABOUT, FORMAT)
    return about


@contextmanager
def _staged(dst: Path) -> Iterator[Path]:
    """A directory beside `dst` that becomes `dst` when the block ends well. One conversion to a `dst` at a time."""
    if dst.exists() or dst.is_symlink():
        raise InputError(f"{dst}: exists already; remove it or choose another directory")
    stage, first = dst.parent / f".{dst.name}.partial", jax.process_index() == 0
    mesh.meet(f"{dst} is not there")
    try:
        if first:
            shutil.rmtree(stage, ignore_errors=True)  # left by a conversion that was killed
            stage.mkdir(parents=True)
        mesh.meet(f"{dst} is begun")
        yield stage
        mesh.meet(f"{dst} is written")
        if first:
            stage.rename(dst)
        mesh.meet(f"{dst} is done")
    except OSError as error:
        raise InputError(f"{dst}: cannot be written ({error})") from error
    finally:
        if first:
            shutil.rmtree(stage, ignore_errors=True)


def _reason(error: Exception) -> str:
    """The first line of an error, without tensorstore's dump of its settings."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(" [tensorstore_spec")[0]


def _grouped(parts: Iterable[tuple[str, hf.Part]]) -> Iterator[tuple[str, hf.Part]]:
    """Join neighbouring parts until they have `_TOGETHER` bytes, under the name of the first."""
    group: hf.Part = {}
    first = ""
    for name, part in parts:
        first = first if group else name
        group |= part
        del part
        if sum(array.nbytes for array in group.values()) >= _TOGETHER:
            yield first, group
            group = {}
    if group:
        yield first, group


def _context(in_flight: int) -> ocp.Context:
    """Orbax's settings for a write that holds at most `in_flight` bytes beside the arrays."""
    context = ocp.Context()
    context.memory.deepcopy_host_arrays = False  # ours change hands
    context.memory.write_concurrent_bytes = in_flight
    context.array.saving.use_compression = False
    return context
