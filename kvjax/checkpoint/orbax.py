"""A converted checkpoint: Orbax parameters beside the model's own configuration and tokenizer.

    DST/config.json, generation_config.json, tokenizer files   copied from the source
    DST/kvjax.json                                             what the conversion did, and a checksum of each PART
    DST/params/PART/                                           Orbax: a flat dict, parameter path -> array

A PART is the embedding, a layer, or the final norm with the head; small neighbours share one, under the first's name.
A DST is complete or absent: it is built beside its place and renamed into it.
"""

import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from kvjax.checkpoint import digest, hf, noted, stored
from kvjax.checkpoint.quiet import quiet
from kvjax.checkpoint.stage import staged
from kvjax.errors import InputError
from kvjax.files.text import read_json
from kvjax.models import quantized, small_files
from kvjax.models.decoder import Decoder
from kvjax.models.hf_config import read_config
from kvjax.parallel import mesh
from kvjax.spec import ModelSpec

FORMAT = 2
ABOUT = "kvjax.json"
PARAMS = "params"
CHANGES = ("ignore_config", "tie_embeddings", "latent", "gate", "weights")  # what `ABOUT` says beside `config.json`
COPIED = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt"),
)
_IN_FLIGHT = 64 * 2**20  # bytes that Orbax may hold beside the arrays; at least the largest array
_TOGETHER = 64 * 2**20  # bytes; an Orbax checkpoint takes a dozen files and 50 ms whatever its size


def is_orbax(path: Path) -> bool:
    """Whether `path` is a converted checkpoint."""
    return os.path.isfile(path / ABOUT)  # unlike a Path's, it never raises, however long the name


def save(dst: Path, src: Path, parts: Iterable[tuple[str, hf.Part]], about: Mapping[str, Any]) -> None:
    """Write a converted checkpoint, part by part as they arrive.

    Args:
      dst: the directory to make; it must not exist.
      src: the directory that the configuration and tokenizer files are copied from, or a GGUF file.
      parts: (name, parameters by path) of every part, in the model's order.
      about: what to note in `kvjax.json` beside the format. Read after the last part, so that what is learned while
        parts are made can still be noted.

    Of several processes, which share the directory, all call this; Orbax has the first one write.

    Cost: host memory of the largest part and of its largest array, and at most `_TOGETHER + _IN_FLIGHT` bytes, whatever
      the model's size. Weights hardly compress, and compressing holds a second copy, so they are stored plain.
    """
    with staged(dst) as stage:
        _write(stage, src, parts, about)


def save_into(dst: Path, src: Path, parts: Iterable[tuple[str, hf.Part]], about: Mapping[str, Any]) -> None:
    """Like `save`, but `dst` exists and holds other things. It is complete once `kvjax.json` is there."""
    made, first = dst / ".model", jax.process_index() == 0
    for left in (made, dst / PARAMS):  # by a call that was killed
        if first:
            shutil.rmtree(left, ignore_errors=True)
    mesh.meet(f"{dst} is cleared")
    with staged(made) as stage:
        _write(stage, src, parts, about)
    if first:
        for path in sorted(made.iterdir(), key=lambda path: path.name == ABOUT):
            path.replace(dst / path.name)
        made.rmdir()


def _write(stage: Path, src: Path, parts: Iterable[tuple[str, hf.Part]], about: Mapping[str, Any]) -> None:
    from orbax.checkpoint import v1 as ocp

    first, checksums, tied = jax.process_index() == 0, {}, True
    if first:
        small_files.copy(src, COPIED, stage)
    for name, arrays in _grouped(parts):
        _check_finite(arrays)
        tied = tied and not any(path.startswith("head.kernel") for path in arrays)
        with _context(max(_IN_FLIGHT, 1 + max(array.nbytes for array in arrays.values()))):
            try:
                with quiet():
                    ocp.save(str((stage / PARAMS / name).absolute()), arrays)
            except Exception as error:  # how a full or failing disk is reported is no stable list
                raise OSError(stored.reason(error)) from error
        del arrays  # before the next part is made
        if first:
            checksums[name] = digest.of_folder(stage / PARAMS / name)
    if first:
        noted = {"format": FORMAT, **about, "tie_embeddings": tied, "checksums": checksums}
        (stage / ABOUT).write_text(json.dumps(noted, indent=2) + "\n")


def load(
    path: Path,
    dtype: DTypeLike | None = None,
    ignore: Collection[str] = (),
    size: mesh.Size | None = None,
    quantize: str | None = None,
) -> Decoder:
    """A decoder from a converted checkpoint.

    Args:
      path: the directory.
      dtype: cast to it; None for the dtype it was converted to.
      ignore: fields of `config.json` to treat as absent, beside those it was converted with.
      size: of the mesh to put it on, each device's part read for itself; None = one device.
      quantize: int8 or int4, to encode matrices, part by part; None = as they are stored.

    Cost: host memory of the parameters in `dtype` and of about the largest part, as stored, for buffers. The C library
      may keep a few hundred MB of the buffers below 32 MiB. Checksums read every file once more, at 6 GB/s where the
      system still holds it; of several processes each checks some parts.
    """
    given = read_spec(path, ignore)
    spec = quantized.asked(given, quantize)
    kind = np.dtype(read_about(path)["dtype"]) if dtype is None else dtype
    found = _find(path, spec)
    wanted, tree = hf.abstract(spec, kind)
    stored.check_shapes(path, found, hf.abstract(given, kind)[0])
    where = None if size is None else mesh.make(size, spec)
    if quantize is not None:
        arrays = {}
        for part in found:
            read = stored.load(path, part, part.arrays).items()
            made = quantized.encoded(read, wanted, kind)
            arrays |= {name: mesh.place_weight(where, name, array) for name, array in made}
        return jax.tree.unflatten(tree, [arrays[target] for target in wanted])
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    place = {n: one if where is None else mesh.weight(n, leaf.shape, where) for n, leaf in wanted.items()}
    arrays = {}
    for index, part in enumerate(found):
        target = {name: wanted[name].update(sharding=place[name]) for name in part.arrays}
        arrays |= stored.load(path, part, target, check=index % jax.process_count() == jax.process_index())
    return jax.tree.unflatten(tree, [arrays[target] for target in wanted])


def read(path: Path, names: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (parameter path, array) of chosen parameters of a converted checkpoint, in any order, as stored.

    Cost: host memory of those of a part.
    """
    found = _find(path)
    missing = set(names).difference(*(part.arrays for part in found))
    if missing:
        raise stored.damaged(path, f"{min(missing)} is missing")
    for part in found:
        if part.arrays.keys() & names:
            target = {name: leaf if name in names else ... for name, leaf in part.arrays.items()}
            yield from stored.load(path, part, target).items()


def read_parts(
    path: Path, dtype: np.dtype | None = None, spec: ModelSpec | None = None
) -> Iterator[tuple[str, hf.Part]]:
    """The parts of a converted checkpoint, as it groups them.

    Args:
      path: the directory.
      dtype: cast to it; None = as stored.
      spec: the model that they are to be all of; None = whatever there is.

    Cost: host memory of the largest, as stored and cast.
    """
    found = _find(path, spec)
    if spec is not None:
        stored.check_shapes(path, found, hf.abstract(spec, np.float32)[0])
    for part in found:
        arrays = stored.load(path, part, part.arrays)
        keep = lambda path: dtype is None or path.endswith(quantized.LEAVES)  # what matrices of few bits are made of
        yield part.folder.name, {n: array if keep(n) else array.astype(dtype) for n, array in arrays.items()}


def _find(path: Path, spec: ModelSpec | None = None) -> list[stored.Part]:
    """The parts that a converted checkpoint has, in the order of their names, and no fewer layers than a model."""
    found = stored.find(path, path / PARAMS, read_about(path).get("checksums"))
    if spec is not None:
        layers = {name.split(".")[1] for part in found for name in part.arrays if name.startswith("layers.")}
        hf.check_depth(path, len(layers), spec)
    return found


def read_spec(path: Path, ignore: Collection[str] = ()) -> ModelSpec:
    """The model in a converted checkpoint: its `config.json`, as the conversion read and changed it.

    Args:
      path: the directory; its parameters need not be there.
      ignore: fields of `config.json` to treat as absent, beside those it was converted with.
    """
    about, file = read_about(path), path / ABOUT
    spec = read_config(path, ignored(path) | set(ignore))
    tied = about.get("tie_embeddings", spec.tie_embeddings)
    return replace(
        spec,
        tie_embeddings=tied,
        latent=noted.latent(about, spec, file),
        gate=noted.gate(about, spec, file),
        weights=about.get("weights"),
    )


def ignored(path: Path) -> set[str]:
    """Fields of `config.json` that a conversion treated as absent; none if `path` is not a converted checkpoint."""
    return set(read_about(path).get("ignore_config", ())) if is_orbax(path) else set()


def read_about(path: Path) -> dict[str, Any]:
    """What a converted checkpoint notes of itself."""
    about = read_json(path / ABOUT)
    noted.check(about, path / ABOUT, FORMAT)
    return about


def _check_finite(arrays: hf.Part) -> None:
    for name, array in arrays.items():
        if not hf.is_finite(array):
            raise InputError(f"{name} would have NaN or infinite weights in {array.dtype}: nothing is written")


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


def _context(in_flight: int) -> AbstractContextManager[Any]:
    """Orbax's settings for a write that holds at most `in_flight` bytes beside the arrays."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.memory.deepcopy_host_arrays = False  # ours change hands
    context.memory.write_concurrent_bytes = in_flight
    context.array.saving.use_compression = False
    return context
