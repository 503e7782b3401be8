"""Many devices: which part of a model each of them has, and how programs run on them.

A mesh has three axes. Sequences are split over `data`, key/value heads over `heads`. Where there are more devices than
heads, each head has `copies`: devices that all compute its attention and hold its cache. The feed-forward network, the
embedding and the head of the model are split over both. Every device has a page pool of its own, for its sequences and
heads.

Programs are written for one device. On a mesh every device runs them on its part (`jax.shard_map`), and asks the
others through `kvjax.parallel.collectives` where it needs all heads. Budgets over layers are plain functions of scores,
which XLA splits by itself. A program runs on the mesh that its arrays lie on.
"""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kvjax.errors import InputError, say_once
from kvjax.parallel import collectives
from kvjax.parallel.collectives import COPIES, DATA, HEADS, MODEL
from kvjax.spec import WEIGHT_GROUP, ModelSpec, PyTree

EVERYWHERE = P()
SEQUENCES = P(DATA)  # leads with [B]
ROWS = P(DATA, HEADS)  # leads with [B K]
LAYERS = P(None, DATA, HEADS)  # leads with [L B K]
STEPS = P(None, DATA)  # leads with [Q B]
POOL = P((DATA, HEADS))  # leads with [P]

Kind = P | Callable[[Any], PyTree]
Function = Callable[..., Any]
AnyMesh = Mesh | AbstractMesh

_WEIGHTS = (  # of a parameter's dotted path
    (r"embedding", P(MODEL)),
    (r"head\.kernel", P(None, MODEL)),
    (r"attention\.[qkv]\.kernel|adapter\.kernel|attention\.[kv]\.down|keep\.(query|key)", P(None, HEADS)),
    (r"attention\.[qkv]\.bias|attention\.[kv]\.up|attention\.o\.kernel|attention\.sink", P(HEADS)),
    (r"keep\.(query_bias|sinks|offset)", P(HEADS)),
    (r"mlp\.(gate|up)\.kernel", P(None, MODEL)),
    (r"mlp\.(gate|up)\.bias|mlp\.down\.kernel", P(MODEL)),
    (r"mlp\.(gate|up)\.kernels", P(None, None, MODEL)),
    (r"mlp\.(gate|up)\.biases|mlp\.down\.kernels", P(None, MODEL)),
)


class Size(NamedTuple):
    """What a user asks for: devices that sequences are split over, and devices that weights are split over."""

    data: int = 1
    model: int = 1


def parse(text: str) -> Size:
    """A mesh as it is written.

    >>> parse("data=2,model=4")
    Size(data=2, model=4)
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        if name not in Size._fields or name in found or not re.fullmatch("[1-9][0-9]{0,5}", number):
            raise InputError(f"mesh {text!r} is not of the form data=2,model=4")
        found[name] = int(number)
    return Size(**found)


def axes(size: Size, spec: ModelSpec) -> tuple[int, int, int]:
    """Devices along each axis of the mesh for a model."""
    if spec.mlp_dim % size.model:
        raise InputError(
            f"mesh model={size.model}: the feed-forward network is {spec.mlp_dim} wide, model must divide it"
        )
    heads = math.gcd(spec.num_rows, size.model)
    if spec.weights is not None:
        for width, devices in ((spec.mlp_dim, size.model), (spec.num_heads * spec.head_dim, heads)):
            if width // devices % WEIGHT_GROUP:
                raise InputError(
                    f"mesh model={size.model}: the {width} inputs of a matrix in {spec.weights} are groups of "
                    f"{WEIGHT_GROUP}, which {devices} devices cannot share"
                )
    if heads < size.model:
        say_once(
            f"mesh model={size.model}: {heads} devices split the key/value heads, {size.model // heads} have the same"
        )
    return size.data, heads, size.model // heads


def make(size: Size, spec: ModelSpec, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh for a model.

    Args:
      size: devices.
      spec: the model.
      devices: which ones; None = all that JAX sees.
    """
    found, need = jax.devices() if devices is None else devices, size.data * size.model
    if len(found) < need or (jax.process_count() > 1 and len(found) != need):
        raise InputError(f"mesh data={size.data},model={size.model} needs {need} devices, there are {len(found)}")
    return jax.make_mesh(axes(size, spec), (DATA, *MODEL), (AxisType.Auto,) * 3, devices=found[:need])


def imagined(size: Size, spec: ModelSpec) -> AbstractMesh:
    """Like `make`, of devices that need not be there: for shapes."""
    return AbstractMesh(axes(size, spec), (DATA, *MODEL), (AxisType.Auto,) * 3)


def placed(mesh: AnyMesh | None, kind: Kind, tree: PyTree) -> PyTree:
    """Arrays without contents, split over a mesh as programs want them; None = as they are."""
    if mesh is None:
        return tree
    with on(mesh):
        specs = kind(tree) if callable(kind) else kind
    each = jax.tree.broadcast(specs, tree, is_leaf=lambda x: x is None)
    put = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
    return jax.tree.map(put, tree, each)


def size_of(mesh: AnyMesh) -> Size:
    """What `make` was asked for."""
    return Size(mesh.shape[DATA], mesh.shape[HEADS] * mesh.shape[COPIES])


def of(tree: PyTree) -> Any:
    """The mesh that arrays lie on; None = one device. An imagined one for arrays without contents."""
    for leaf in jax.tree.leaves(tree):
        sharding = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == (DATA, *MODEL):
            return sharding.mesh
    return None


def shape_of(tree: PyTree) -> dict[str, int]:
    """Devices along each axis of the mesh that arrays lie on."""
    mesh = of(tree)
    return dict.fromkeys((DATA, *MODEL), 1) if mesh is None else dict(mesh.shape)


def count(tree: PyTree) -> int:
    """Devices that arrays lie on."""
    return math.prod(shape_of(tree).values())


def platform() -> str:
    """What runs the program that is being traced: "cpu", "gpu" or "tpu"."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


def in_force() -> AbstractMesh | None:
    """The mesh that programs are run on, if it is one of ours."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh.axis_names == (DATA, *MODEL) else None


@contextlib.contextmanager
def on(mesh: AnyMesh | None) -> Iterator[None]:
    """Run programs on a mesh, or trace them for an imagined one; None = as they are run already."""
    if mesh is None or jax.sharding.get_abstract_mesh() == mesh.abstract_mesh:
        yield
        return
    try:
        entered = jax.set_mesh(mesh) if isinstance(mesh, Mesh) else jax.sharding.use_abstract_mesh(mesh)
    except ValueError:  # something is being traced
        entered = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
    with entered:
        yield


def meet(where: str) -> None:
    """Wait until every process is there."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def constrain(x: PyTree, spec: P) -> PyTree:
    """Arrays of a compiled function that are to be split so; on one device, as they are."""
    mesh = in_force()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def place(mesh: Mesh | None, spec: P, x: np.ndarray) -> jax.Array:
    """Put what every process has on the devices; None = the default one."""
    if mesh is None:
        return jax.device_put(x)
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])


def read(x: Any) -> np.ndarray:
    """An array as every process sees it, wherever its parts lie."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def weight(path: str, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Where a parameter of a decoder lies, given its dotted path."""
    return NamedSharding(mesh, _weight(path, shape, size_of(mesh).model))


def weight_spec(path: str, shape: Sequence[int]) -> P:
    """How a parameter of a decoder is split over the mesh that is in force."""
    mesh = in_force()
    return EVERYWHERE if mesh is None else _weight(path, shape, size_of(mesh).model)


def place_weight(mesh: Mesh | None, path: str, x: np.ndarray) -> jax.Array:
    """Put a parameter, given its dotted path, where it belongs."""
    return jax.device_put(x) if mesh is None else place(mesh, weight(path, x.shape, mesh).spec, x)


def _weight(path: str, shape: Sequence[int], model: int) -> P:
    *stacked, path = re.split(r"(?:^|\.)stack\.", path)
    if stacked:  # those of several layers
        return P(None, *_weight(path, shape[1:], model))
    for pattern, spec in _WEIGHTS:
        if re.search(rf"(^|\.)({pattern})(\.(codes|scale|zero))?$", path):  # a quantised matrix has three
            vocabulary = {"embedding": shape[0], r"head\.kernel": shape[-1]}.get(pattern, model)
            return spec if vocabulary % model == 0 else EVERYWHERE
    return EVERYWHERE


def weights(tree: PyTree) -> PyTree:
    """How a decoder or a layer is split over the mesh that is in force, array by array."""
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    return jax.tree.unflatten(structure, [weight_spec(name(path), leaf.shape) for path, leaf in leaves])


def share(spec: ModelSpec, heads: int | None = None) -> ModelSpec:
    """What one device has of a model whose heads are split over so many; None = over those of this program, if any."""
    heads = collectives.count(HEADS) if heads is None else heads
    return dataclasses.replace(spec, num_heads=spec.num_heads // heads, num_kv_heads=spec.num_kv_heads // heads)


def spread(given: Sequence[Kind], made: Callable[..., PyTree]) -> Callable[[Function], Function]:
    """Write a function for one device; where a mesh is in force, each of its devices runs it on its part.

    Args:
      given: how each positional argument is split: a `PartitionSpec`, or a function that makes them of the argument;
        the last arguments may be left out.
      made: how the results are, given that of the arguments.

    Keyword arguments are static. A `ModelSpec` among them becomes the device's share, as does that of a decoder.
    """

    def wrap(function: Function) -> Function:
        @functools.wraps(function)
        def run(*args: Any, **settings: Any) -> Any:
            mesh = in_force()
            if mesh is None or mesh.manual_axes:
                return function(*args, **settings)
            specs = [kind(arg) if callable(kind) else kind for kind, arg in zip(given, args, strict=False)]
            part = functools.partial(_part, function, settings)
            return jax.shard_map(part, mesh=mesh, in_specs=tuple(specs), out_specs=made(*specs), check_vma=False)(*args)

        return run

    return wrap


def _part(function: Function, settings: dict[str, Any], *args: Any) -> Any:
    for arg in args:
        if isinstance(getattr(arg, "spec", None), ModelSpec):  # a decoder
            arg.spec = share(arg.spec)
    return function(*args, **{k: share(v) if isinstance(v, ModelSpec) else v for k, v in settings.items()})


def program(
    given: Sequence[Kind], made: Callable[..., PyTree], *, static: Sequence[str] = (), donate: Sequence[int] = ()
) -> Callable[[Function], Function]:
    """Compile a function that is `spread`; it runs on the mesh that its arguments lie on.

    Args:
      given, made: as in `spread`.
      static: the keyword arguments.
      donate: positions of arguments whose buffers are used again.

    The result has `lower` and `trace` as a jitted function does, and `given`.
    """

    def wrap(function: Function) -> Function:
        compiled = jax.jit(spread(given, made)(function), static_argnames=tuple(static), donate_argnums=tuple(donate))

        @functools.wraps(function)
        def call(*args: Any, **settings: Any) -> Any:
            mesh = of(args)
            if mesh is None:  # one device, or what is being traced for others
                return compiled(*args, **settings)
            with on(mesh):
                return compiled(*args, **settings)

        for name, value in {"given": given, "lower": compiled.lower, "trace": compiled.trace}.items():
            setattr(call, name, value)
        return call

    return wrap
