"""A converted checkpoint: Orbax parameters beside the model's own configuration and tokenizer.

    DST/config.json, generation_config.json, tokenizer files   copied from the source
    DST/kvjax.json                                             what the conversion did
    DST/params/                                                Orbax: a flat dict, parameter path -> array

A DST is complete or absent: it is built beside its place and renamed into it.
"""

import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from orbax.checkpoint import v1 as ocp

from kvjax.checkpoint import hf
from kvjax.errors import InputError
from kvjax.models.decoder import Decoder
from kvjax.models.hf_config import read_config, read_json

FORMAT = 1
ABOUT = "kvjax.json"
COPIED = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt"),
)
_IN_FLIGHT = 64 * 2**20  # bytes; at least the largest array


def is_orbax(path: Path) -> bool:
    """Whether `path` is a converted checkpoint."""
    return (path / ABOUT).is_file()


def save(dst: Path, src: Path, params: Iterable[tuple[str, np.ndarray]], about: Mapping[str, Any]) -> None:
    """Write a converted checkpoint.

    Args:
      dst: the directory to make; it must not exist.
      src: the directory that the configuration and tokenizer files are copied from.
      params: (parameter path, array) of every parameter.
      about: what to note in `kvjax.json` beside the format.

    Cost: host memory of the parameters and `_IN_FLIGHT` bytes. Weights hardly compress, and compressing holds
      a second copy, so they are stored plain.
    """
    with _staged(dst) as stage:
        for name in COPIED:
            if (src / name).is_file():
                shutil.copyfile(src / name, stage / name)
        (stage / ABOUT).write_text(json.dumps({"format": FORMAT, **about}, indent=2) + "\n")
        tree = dict(params)
        with _context(max(_IN_FLIGHT, 1 + max(array.nbytes for array in tree.values()))):
            try:
                ocp.save(str((stage / "params").absolute()), tree)
            except ValueError as error:  # how tensorstore reports a full or failing disk
                raise OSError(_reason(error)) from error


def load(path: Path, dtype: DTypeLike | None = None, ignore: Collection[str] = ()) -> Decoder:
    """A decoder from a converted checkpoint.

    Args:
      path: the directory.
      dtype: cast to it; None for the dtype it was converted to.
      ignore: fields of `config.json` to treat as absent, beside those it was converted with.

    Cost: host memory of the parameters in `dtype` and of a few of the largest. One restore of everything would take
      about 1.75 times the parameters for its buffers.
    """
    about = read_json(path / ABOUT)
    if about.get("format") != FORMAT:
        raise InputError(f"{path}: format {about.get('format')!r}, this kvjax reads {FORMAT}; convert the source again")
    spec = read_config(path, {*about.get("ignore_config", ()), *ignore})
    targets, tree = hf.abstract(spec, dtype or about["dtype"])
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {k: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device) for k, leaf in targets.items()}
    params = str((path / "params").absolute())
    try:
        stored = {name: leaf.shape for name, leaf in ocp.metadata(params).metadata.items()}
        if stored != {name: leaf.shape for name, leaf in wanted.items()}:
            raise ValueError("config.json describes other shapes")
        arrays = {}
        with _context():
            for part in _parts(wanted):
                arrays |= ocp.load(params, part)
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: params cannot be read, convert the source again ({_reason(error)})") from error
    return jax.tree.unflatten(tree, [arrays[target] for target in targets])


@contextmanager
def _staged(dst: Path) -> Iterator[Path]:
    """A directory beside `dst` that becomes `dst` when the block ends well. One conversion to a `dst` at a time."""
    if dst.exists() or dst.is_symlink():
        raise InputError(f"{dst}: exists already; remove it or choose another directory")
    stage = dst.parent / f".{dst.name}.partial"
    shutil.rmtree(stage, ignore_errors=True)  # left by a conversion that was killed
    try:
        stage.mkdir(parents=True)
        yield stage
        stage.rename(dst)
    except OSError as error:
        raise InputError(f"{dst}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _reason(error: Exception) -> str:
    """The first line of an error, without tensorstore's dump of its settings."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(" [tensorstore_spec")[0]


def _parts(wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
    """Split parameters into at most about a hundred parts, the largest first."""
    size = {name: leaf.size * leaf.dtype.itemsize for name, leaf in wanted.items()}
    limit = max(2**20, sum(size.values()) // 100)
    part: dict[str, jax.ShapeDtypeStruct] = {}
    for name in sorted(wanted, key=lambda name: -size[name]):
        part[name] = wanted[name]
        if sum(size[name] for name in part) >= limit:
            yield part
            part = {}
    if part:
        yield part


def _context(in_flight: int | None = None) -> ocp.Context:
    """Orbax's settings; a write holds at most `in_flight` bytes beside the arrays."""
    context = ocp.Context()
    context.memory.deepcopy_host_arrays = False  # ours change hands
    context.memory.write_concurrent_bytes = in_flight
    context.array.saving.use_compression = False
    context.pytree.loading.partial_load = True
    return context
