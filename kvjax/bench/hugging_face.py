"""transformers' Llama with its `DynamicCache`: what decoding is compared with."""

import inspect
import time
from pathlib import Path
from typing import Any

import jax

from kvjax.bench.turns import Contestant
from kvjax.checkpoint import shipped
from kvjax.errors import InputError
from kvjax.generation.model import Model

NAME = "transformers"


def device() -> str:
    """Where torch computes: on the GPU if JAX does; raises `InputError` where torch cannot."""
    import torch  # pyright: ignore[reportMissingImports]

    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        raise InputError("--against transformers: JAX runs on a GPU and this torch does not: install a CUDA build")
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def contestant(model: Model, context: int, steps: int, weight_bytes: int, batch: int) -> Contestant:
    """Random weights of the model's shape and dtype, and a cache of `context` random tokens.

    Args:
      model: whose shape it has.
      context: tokens of each sequence.
      steps: tokens of a turn.
      weight_bytes: that a step reads.
      batch: sequences.
    """
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import DynamicCache  # pyright: ignore[reportMissingImports]

    spec, place, theirs = model.spec, device(), drawn(model)
    kind = getattr(torch, model.decoder.dtype.name)
    cache = DynamicCache()
    shape = (batch, spec.num_kv_heads, context, spec.head_dim)
    for layer in range(spec.num_layers):
        k, v = (torch.randn(shape, dtype=kind, device=place) for _ in "kv")
        cache.update(k, v, layer)
    named = "cache" if "cache" in inspect.signature(theirs.forward).parameters else "past_key_values"  # before 5.24
    token = [torch.zeros((batch, 1), dtype=torch.long, device=place)]

    def turn() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            for _ in range(steps):
                logits = theirs(input_ids=token[0], use_cache=True, **{named: cache}).logits
                token[0] = logits[:, -1].argmax(dim=-1, keepdim=True)
            token[0].cpu()  # waits
        return time.perf_counter() - start

    size = 2 * model.decoder.dtype.itemsize * spec.num_layers * batch * spec.num_kv_heads * context * spec.head_dim
    facts = {"cache_bytes": size, "batch": batch, "steps": steps}
    return Contestant(NAME, turn, batch * steps, steps * (weight_bytes + size), facts)


def drawn(model: Model) -> Any:
    """A Llama of the model's shape and dtype with random weights."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import LlamaForCausalLM  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, model.decoder.dtype.name))  # weights are made in it
    try:
        with torch.device(device()):
            return LlamaForCausalLM(_config(model)).eval()
    finally:
        torch.set_default_dtype(before)


def causal(model: Model) -> Any:
    """The same checkpoint, if transformers can read it, else random weights of its shape."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    where = shipped.find(model.name)
    if not Path(where).is_dir():
        return drawn(model)
    kind = getattr(torch, model.decoder.dtype.name)
    net: Any = AutoModelForCausalLM.from_pretrained(str(where), dtype=kind)
    return net.to(device()).eval()


def _config(model: Model) -> Any:
    from transformers import LlamaConfig  # pyright: ignore[reportMissingImports]

    spec = model.spec
    return LlamaConfig(
        vocab_size=spec.vocab_size, hidden_size=spec.embed_dim, intermediate_size=spec.mlp_dim,
        num_hidden_layers=spec.num_layers, num_attention_heads=spec.num_heads, head_dim=spec.head_dim,
        num_key_value_heads=spec.num_kv_heads, max_position_embeddings=spec.max_position,
        tie_word_embeddings=spec.tie_embeddings, attention_bias=spec.qkv_bias,
    )  # fmt: skip
