"""Compile kernels and decode loops for accelerators that are not there, and print what they take: a JSON line each.

    python -m tests.aot v5e:2x2                 # every kernel
    python -m tests.aot sm_90 loop              # every method's decode loop, with kernels

A process of its own for each target, because the plug-ins change what JAX sees. Needs `pip install '.[aot]'`.
"""

import dataclasses
import functools
import glob
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

TPUS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


class Gpu(NamedTuple):
    """What the compiler asks of a GPU; figures of NVIDIA's data sheets."""

    name: str
    capability: tuple[int, int]
    cores: int
    shared: int  # bytes of shared memory that a block may ask for
    per_core: int  # of a multiprocessor
    bandwidth: int  # bytes / s
    l2: int
    memory: int
    clock: float  # GHz


GPUS = {
    "sm_80": Gpu("NVIDIA A100", (8, 0), 108, 166912, 167936, 2039 * 10**9, 41943040, 80 * 10**9, 1.41),
    "sm_90": Gpu("NVIDIA H200", (9, 0), 132, 232448, 233472, 4800 * 10**9, 52428800, 141 * 10**9, 1.98),
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


def run(target: str, *what: str) -> list[dict[str, Any]]:
    """The results of this program in a process of its own."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "PYTHONWARNINGS": "ignore"}
    env.pop("XLA_FLAGS", None)
    with tempfile.TemporaryDirectory() as folder:
        if target in GPUS:
            env["XLA_FLAGS"] = f"--xla_dump_to={folder} --xla_dump_hlo_as_text=false"
        command = [sys.executable, "-m", "tests.aot", target, *what]
        root = Path(__file__).parent.parent
        done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        raise RuntimeError(f"after {len(lines)} results: {done.stderr[-3000:]}")
    return lines


class Target:
    """A device that is not there."""

    def __init__(self, name: str):
        import jax
        from jax.experimental import topologies
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        self.name, self.platform = name, "tpu" if name in TPUS else "cuda"
        if self.platform == "tpu":
            topology = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[name])
        else:
            self._load_plugin()
            described = {"target_config": config(GPUS[name]), "topology": "1x1x1"}
            topology = topologies.get_topology_desc(platform="cuda", topology_name=f"{name}:1", **described)
        self._device = topology.devices[0]
        sharding = NamedSharding(Mesh([self._device], ("x",)), PartitionSpec())
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        self.place = lambda tree: jax.tree.map(place, tree)

    @staticmethod
    def _load_plugin() -> None:
        import jax_plugins.xla_cuda13 as plugin

        try:
            plugin.initialize()  # JAX 0.10 does not, without a driver
        except Exception as error:
            print(f"plug-in: {error}", file=sys.stderr)

    def compile(self, fn: Any, *args: Any, **static: Any) -> Any:
        """A jitted function, compiled for this device."""
        from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

        device = AbstractDevice(self._device.device_kind, 1, "tpu" if self.platform == "tpu" else "gpu")
        mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
        with use_abstract_mesh(mesh):
            return fn.trace(*map(self.place, args), **static).lower(lowering_platforms=(self.platform,)).compile()


def ptx(kernel: str) -> list[str]:
    """The dumped PTX of a kernel; what was dumped is removed."""
    flags = re.search(r"--xla_dump_to=(\S+)", os.environ["XLA_FLAGS"])
    assert flags
    texts = []
    for path in sorted(glob.glob(f"{flags[1]}/*")):
        if path.endswith(".ptx") and kernel in (text := Path(path).read_text()):
            texts.append(text)
        os.remove(path)
    return texts


def resources(text: str, gpu: Gpu) -> dict[str, int]:
    """Registers per thread and spilled bytes of a kernel in PTX."""
    architecture = f"sm_{gpu.capability[0]}{gpu.capability[1]}" + "a" * (gpu.capability[0] >= 9)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(text)
        file.flush()
        command = [str(ptxas()), f"-arch={architecture}", "-v", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    count = lambda pattern: max(map(int, re.findall(pattern, said)), default=0)
    return {"registers": count(r"Used (\d+) registers"), "spilled": count(r"(\d+) bytes spill stores")}


# What is compiled

MODELS = {"Llama-3-8B": (8, 4, 128), "Llama-2-7B": (32, 1, 128), "Qwen2-7B": (4, 7, 128)}  # K, G, H
THOROUGH = ("v5e", "sm_90")  # targets that are tried at all shapes
STORES = ("dense", "int8", "int4", "int3", "int2", "int4:32", "fp8", "kivi2")
# Parts that are read in one launch, and their shares of a context; 0 = one slot.
TIERS = {"mikv": {"dense": 0.2, "int2": 0.8}, "dmc+store=int4": {"int4": 1.0, "dense": 0.0}}


class Case(NamedTuple):
    """A kernel at a shape."""

    kernel: str
    model: str
    store: str
    context: int
    batch: int
    options: dict[str, Any] = {}  # noqa: RUF012  (never changed)


def cases(target: str) -> Iterator[Case]:
    """Every kernel at the shapes of real models."""
    refused = {"fp8": ("v4", "sm_80"), "kivi2": TPUS}  # no such format; read by XLA
    for store in (*STORES, *TIERS):
        if target not in refused.get(store, ()):
            yield Case("decode_attention", "Llama-3-8B", store, 32768, 16)
    for context in (8192, 32768):
        yield Case("column_sums", "Llama-3-8B", "", context, 1)
    # Latents of all heads together, of each head, and keys that are only rotated.
    for latent in ((8, 512, 640), (1, 64, 96), (1, 128, 128)):
        yield Case("decode_attention", "Llama-3-8B", "dense", 32768, 16, {"latent": latent})
    if target not in THOROUGH:
        return
    for latent in ((1, 64, 96), (8, 512, 640))[: 1 + (target in TPUS)]:  # GPUs read joint latents of few bits by XLA
        yield Case("decode_attention", "Llama-3-8B", "int4", 32768, 16, {"latent": latent})
    for model in MODELS:
        for context, batch in ((4096, 8), (131072, 1)):
            yield Case("decode_attention", model, "dense", context, batch)
            yield Case("decode_attention", model, "int4", context, batch)
    for options in ({"with_logits": True}, {"window": True}, {"cap": 30.0}):
        yield Case("decode_attention", "Llama-3-8B", "int4", 8192, 2, options)
    for options in ({"window": 4096}, {"recent": 32}):
        yield Case("column_sums", "Llama-3-8B", "", 32768, 1, options)


def decode_attention(target: Target, case: Case) -> tuple[Callable, tuple]:
    """A function and its arguments."""
    import jax
    import jax.numpy as jnp

    from kvjax.cache.quantize import named
    from pallas_kernels.decode_attention import Expand, Part, decode_attention
    from pallas_kernels.rotation import Rotation

    (k, g, h), options = MODELS[case.model], dict(case.options)
    windowed, (heads, *ranks) = options.pop("window", False), options.pop("latent", (1, h, h))
    rows, g, keys = (case.batch, k // heads), g * heads, h * heads
    shares = TIERS.get(case.store, {case.store: 1.0})
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)

    numbers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def part(store: str, slots: int) -> tuple:
        """Arrays of a part."""
        page = min(128, slots)
        table, codec = -(-slots // page), named(store)
        size = rows[0] * rows[1] * table
        codecs = zip((codec.key, codec.value), ranks, strict=True)
        pools = (functools.partial(x.init, size, page, width, jnp.bfloat16) for x, width in codecs)
        return numbers(*rows, g, keys), *map(jax.eval_shape, pools), ints(*rows, table), ints(*rows), ints(size, page)

    def attend(parts: list[tuple], after: Any, up: Any, frequency: Any) -> Any:
        expand = Expand(Rotation(frequency), up if ranks[0] < keys else None) if "latent" in case.options else None
        formats = [(store.key.decode, store.value.decode) for store in map(named, shares)]
        return decode_attention(
            [Part(*arrays, *decode) for arrays, decode in zip(parts, formats, strict=True)],
            scale=h**-0.5,
            after=after if windowed else None,
            expand=expand,
            implementation="tpu" if target.platform == "tpu" else "gpu",
            **options,
        )

    parts = [part(store, max(1, int(share * case.context))) for store, share in shares.items()]
    frequency = jax.ShapeDtypeStruct((1, 1, h // 2), jnp.float32)
    return attend, (parts, ints(*rows), numbers(rows[1], ranks[0], keys), frequency)


def column_sums(target: Target, case: Case) -> tuple[Callable, tuple]:
    """A function and its arguments; for a TPU queries and keys lie heads first, as XLA lays there what it computes."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.prefill_scores import column_sums

    k, g, h = MODELS[case.model]
    b, t = case.batch, case.context

    def sums(q: Any, key: Any, lse: Any, length: Any) -> Any:
        options = {"scale": h**-0.5, **case.options}
        if target.platform == "cuda":
            return column_sums(q, key, lse, length, implementation="gpu", **options)
        return column_sums(*(jnp.moveaxis(x, 1, 2) for x in (q, key)), lse, length, implementation="tpu", **options)

    shape = lambda n: (b, n, t, h) if target.platform == "tpu" else (b, t, n, h)
    vectors = [jax.ShapeDtypeStruct(shape(n), jnp.bfloat16) for n in (k * g, k)]
    return sums, (*vectors, jax.ShapeDtypeStruct((b, k * g, t), jnp.float32), jax.ShapeDtypeStruct((b,), jnp.int32))


KERNELS = {"decode_attention": decode_attention, "column_sums": column_sums}


def compile_kernels(target: Target, some: list[str]) -> None:
    """Print a line for every case, or for those of some stores or options."""
    import jax

    for case in cases(target.name):
        if some and not {case.store, *case.options} & set(some):
            continue
        fn, args = KERNELS[case.kernel](target, case)
        memory = target.compile(jax.jit(fn), *args).memory_analysis()
        line: dict[str, Any] = {**case._asdict(), "arguments": memory.argument_size_in_bytes}
        line["temp"] = memory.temp_size_in_bytes
        if target.name in GPUS:
            (text,) = ptx(case.kernel)
            line |= resources(text, GPUS[target.name]) | {"asynchronous": "cp.async" in text}
        print(json.dumps(line), flush=True)


def compile_loops(target: Target, methods: list[str]) -> None:
    """Print a line for the decode loop of every method, with kernels and without."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from kvjax import decode, sampling
    from kvjax.methods import LEARNED, default_budget, make, read_entry
    from kvjax.models.decoder import Decoder
    from kvjax.spec import GateSpec, Lengths, ModelSpec

    spec = ModelSpec(
        vocab_size=1024, embed_dim=512, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=128, mlp_dim=1024,
        max_position=32768,
    )  # fmt: skip
    for entry in methods:
        name, arguments = read_entry(entry)
        gate = GateSpec(name, rate=4.0, window=12 if name == "dmc" else 256) if name in LEARNED else None
        gated = dataclasses.replace(spec, gate=gate)
        model = nnx.eval_shape(lambda gated=gated: Decoder(gated, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
        for kernels in ("xla", "tpu" if target.platform == "tpu" else "gpu"):
            recipe = make(name, None if default_budget(name) is None else 2048, {**arguments, "kernels": kernels})
            init = functools.partial(decode.init_cache, model, recipe, Lengths((16000, 9000), 64, 16384))
            cache = jax.eval_shape(init)
            chooser = jax.eval_shape(lambda: sampling.chooser(sampling.Sampling(), 2))
            of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
            state = decode.State(cache, of(jnp.int32, 2), of(jnp.int32, 2), of(jnp.bool, 2), of(jnp.int32), None)
            args = model, state, chooser, of(jnp.int32, 1), of(jnp.int32)
            compiled = target.compile(decode.decode_loop, *args, recipe=recipe, mode="greedy", chunk=16)
            memory = compiled.memory_analysis()
            pool = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
            line = {"method": entry, "kernels": kernels, "pool": pool, "aliased": memory.alias_size_in_bytes}
            print(json.dumps(line | {"temp": memory.temp_size_in_bytes}), flush=True)


if __name__ == "__main__":
    chosen = Target(sys.argv[1])
    if sys.argv[2:3] == ["loop"]:
        compile_loops(chosen, sys.argv[3:])
    else:
        compile_kernels(chosen, sys.argv[2:])
