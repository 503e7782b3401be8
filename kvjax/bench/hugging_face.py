"""transformers with its `DynamicCache`, on the same weights."""

import inspect
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kvjax.bench import weights
from kvjax.checkpoint import shipped
from kvjax.errors import InputError
from kvjax.generation.model import Model
from kvjax.models.hf_config import to_config

NAME = "transformers"


def device() -> str:
    """Where torch computes: on the GPU if JAX does; raises `InputError` where torch cannot."""
    import torch  # pyright: ignore[reportMissingImports]

    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        raise InputError("--against transformers: JAX runs on a GPU and this torch does not: install a CUDA build")
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


class Transformers:
    """A model of theirs and what it has read.

    Args:
      model: whose weights it has.
    """

    def __init__(self, model: Model):
        self.name, self.spec, self.dtype = NAME, model.spec, model.decoder.dtype
        self.net = causal(model)
        named = inspect.signature(self.net.forward).parameters
        self.argument = "cache" if "cache" in named else "past_key_values"  # before 5.24
        self.tokens: list[int] = []  # the newest ones, of the first sequence

    def read(self, prompts: np.ndarray) -> float:
        """Read prompts `[B T]` from their beginning to the next tokens [s]."""
        import torch  # pyright: ignore[reportMissingImports]
        from transformers import DynamicCache  # pyright: ignore[reportMissingImports]

        self.cache = DynamicCache()
        self.newest = torch.from_numpy(prompts.astype(np.int64)).to(device())
        return self._timed(1, logits_to_keep=1)

    def fill(self, batch: int, context: int) -> None:
        """Random keys and values instead of prompts: as fast to attend to."""
        import torch  # pyright: ignore[reportMissingImports]
        from transformers import DynamicCache  # pyright: ignore[reportMissingImports]

        self.cache, kind = DynamicCache(), getattr(torch, self.dtype.name)
        shape = (batch, self.spec.num_kv_heads, context, self.spec.head_dim)
        for layer in range(self.spec.num_layers):
            k, v = (torch.randn(shape, dtype=kind, device=device()) for _ in "kv")
            self.cache.update(k, v, layer)
        self.newest = torch.zeros((batch, 1), dtype=torch.long, device=device())

    def go_on(self, steps: int) -> float:
        """Greedy tokens after them [s]."""
        return self._timed(steps)

    def cache_bytes(self, batch: int, context: int) -> int:
        """Of that many tokens."""
        spec = self.spec
        return 2 * self.dtype.itemsize * spec.num_layers * batch * spec.num_kv_heads * context * spec.head_dim

    def peak_bytes(self) -> int | None:
        """It shares a process with ours."""
        return None

    def close(self) -> None:
        """Let go of it."""
        del self.net, self.cache

    def _timed(self, steps: int, **options: Any) -> float:
        import torch  # pyright: ignore[reportMissingImports]

        found, start = [], time.perf_counter()
        with torch.inference_mode():
            for _ in range(steps):
                given = {self.argument: self.cache, **options}
                logits = self.net(input_ids=self.newest, use_cache=True, **given).logits
                self.newest = logits[:, -1].argmax(dim=-1, keepdim=True)
                found.append(self.newest)
            self.newest.cpu()  # waits
        seconds = time.perf_counter() - start
        self.tokens = [int(token[0, 0]) for token in found]
        return seconds


def causal(model: Model) -> Any:
    """A checkpoint's directory as transformers reads it, else a model of theirs with our weights."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    where, kind = shipped.find(model.name), getattr(torch, model.decoder.dtype.name)
    if Path(where).is_dir():
        net: Any = AutoModelForCausalLM.from_pretrained(str(where), dtype=kind)
        return net.to(device()).eval()
    return _same(model, kind)


def _same(model: Model, kind: Any) -> Any:
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoConfig, AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    weights.check(model.spec, "--against transformers")
    config = to_config(model.spec)
    kept = {key: value for key, value in config.items() if key not in ("architectures", "torch_dtype")}
    with torch.device(device()):
        net: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**kept), dtype=kind)
    theirs = dict(net.named_parameters())
    with torch.no_grad():
        for name, array in weights.tensors(model):
            theirs.pop(name).copy_(torch.from_dlpack(jax.block_until_ready(array)))
    assert not theirs.keys() - {"lm_head.weight"}, f"weights that are not given: {sorted(theirs)}"
    return net.eval()
