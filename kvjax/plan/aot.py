"""Accelerators that are not there: compile a program for one, ahead of time.

Needs `pip install '.[aot]'`. The plug-ins change what JAX sees, so a program that makes a `Target` runs in a process of
its own: see `run`.
"""

import glob
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

from kvjax.attention.dispatch import ON_XLA
from kvjax.errors import InputError, say_once

TPUS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
CORES = {"tpu7x": 2}  # devices of a chip
MEGACORE = {"v4": {"chip_config_name": "megacore"}}  # one device a chip, as JAX has it; v5p is so by default


class Gpu(NamedTuple):
    """What the compiler asks of a GPU; figures of NVIDIA's data sheets and of `cudaDeviceProp`."""

    name: str
    capability: tuple[int, int]
    cores: int
    shared: int  # bytes of shared memory that a block may ask for
    per_core: int  # of a multiprocessor
    bandwidth: int  # bytes / s
    l2: int
    memory: int
    clock: float  # GHz


GPUS = {  # by compute capability; "h100" where two chips share one
    "sm_80": Gpu("NVIDIA A100", (8, 0), 108, 166912, 167936, 2039 * 10**9, 41943040, 80 * 10**9, 1.41),
    "sm_89": Gpu("NVIDIA L4", (8, 9), 58, 101376, 102400, 300 * 10**9, 50331648, 24 * 10**9, 2.04),
    "sm_90": Gpu("NVIDIA H200", (9, 0), 132, 232448, 233472, 4800 * 10**9, 52428800, 141 * 10**9, 1.98),
    "h100": Gpu("NVIDIA H100", (9, 0), 132, 232448, 233472, 3350 * 10**9, 52428800, 80 * 10**9, 1.98),
}


def config(gpu: Gpu) -> str:
    """A GPU as XLA's `GpuTargetConfigProto`."""
    major, minor = gpu.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.per_core} threads_per_core_limit: 2048 core_count: {gpu.cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {gpu.bandwidth} l2_cache_size: {gpu.l2} clock_rate_ghz: {gpu.clock}
  device_memory_size: {gpu.memory} shared_memory_per_block_optin: {gpu.shared}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }} device_description_str: "{gpu.name}"
"""


def missing(target: str) -> str | None:
    """Why a target cannot be compiled for; None = it can."""
    needed = {"libtpu": "libtpu"} if target in TPUS else {"jax_plugins.xla_cuda13": "jax-cuda13-plugin"}
    for module, package in needed.items():
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"{package} is not installed: pip install '.[aot]'"
    if target in GPUS and not ptxas():
        return "ptxas is not installed: pip install '.[aot]'"
    return None


def ptxas() -> str | None:
    """NVIDIA's assembler, which says how many registers a kernel takes."""
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    return next((path for folder in folders for path in glob.glob(f"{folder}/*/bin/ptxas")), None)


def run(
    target: str,
    module: str,
    *arguments: str,
    dump: bool = False,
    heard: Callable[[dict[str, Any]], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """What a program prints, a JSON object a line, in a process of its own that sees no device.

    Args:
      target: a key of `TPUS` or `GPUS`, the program's first argument.
      module: run as `python -m`.
      arguments: that follow.
      dump: have XLA write a GPU's kernels to a folder, which `XLA_FLAGS` names, until the program ends.
      heard: called with each line as soon as it is there.
    """
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "PYTHONWARNINGS": "ignore"}
    env["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no device is there to be shared
    for name in ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS"):  # are about programs that run here
        env.pop(name, None)
    lines = []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        if dump and target in GPUS:
            # Newer releases of XLA dump PTX only where the emitter is named.
            env["XLA_FLAGS"] = f"--xla_dump_to={folder} --xla_dump_hlo_as_text=false --xla_dump_emitter_re=ptx"
        command = [sys.executable, "-m", module, target, *arguments]
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    lines.append(json.loads(line))
                    heard(lines[-1])
        errors.seek(0)
        said = errors.read()
    for line in said.splitlines():
        if ON_XLA in line:
            say_once(line)
    if process.returncode < 0:  # by a signal: not Python's doing
        after = f" after {lines[-1].get('program', 'some')!r}" if lines else ""
        raise InputError(f"the compiler for {target} crashed{after}: kvjax.plan --estimate plans without it")
    if process.returncode:
        raise RuntimeError(f"after {len(lines)} results: {said[-3000:]}")
    return lines


def topology(name: str, devices: int) -> str:
    """The smallest arrangement of chips that has so many devices, as the plug-ins name it.

    >>> topology("v5e", 1), topology("v5e", 8), topology("v5p", 8), topology("sm_90", 8)
    ('v5e:2x2', 'v5e:2x4', 'v5p:2x2x2', '1x1x8')
    """
    if name in GPUS:
        return f"1x1x{devices}"
    chip, _, shape = TPUS[name].partition(":")
    sides, each = [int(side) for side in shape.split("x")], CORES.get(name, 1)
    while math.prod(sides) * each < devices:
        sides[max(i for i, side in enumerate(sides) if side == min(sides))] *= 2
    return f"{chip}:{'x'.join(map(str, sides))}"


class Target:
    """A device that is not there, or several."""

    def __init__(self, name: str, devices: int = 1):
        import jax
        from jax.experimental import topologies
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        self.name, self.platform = name, "tpu" if name in TPUS else "cuda"
        if self.platform == "tpu":
            where = topology(name, devices)
            found = topologies.get_topology_desc(platform="tpu", topology_name=where, **MEGACORE.get(name, {}))
        else:
            self._load_plugin()
            described = {"target_config": config(GPUS[name]), "topology": topology(name, devices)}
            found = topologies.get_topology_desc(platform="cuda", topology_name=f"{name}:{devices}", **described)
        self._devices, self._device = found.devices[:devices], found.devices[0]
        sharding = NamedSharding(Mesh([self._device], ("x",)), PartitionSpec())
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        self.place = lambda tree: jax.tree.map(place, tree)

    @staticmethod
    def _load_plugin() -> None:
        import jax_plugins.xla_cuda13 as plugin  # pyright: ignore[reportMissingImports]

        try:
            plugin.initialize()  # JAX 0.10 does not, without a driver
        except Exception as error:
            print(f"plug-in: {error}", file=sys.stderr)

    def compile(self, fn: Any, *args: Any, **static: Any) -> Any:
        """A jitted function, compiled for this device; or for all of them, where its arguments lie on a mesh."""
        from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

        from kvjax.parallel import mesh as meshes

        if (imagined := meshes.of(args)) is not None:
            return self._compile_for_all(imagined, fn, args, static)
        device = AbstractDevice(self._device.device_kind, 1, "tpu" if self.platform == "tpu" else "gpu")
        mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
        with use_abstract_mesh(mesh):
            return fn.trace(*map(self.place, args), **static).lower(lowering_platforms=(self.platform,)).compile()

    def _compile_for_all(self, imagined: Any, fn: Any, args: tuple[Any, ...], static: dict[str, Any]) -> Any:
        import jax
        import numpy as np
        from jax.sharding import Mesh, NamedSharding, use_abstract_mesh

        shape = tuple(imagined.shape.values())
        mesh = Mesh(np.asarray(self._devices).reshape(shape), imagined.axis_names, imagined.axis_types)
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec))
        with use_abstract_mesh(mesh.abstract_mesh):
            traced = fn.trace(*(jax.tree.map(place, arg) for arg in args), **static)
            return traced.lower(lowering_platforms=(self.platform,)).compile()
