"""A model's weights as other libraries take them, so that rivals compute with the same numbers."""

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from kvjax.checkpoint import hf, names
from kvjax.errors import InputError
from kvjax.generation.model import Model
from kvjax.spec import ModelSpec

PLAIN = ("llama", "mistral", "qwen2", "qwen3")  # families whose checkpoints have a tensor for each parameter
FIRST = 256  # tokens that a vocabulary for llama.cpp has at least: one for each byte


def check(spec: ModelSpec, flag: str) -> None:
    """Raise `InputError` for a model that `tensors` cannot write."""
    changed = spec.weights or spec.latent or spec.gate or spec.experts
    if spec.family not in PLAIN or changed:
        raise InputError(f"{flag} takes plain weights of {', '.join(PLAIN)}: not those of this {spec.family} model")


def tensors(model: Model) -> Iterator[tuple[str, jax.Array]]:
    """The weights under Hugging Face's names, each as a checkpoint has it."""
    for path, array in hf.parameters(model.decoder):
        (name,) = names.sources(path, model.spec)
        yield name, array.T if names.is_transposed(path, model.spec) else array


def write_gguf(model: Model, path: Path) -> Path:
    """Write the weights as a GGUF file of Llama's architecture, in 32 bits; its vocabulary is bytes and numbers."""
    import gguf

    spec = model.spec
    check(spec, "llama.cpp")
    if spec.family not in ("llama", "mistral") or spec.windows:
        raise InputError(f"llama.cpp is given models of Llama's architecture: this one is {spec.family}")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(spec.max_position)
    writer.add_embedding_length(spec.embed_dim)
    writer.add_block_count(spec.num_layers)
    writer.add_feed_forward_length(spec.mlp_dim)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(spec.rope.theta)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    _vocabulary(writer, spec.vocab_size)
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, spec.num_layers)
    for name, array in tensors(model):
        heads = spec.num_heads if ".q_proj." in name else spec.num_kv_heads if ".k_proj." in name else None
        whole = np.asarray(array, np.float32)
        if heads is not None:  # pairs that turn together lie side by side there
            whole = whole.reshape(heads, 2, -1, *whole.shape[1:]).swapaxes(1, 2).reshape(whole.shape)
        writer.add_tensor(str(known.get_name(name, (".weight", ".bias"))), np.ascontiguousarray(whole))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _vocabulary(writer, size: int) -> None:
    """Tokens without a meaning: llama.cpp is given ids, and wants a token for each byte."""
    from gguf import TokenType

    if size < FIRST:
        raise InputError(f"llama.cpp wants {FIRST} tokens at least: this model has {size}")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<0x{i:02X}>" if i < FIRST else f"<{i}>" for i in range(size)])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([TokenType.BYTE if i < FIRST else TokenType.NORMAL for i in range(size)])
