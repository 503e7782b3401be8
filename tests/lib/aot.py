"""Compile kernels and decode loops for accelerators that are not there, and print what they take: a JSON line each.

    python -m tests.lib.aot v5e                     # every kernel
    python -m tests.lib.aot v5e more                # other shapes and options
    python -m tests.lib.aot sm_90 loop 128 full h2o # methods' decode loops with heads of 128, with kernels and without

A process of its own for each target, because the plug-ins change what JAX sees. Needs `pip install '.[aot]'`.
"""

import dataclasses
import functools
import glob
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kvjax.generation.allocate import init_cache
from kvjax.plan.aot import GPUS, TPUS, Gpu, Target, ptxas
from pallas_kernels.implementation import Implementation


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
THOROUGH = ("v5e", "sm_90")
STORES = ("dense", "int8", "int4", "int3", "int2", "int4:32", "fp8", "kivi2")
# Parts that are read in one launch, and their shares of a context; 0 = one slot.
TIERS = {"mikv": {"dense": 0.2, "int2": 0.8}, "dmc+store=int4": {"int4": 1.0, "dense": 0.0}}
FEW = ("dense", "int4", "mikv")
# Heads that share a latent, ranks of keys and values; the last: keys that are only rotated.
LATENTS = ((8, 512, 640), (1, 64, 96), (1, 128, 128))
REFUSED = {"fp8": ("v4", "sm_80")}  # no such format


class Case(NamedTuple):
    """A kernel at a shape."""

    kernel: str
    model: str
    store: str
    context: int
    batch: int
    options: dict[str, Any] = {}  # noqa: RUF012  (never changed)


def cases(target: str) -> Iterator[Case]:
    """Every kernel at the shapes of a real model; on two targets in every number format."""
    for store in (*STORES, *TIERS) if target in THOROUGH else FEW:
        if target not in REFUSED.get(store, ()):
            yield Case("decode_attention", "Llama-3-8B", store, 32768, 16)
    yield Case("column_sums", "Llama-3-8B", "", 32768, 1)
    yield Case("column_max", "Llama-3-8B", "", 32768, 1, {"chunk": 2048})
    if target in TPUS:  # cuDNN is not compiled ahead of time
        yield Case("attention", "Llama-3-8B", "", 32768, 1)
    yield Case("segment_merge", "Llama-3-8B", "", 32768, 1, {"window": 4})  # 12 take longer to compile: below
    context, batch, keep = (32768, 1, 0.2) if target in THOROUGH else (4096, 8, 0.1)
    yield Case("topk_retain", "Llama-3-8B", "", context, batch, {"keep": keep})
    for latent in LATENTS if target in THOROUGH else ():
        yield Case("decode_attention", "Llama-3-8B", "dense", 32768, 16, {"latent": latent})


def more(target: str) -> Iterator[Case]:
    """Other number formats, prompts and windows; on two targets other models, contexts and options."""
    for store in (*STORES, *TIERS) if target not in THOROUGH else ():
        if store not in FEW and target not in REFUSED.get(store, ()):
            yield Case("decode_attention", "Llama-3-8B", store, 32768, 16)
    yield Case("segment_merge", "Llama-3-8B", "", 32768, 1, {"window": 12})
    for latent in LATENTS if target not in THOROUGH else ():
        yield Case("decode_attention", "Llama-3-8B", "dense", 32768, 16, {"latent": latent})
    yield Case("column_sums", "Llama-3-8B", "", 8192, 1)
    if target in TPUS:
        for context, options in ((8192, {}), (8192, {"window": 4096}), (32768, {"window": 4096})):
            yield Case("attention", "Llama-3-8B", "", context, 1, options)
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
    for window in (0, 12):
        yield Case("segment_merge", "Llama-2-7B", "", 4096, 1, {"window": window})
    for options in ({"window": 4096}, {"recent": 32}):
        yield Case("column_sums", "Llama-3-8B", "", 32768, 1, options)
    yield Case("column_max", "Llama-3-8B", "", 8192, 1, {"chunk": 960})
    for context, batch, keep in ((4096, 8, 0.1), (131072, 1, 0.2)):
        yield Case("topk_retain", "Llama-3-8B", "", context, batch, {"keep": keep})


def allowance(line: dict[str, Any]) -> tuple[float, float]:
    """Temporary memory that a kernel's case may take: bytes, and a share of its arguments; the larger counts."""
    if line["kernel"] == "attention":
        return 0, 2.2  # JAX's writes each log-sum-exp 128 times; queries are scaled beforehand
    if line["kernel"] == "topk_retain":
        return 8e6, 0  # 7 MB on v5p, nothing elsewhere
    if line["kernel"] != "segment_merge":
        return 2e6, 0.05
    return 4e6, 0.25 if line["options"]["window"] else 2.25  # products of vectors; two arrays in float32


def own(target: Target) -> Implementation:
    """The kernels of a device."""
    return "tpu" if target.platform == "tpu" else "gpu"


def decode_attention(target: Target, case: Case) -> tuple[Callable, tuple]:
    """A function and its arguments."""
    import jax
    import jax.numpy as jnp

    from kvjax.cache.quantize import named
    from pallas_kernels.decode_attention import KeyExpansion, PagedKV, decode_attention
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
        expand = (
            KeyExpansion(Rotation(frequency), up if ranks[0] < keys else None) if "latent" in case.options else None
        )
        formats = [(store.key.decode, store.value.decode) for store in map(named, shares)]
        return decode_attention(
            [PagedKV(*arrays, *decode) for arrays, decode in zip(parts, formats, strict=True)],
            scale=h**-0.5,
            after=after if windowed else None,
            expand=expand,
            implementation=own(target),
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


def column_max(target: Target, case: Case) -> tuple[Callable, tuple]:
    """A function and its arguments, as for `column_sums`."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.prefill_scores import column_max

    k, g, h = MODELS[case.model]
    b, t, chunk = case.batch, case.context, case.options["chunk"]
    tokens, tpu = -(-t // chunk) * chunk, target.platform == "tpu"

    def most(q: Any, key: Any, *rest: Any) -> Any:
        q, key = (jnp.moveaxis(x, 1, 2) for x in (q, key)) if tpu else (q, key)
        return column_max(q, key, *rest, chunk=chunk, scale=h**-0.5, implementation=own(target))

    vectors = [(b, n, t, h) if tpu else (b, t, n, h) for n, t in ((k * g, tokens), (k, t))]
    numbers = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((b, k * g, tokens), (b, tokens))]
    of_vectors = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in vectors]
    return most, (*of_vectors, *numbers, jax.ShapeDtypeStruct((b,), jnp.int32))


def attention(target: Target, case: Case) -> tuple[Callable, tuple]:
    """A function and its arguments, as for `column_sums`."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.prefill_attention import attention

    k, g, h = MODELS[case.model]

    def attend(*args: Any) -> Any:
        *vectors, length = args
        vectors = (jnp.moveaxis(x, 1, 2) for x in vectors)
        out, lse = attention(*vectors, length, implementation="tpu", **case.options)
        return jnp.moveaxis(out, 1, 2), lse

    vectors = [jax.ShapeDtypeStruct((case.batch, n, case.context, h), jnp.bfloat16) for n in (k * g, k, k)]
    return attend, (*vectors, jax.ShapeDtypeStruct((case.batch,), jnp.int32))


def segment_merge(target: Target, case: Case) -> tuple[Callable, tuple]:
    """Means and their gradient, and its arguments; on a TPU vectors lie heads first."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.segment_merge import pool

    k, _, h = MODELS[case.model]
    b, t, tpu = case.batch, case.context, target.platform == "tpu"
    run = functools.partial(pool, window=case.options["window"], implementation=own(target))
    lay = (lambda x: jnp.moveaxis(x, 1, 2)) if tpu else lambda x: x

    def means(x: Any, merge: Any, weight: Any) -> Any:
        return lay(run(lay(x), merge, weight))

    def gradients(x: Any, merge: Any, weight: Any, g: Any) -> Any:
        y, pull = jax.vjp(means, x, merge, weight)
        return y, pull(g)

    vectors = jax.ShapeDtypeStruct((b, k, t, h) if tpu else (b, t, k, h), jnp.bfloat16)
    numbers = jax.ShapeDtypeStruct((b, t, k), jnp.float32)
    return gradients, (vectors, numbers, numbers, vectors)


def topk_retain(target: Target, case: Case) -> tuple[Callable, tuple]:
    """A function and its arguments."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.topk_retain import topk_retain

    heads, _, h = MODELS[case.model]
    shape = case.batch, heads, case.context
    retain = functools.partial(topk_retain, n=int(case.options["keep"] * case.context), implementation=own(target))
    of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    vectors = of(jnp.bfloat16, *shape, h)
    scores, pos = of(jnp.float32, *shape), of(jnp.int32, *shape)
    return retain, (scores, of(jnp.int32, *shape[:2]), vectors, vectors, pos, scores)


KERNELS = {
    "decode_attention": decode_attention,
    "column_sums": column_sums,
    "column_max": column_max,
    "attention": attention,
    "segment_merge": segment_merge,
    "topk_retain": topk_retain,
}


def compile_kernels(target: Target, some: Iterable[Case]) -> None:
    """Print a line for every case."""
    import jax

    for case in some:
        fn, args = KERNELS[case.kernel](target, case)
        memory = target.compile(jax.jit(fn), *args).memory_analysis()
        line: dict[str, Any] = {**case._asdict(), "arguments": memory.argument_size_in_bytes}
        line["temp"] = memory.temp_size_in_bytes
        if target.name in GPUS:
            texts = ptx(case.kernel)
            found = [resources(text, GPUS[target.name]) for text in texts]
            line |= {name: max(one[name] for one in found) for name in found[0]}
            line["asynchronous"] = all("cp.async" in text for text in texts)
        print(json.dumps(line), flush=True)


def compile_loops(target: Target, width: int, methods: list[str]) -> None:
    """Print a line for the decode loop of every method, with kernels and without, and heads of that width."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from kvjax.generation import decode, sampling
    from kvjax.methods import LEARNED, default_budget, make, read_entry
    from kvjax.models.decoder import Decoder
    from kvjax.spec import GateSpec, Lengths, ModelSpec

    spec = ModelSpec(
        vocab_size=1024, embed_dim=512, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=width, mlp_dim=1024,
        max_position=131072,
    )  # fmt: skip
    for entry in methods:
        name, arguments = read_entry(entry)
        gate = GateSpec(name, rate=4.0, window=12 if name == "dmc" else 256) if name in LEARNED else None
        gated = dataclasses.replace(spec, gate=gate)
        model = nnx.eval_shape(lambda gated=gated: Decoder(gated, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
        for kernels in ("xla", own(target)):
            recipe = make(name, None if default_budget(name) is None else 16384, {**arguments, "kernels": kernels})
            lengths = Lengths((64000, 36000), 64, 65536, platform=own(target))
            init = functools.partial(init_cache, model, recipe, lengths)
            cache = jax.eval_shape(init)
            chooser = jax.eval_shape(lambda: sampling.chooser(sampling.Sampling(), 2))
            of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
            seen = of(jnp.int32, 2, spec.vocab_size)
            numbers = of(jnp.int32, 2)
            state = decode.DecodeState(cache, numbers, numbers, of(jnp.bool, 2), numbers, seen)
            args = model, state, chooser, decode.Ends(of(jnp.int32, 2, 8), numbers)
            compiled = target.compile(decode.decode_loop, *args, recipe=recipe, chunk=16)
            memory = compiled.memory_analysis()
            pool = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
            line = {"method": entry, "kernels": kernels, "pool": pool, "aliased": memory.alias_size_in_bytes}
            print(json.dumps(line | {"temp": memory.temp_size_in_bytes}), flush=True)


def compile_depths(target: Target, counts: list[int]) -> None:
    """Print a line for the decode loop of so many equal layers in stacks, of one and of eight sequences."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from kvjax.generation import decode, sampling
    from kvjax.methods import make
    from kvjax.models.decoder import Decoder
    from kvjax.models.stack import stacked
    from kvjax.spec import Lengths, ModelSpec

    recipe, of = make("full", None, {"kernels": "xla"}), lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    for layers, batch in itertools.product(counts, (1, 8)):
        spec = ModelSpec(
            vocab_size=1024, embed_dim=1024, num_layers=layers, num_heads=8, num_kv_heads=4, head_dim=128, mlp_dim=4096,
            max_position=131072,
        )  # fmt: skip
        make_model = lambda spec=spec: stacked(Decoder(spec, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
        model = nnx.eval_shape(make_model)
        lengths = Lengths((4000,) * batch, 64, 4096, platform=own(target))
        cache = jax.eval_shape(functools.partial(init_cache, model, recipe, lengths))
        chooser = jax.eval_shape(functools.partial(sampling.chooser, sampling.Sampling(), batch))
        numbers = of(jnp.int32, batch)
        seen = of(jnp.int32, batch, spec.vocab_size)
        state = decode.DecodeState(cache, numbers, numbers, of(jnp.bool, batch), numbers, seen)
        args = model, state, chooser, decode.Ends(of(jnp.int32, batch, 8), numbers)
        start = time.process_time()
        compiled = target.compile(decode.decode_loop, *args, recipe=recipe, chunk=16)
        seconds, memory = time.process_time() - start, compiled.memory_analysis()
        line = {"layers": layers, "batch": batch, "seconds": seconds, "lines": compiled.as_text().count("\n")}
        there = {"arguments": memory.argument_size_in_bytes, "temp": memory.temp_size_in_bytes}
        print(json.dumps(line | there), flush=True)


if __name__ == "__main__":
    chosen = Target(sys.argv[1])
    if sys.argv[2:3] == ["depth"]:
        compile_depths(chosen, list(map(int, sys.argv[3:])))
    elif sys.argv[2:3] == ["loop"]:
        compile_loops(chosen, int(sys.argv[3]), sys.argv[4:])
    else:
        compile_kernels(chosen, (more if sys.argv[2:] == ["more"] else cases)(chosen.name))
