"""Read a checkpoint, one tensor at a time, whole or in parts: safetensors as in Hugging Face's directories, or GGUF.

A part is what a decoder is cut into where it is too large to be held: the embedding, one layer, or the final norm with
the head. Pickled weights are never opened.
"""

import functools
import os
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from kvjax.checkpoint import gguf, mxfp4, names
from kvjax.checkpoint.header import Stored
from kvjax.errors import InputError, say_once
from kvjax.files.gguf import first_part, is_gguf
from kvjax.files.text import read_json
from kvjax.models import quantized
from kvjax.models.decoder import Decoder
from kvjax.models.hf_config import read_config
from kvjax.parallel import mesh
from kvjax.spec import ModelSpec

Part = dict[str, np.ndarray]  # parameter path -> array
Progress = Callable[[int, int], None]  # (weights read, weights in all)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_OF_HUB = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt"]
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_BLOCK = 2**18  # numbers that are compared or checked together: they and what is made of them stay in a CPU's cache
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


class StoredWeights(NamedTuple):
    """The weights of a Hugging Face directory: found and checked, not yet read."""

    spec: ModelSpec  # as its tensors make it; see `locate`
    stored: dict[str, Stored]  # parameter path -> the tensor it is in; the largest parameter first
    sizes: dict[str, int]  # parameter path -> how many numbers it has


def resolve(name: str) -> Path:
    """The directory of a checkpoint, or its GGUF file: a local one, else a hub id, which is downloaded.

    A hub id is `org/name`, or `org/name/FILE.gguf` for a file of it.
    """
    if os.path.lexists(name):  # unlike a Path's, these never raise, however long the name
        return local(Path(name))
    named = re.fullmatch(r"(\w[\w.-]*/[\w.-]+)(?:/([\w./-]+\.gguf))?", name)
    if named is None or (named[2] is None and name.endswith(".gguf")):
        raise InputError(
            f"{name}: no such directory or GGUF file, and not a hub id of the form org/name or org/name/FILE.gguf"
        )
    import huggingface_hub

    _, file = named.groups()
    try:
        found = huggingface_hub.snapshot_download(
            named[1],
            allow_patterns=_OF_HUB if file is None else [re.sub(r"-\d{5}-of-", "-*-of-", file)],
            ignore_patterns=["*/*", "consolidated*"] if file is None else None,
        )
    except Exception as error:  # the client raises its transport's errors too, and those are no stable list
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{name}: no such directory or file, and the hub gave no such model: {reason}") from error
    return Path(found) if file is None else local(Path(found) / file)


def local(path: Path) -> Path:
    """A directory, or the GGUF file that is given or that is a directory's only weights."""
    if is_gguf(path):
        return first_part(path)
    if not os.path.isdir(path):
        raise InputError(f"{path}: is a file, expected a directory in the Hugging Face layout or a GGUF file")
    if any((path / name).is_file() for name in (SINGLE, INDEX)):
        return path
    files = sorted({first_part(file) for file in path.glob("*.gguf") if not file.name.startswith("mmproj")})
    if len(files) > 1:
        raise InputError(f"{path}: has {len(files)} GGUF files: give one, such as {files[0]}")
    if not files and not (path / "config.json").exists():
        raise InputError(f"{path}: has no config.json and no GGUF file, so it is not a checkpoint")
    return files[0] if files else path


def abstract(spec: ModelSpec, dtype: DTypeLike) -> tuple[dict[str, jax.ShapeDtypeStruct], Any]:
    """The parameters of a decoder by dotted path, in the order of its tree, and the tree that holds them."""
    return by_path(nnx.eval_shape(lambda: Decoder(spec, dtype=dtype, rngs=nnx.Rngs(0))))


def by_path(module: nnx.Module) -> tuple[dict[str, Any], Any]:
    """The parameters of a module by dotted path, in the order of its tree, and the tree that holds them."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(module)
    paths = (jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path, _ in leaves)
    return dict(zip(paths, (leaf for _, leaf in leaves), strict=True)), tree


def parameters(model: Decoder) -> Iterator[tuple[str, jax.Array]]:
    """A decoder's own parameters with their paths, as in `abstract`: of one layer at a time, wherever layers lie.

    Gates that lie beside a model (`kvjax.models.keep`) are not its own. A layer that lies in a stack is copied.
    """
    yield from ((path, x) for path, x in by_path(model)[0].items() if not path.startswith("layers."))
    for i, layer in enumerate(model.layers):
        yield from ((f"layers.{i}.{path}", x) for path, x in by_path(layer)[0].items() if not path.startswith("keep."))


def load(
    path: Path,
    dtype: DTypeLike,
    ignore: Collection[str] = (),
    progress: Progress | None = None,
    size: mesh.Size | None = None,
    quantize: str | None = None,
) -> Decoder:
    """A decoder with the weights of the Hugging Face directory `path`, cast to `dtype`, on one device or on a mesh.

    With `quantize`, int8 or int4, its matrices are encoded one after the other, from the numbers that are stored.
    """
    weights = locate(path, read_config(path, ignore))
    spec = quantized.asked(weights.spec, quantize)
    where = None if size is None else mesh.make(size, spec)
    targets, tree = abstract(spec, dtype)
    # The largest first, so that the peak of memory comes early.
    found = read(weights, weights.stored, dtype if quantize is None else None, progress)
    arrays = {
        target: mesh.place_weight(where, target, array) for target, array in quantized.encoded(found, targets, dtype)
    }
    return jax.tree.unflatten(tree, [arrays[target] for target in targets])


def locate(path: Path, spec: ModelSpec) -> StoredWeights:
    """Find every parameter of the model `spec` in the Hugging Face directory `path`.

    A head whose weights are not the embedding's counts, whatever `config.json` says of tied weights: then the model
    that is found is not tied. A tied model may have its one matrix under either name.

    Raises `InputError` where names, shapes or dtypes are not those of the model. Reads headers only, and both matrices
    of a model that is called tied and has two.
    """
    stored = mxfp4.joined(names.text_part(headers(path)))
    check_depth(path, names.num_layers(stored, spec), spec)
    embedding, head = (names.source(target, spec) for target in ("embedding", "head.kernel"))
    if spec.tie_embeddings and {embedding, head} <= stored.keys() and not _alike(stored[embedding], stored[head]):
        say_once(f"{path}: config.json calls {head} tied to {embedding}, but its weights are others: they count")
        spec = replace(spec, tie_embeddings=False)
    targets, _ = abstract(spec, np.float32)
    sources = {target: names.sources(target, spec) for target in targets}
    if spec.tie_embeddings and embedding not in stored and head in stored:
        sources["embedding"] = [head]
    _check_names(path, spec, stored, {source for each in sources.values() for source in each})
    found = {target: [stored[source] for source in each] for target, each in sources.items()}
    for target, each in found.items():
        for one in each:
            _check(one, names.stored_shape(target, targets[target].shape, spec))
    sizes = {target: leaf.size for target, leaf in targets.items()}
    order = sorted(targets, key=lambda target: -sizes[target])
    whole = lambda one, *experts: one._replace(others=(*one.others, *experts))
    return StoredWeights(spec, {target: whole(*found[target]) for target in order}, sizes)


def read(
    weights: StoredWeights, targets: Collection[str], dtype: DTypeLike | None = None, progress: Progress | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (parameter path, array) of chosen parameters; non-finite weights raise `InputError`.

    Args:
      weights: where they are.
      targets: parameter paths, in the order to read them.
      dtype: cast to it; None keeps each tensor's own.
      progress: called after each tensor.

    Cost: host memory of twice the tensor that is being read, in the larger of its dtypes; an array that the caller
      drops is gone before the next.
    """
    total, done = sum(weights.sizes[target] for target in targets), 0
    for target in targets:
        array = _array(target, weights, dtype)
        done += array.size
        if progress is not None:
            progress(done, total)
        yield target, array
        del array


def parts(weights: StoredWeights) -> dict[str, list[str]]:
    """The parts of a model in its order, each with its parameters' paths, the largest first.

    See `names.part` for what they are called.
    """
    called = ("embedding", *(f"layers.{layer}" for layer in range(weights.spec.num_layers)), "head")
    targets: dict[str, list[str]] = {name: [] for name in called}
    for target in weights.stored:
        targets[names.part(target)].append(target)
    return targets


def read_parts(
    weights: StoredWeights, dtype: DTypeLike | None = None, progress: Progress | None = None
) -> Iterator[tuple[str, Part]]:
    """Yield (name of a part, its parameters by path) of a whole model; see `parts` and `read`.

    Cost: host memory of a part and of its largest tensor; a part that the caller drops is gone before the next.
    """
    cut = parts(weights)
    arrays = read(weights, [target for targets in cut.values() for target in targets], dtype, progress)
    for name, targets in cut.items():
        yield name, dict(islice(arrays, len(targets)))


def stored_as(target: str, shape: tuple[int, ...], spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The names and the shape of the checkpoint's tensors that hold a parameter of this shape."""
    return dict.fromkeys(names.sources(target, spec), names.stored_shape(target, shape, spec))


def stored_dtype(weights: StoredWeights) -> np.dtype:
    """The dtype of a checkpoint's embedding, which stands for the whole."""
    return _DTYPES[weights.stored["embedding"].dtype]


def headers(path: Path) -> dict[str, Stored]:
    """What every tensor of a checkpoint is, without reading one."""
    if is_gguf(path):
        return gguf.headers(path)
    if (path / SINGLE).is_file():
        if (path / INDEX).is_file():
            say_once(f"{path}: has both {SINGLE} and {INDEX}; the single file counts, as for transformers")
        return _header(path / SINGLE)
    if not (path / INDEX).is_file():
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
        if pickles:
            raise InputError(
                f"{path}: has only pickled weights ({pickles[0]}), and opening a pickle runs the code inside; "
                "use the model's safetensors revision, or convert it with safetensors where you trust the file"
            )
        raise InputError(f"{path}: has neither {SINGLE} nor {INDEX}")
    listed = read_json(path / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()):
        raise InputError(f"{path / INDEX}: has no weight_map of tensor names to file names")
    shards = {shard: _shard(path, shard) for shard in sorted(set(listed.values()))}
    for name, shard in listed.items():
        if name not in shards[shard]:
            raise InputError(f"{path / INDEX}: lists tensor {name} in {shard}, which does not have it")
    for shard, content in shards.items():
        for name in content:
            if listed.get(name) != shard:
                raise InputError(f"{path / shard}: tensor {name} is not listed in {INDEX}")
    return {name: shards[shard][name] for name, shard in listed.items()}


def _shard(path: Path, name: str) -> dict[str, Stored]:
    # The name must be plain; the file itself may be a link, as in the hub's cache.
    if re.search(r"[/\\]|^\.\.?$", name) or not name.endswith(".safetensors"):
        raise InputError(
            f"{path / INDEX}: shard {name!r} is not the plain name of a .safetensors file beside the index"
        )
    if not os.path.isfile(path / name):  # unlike a Path's, it never raises, however long the name
        raise InputError(f"{path}: shard {name} is missing; the index lists it")
    return _header(path / name)


def _header(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, "np") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}
            return {
                name: Stored(file, name, s.get_dtype(), tuple(s.get_shape()), functools.partial(_read, file, name))
                for name, s in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: is truncated or not a safetensors file ({error})") from None


def _read(file: Path, name: str) -> np.ndarray:
    # Opened anew for each tensor: the mapping's pages count as ours for as long as it lives.
    try:
        with safe_open(file, "np") as tensors:
            return tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: tensor {name} cannot be read ({error})") from None


def _array(target: str, weights: StoredWeights, dtype: DTypeLike | None) -> np.ndarray:
    """One parameter: its rows of its tensor, transposed where it is a kernel, cast, finite; all experts together."""
    spec, stored = weights.spec, weights.stored[target]
    packed, columns = names.rows(target, spec), names.columns(target, spec)

    def one(stored: Stored) -> np.ndarray:
        array = stored.read()
        if stored.dtype == mxfp4.NAME:
            array = mxfp4.numbers(array, stored.others[0].read())
        array = array if packed is None else array[packed]
        array = array if columns is None else array[..., columns]
        array = np.ascontiguousarray(array.T if names.is_transposed(target, spec) else array)
        array = array if dtype is None else array.astype(dtype, copy=False)
        if not is_finite(array):
            raise InputError(f"{stored.file}: tensor {stored.name} has NaN or infinite weights")
        return array

    first = one(stored)
    if "*" not in names.source(target, spec):
        return first
    whole = np.empty((1 + len(stored.others), *first.shape), first.dtype)
    for i, each in enumerate((stored, *stored.others)):
        whole[i] = first if i == 0 else one(each)
    return whole


def is_finite(array: np.ndarray) -> bool:
    """Whether all numbers of an array of float32 or fewer bits are finite."""
    numbers = array.reshape(-1)
    blocks = (numbers[i : i + _BLOCK] for i in range(0, numbers.size, _BLOCK))
    return all(np.isfinite(block.astype(np.float32, copy=False)).all() for block in blocks)  # numpy is slow in bfloat16


def _alike(first: Stored, second: Stored) -> bool:
    """Whether two matrices have the same numbers; holds some rows of them at a time."""
    if first.shape != second.shape or len(first.shape) != 2 or not {first.dtype, second.dtype} <= _DTYPES.keys():
        return False
    step = max(1, _BLOCK // max(1, first.shape[1]))
    try:
        with safe_open(first.file, "np") as one, safe_open(second.file, "np") as other:
            a, b = one.get_slice(first.name), other.get_slice(second.name)
            ends = [*range(step, first.shape[0], step), first.shape[0]]
            rows = (slice(max(0, end - step), end) for end in ends)
            return all(np.array_equal(a[i].astype(np.float32), b[i].astype(np.float32)) for i in rows)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{second.file}: tensor {second.name} cannot be read ({error})") from None


def check_depth(path: Path, found: int, spec: ModelSpec) -> None:
    """Raise `InputError` unless there are as many layers as in `config.json`.

    To be called before `abstract`: a tree of layers that are not there may take minutes and all memory.
    """
    if found != spec.num_layers:
        raise InputError(f"{path}: has weights of {found} layers, config.json gives {spec.num_layers}")


def _check(stored: Stored, shape: tuple[int, ...]) -> None:
    if stored.dtype not in (*_DTYPES, mxfp4.NAME):
        raise InputError(f"{stored.file}: tensor {stored.name} is {stored.dtype}; kvjax reads {', '.join(_DTYPES)}")
    if stored.shape != shape:
        raise InputError(
            f"{stored.file}: tensor {stored.name} has shape {list(stored.shape)}, config.json gives {list(shape)}"
        )


def _check_names(path: Path, spec: ModelSpec, stored: Collection[str], expected: set[str]) -> None:
    """Every parameter is there and every tensor is used; a tied head and rotary tables may be there unused."""
    missing = sorted(expected.difference(stored))
    if missing:
        raise InputError(f"{path}: tensor {missing[0]} is missing ({len(missing)} of {len(expected)} are)")
    spare = {names.source("head.kernel", spec)} if spec.tie_embeddings else set()
    extra = sorted(n for n in set(stored) - expected - spare if not n.endswith("rotary_emb.inv_freq"))
    if extra:
        raise InputError(f"{path}: tensor {extra[0]} has no place in a {spec.family} model ({len(extra)} have none)")
