"""What other libraries make of one query per sequence over a dense cache, of attention over a prompt, and of models.

Each takes the same numbers as our kernel, in the layout that the library likes best, or the same weights.
"""

import contextlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from kvjax.generation.model import Model


class Reader(Protocol):
    """Another library with a model: what it has read, and how it goes on."""

    name: str
    tokens: list[int]  # the newest ones that it has made

    def read(self, prompts: np.ndarray) -> float:
        """Read prompts `[B T]` from their beginning to the next tokens [s]."""
        ...

    def go_on(self, steps: int) -> float:
        """Greedy tokens after them [s]."""
        ...

    def cache_bytes(self, batch: int, context: int) -> int:
        """Of that many tokens."""
        ...

    def peak_bytes(self) -> int | None:
        """The most memory of its process; None where it shares ours."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


@contextlib.contextmanager
def opened(names: Sequence[str], model: Model, most: int) -> Iterator[list[Reader]]:
    """Other libraries with the model's weights, for sequences of `most` tokens."""
    from kvjax.bench.hugging_face import NAME, Transformers
    from kvjax.bench.llama_cpp import LlamaCpp

    with contextlib.ExitStack() as stack:
        folder, found = Path(stack.enter_context(tempfile.TemporaryDirectory())), list[Reader]()
        for name in names:
            store = name.partition("+")[2] or "f16"
            found.append(Transformers(model) if name == NAME else LlamaCpp(model, most, folder, store))
            stack.callback(found[-1].close)
        yield found


Call = tuple[Callable[[], Any], Callable[[Any], Any]]  # queues the work; waits for what it returned


class Rival(NamedTuple):
    """Another library.

    Attributes:
      reason: why it cannot run here, for a platform; None = it can.
      decode: `(q [B K G H], k [B K S H], v) -> Call`; its result is `[B K G H]`, whatever the axes.
    """

    reason: Callable[[str], str | None]
    decode: Callable[[Array, Array, Array], Call]


def _needs(module: str, platforms: tuple[str, ...]) -> Callable[[str], str | None]:
    def reason(platform: str) -> str | None:
        if platform not in platforms:
            return f"runs on {', '.join(platforms)}, not on {platform}"
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
        if platform == "gpu" and module != "jax":
            import torch  # pyright: ignore[reportMissingImports]

            return None if torch.cuda.is_available() else "this torch has no CUDA"
        return None

    return reason


def _jax_decode(q: Float[Array, "B K G H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"]) -> Call:
    b, heads, g, h = q.shape
    query = q.reshape(b, 1, heads * g, h)
    keys, values = (jax.block_until_ready(jnp.moveaxis(x, 1, 2)) for x in (k, v))
    how = "cudnn" if jax.default_backend() == "gpu" and q.dtype != jnp.float32 else "xla"
    attend = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation=how))
    return lambda: attend(query, keys, values), jax.block_until_ready


def _tensors(*arrays: Array) -> list[Any]:
    import torch  # pyright: ignore[reportMissingImports]

    return [torch.from_dlpack(jax.block_until_ready(x)) for x in arrays]


def _torch_wait(_: Any) -> None:
    import torch  # pyright: ignore[reportMissingImports]

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _torch_decode(q: Float[Array, "B K G H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"]) -> Call:
    import torch  # pyright: ignore[reportMissingImports]

    query, keys, values = _tensors(q, k, v)  # the group's queries as those of one head: nothing is repeated
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(query, keys, values), _torch_wait


def _flashinfer_decode(q: Float[Array, "B K G H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"]) -> Call:
    import flashinfer  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]

    b, heads, g, h = q.shape
    page, slots = 16, k.shape[2]
    if slots % page:
        raise NotImplementedError(f"{slots} slots are not whole pages of {page}")
    paged = lambda x: jnp.moveaxis(x, 1, 2).reshape(b * slots // page, page, heads, h)  # NHD
    query, keys, values = _tensors(q.reshape(b, heads * g, h), paged(k), paged(v))
    ints = lambda *given: torch.arange(*given, dtype=torch.int32, device="cuda")
    each = slots // page
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(128 << 20, dtype=torch.uint8, device="cuda"), "NHD", use_tensor_cores=g >= 4
    )
    last = torch.full((b,), page, dtype=torch.int32, device="cuda")
    kind = query.dtype
    wrapper.plan(
        ints(0, b * each + 1, each), ints(b * each), last, heads * g, heads, h, page, q_data_type=kind,
        kv_data_type=kind,
    )  # fmt: skip
    return lambda: wrapper.run(query, (keys, values)), _torch_wait


DECODE = {
    "jax.nn": Rival(_needs("jax", ("cpu", "gpu", "tpu")), _jax_decode),
    "torch": Rival(_needs("torch", ("cpu", "gpu")), _torch_decode),
    "flashinfer": Rival(_needs("flashinfer", ("gpu",)), _flashinfer_decode),
}


def prompt_attention(q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> Call:
    """Causal attention over prompts: cuDNN's on GPUs, else our own."""
    from kvjax.attention.prompt import prefill_attention

    if jax.default_backend() == "gpu" and q.dtype != jnp.float32:
        run = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    else:
        run = lambda q, k, v: prefill_attention(q, k, v, jnp.full((q.shape[0],), q.shape[1], jnp.int32))
    attend = jax.jit(run)
    return lambda: attend(q, k, v), jax.block_until_ready
