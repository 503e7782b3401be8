"""Write a decoder trained here as a Hugging Face checkpoint of the Llama architecture."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from kvjax.corpus import tokens
from kvjax.files import output
from kvjax.models.decoder import Decoder, Linear
from kvjax.models.hf_config import to_config
from kvjax.spec import ModelSpec
from kvjax.tasks import vocabulary


def tensors(model: Decoder) -> dict[str, np.ndarray]:
    """The weights under Llama's names; matrices are `[out, in]`."""
    vectors: dict[str, nnx.Param] = {"model.embed_tokens": model.embedding, "model.norm": model.norm.scale}
    matrices: dict[str, Linear] = {} if model.head is None else {"lm_head": model.head}
    for index, layer in enumerate(model.layers):
        base = f"model.layers.{index}"
        assert layer.attention_norm is not None and layer.mlp_norm is not None
        vectors[f"{base}.input_layernorm"] = layer.attention_norm.scale
        vectors[f"{base}.post_attention_layernorm"] = layer.mlp_norm.scale
        matrices |= {f"{base}.self_attn.{p}_proj": getattr(layer.attention, p) for p in "qkvo"}
        matrices |= {f"{base}.mlp.{p}_proj": getattr(layer.mlp, p) for p in ("gate", "up", "down")}
    out = {f"{name}.weight": np.asarray(param[...]) for name, param in vectors.items()}
    return out | {f"{name}.weight": np.asarray(linear.kernel[...].T, order="C") for name, linear in matrices.items()}


def config(spec: ModelSpec) -> dict:
    """`config.json` of the demo model."""
    ids = {"bos_token_id": vocabulary.BOS, "eos_token_id": vocabulary.EOS}
    return to_config(spec) | {"rope_scaling": None, "attention_bias": False, "mlp_bias": False} | ids


def tokenizer_config(spec: ModelSpec) -> dict:
    """`tokenizer_config.json`."""
    bos, eos = vocabulary.SPECIAL
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": spec.max_position,
    }


def write(model: Decoder, out: Path) -> None:
    """Write `config.json`, `model.safetensors` in bfloat16 and the tokenizer's files to the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    graph, params = nnx.split(model)
    model = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    save_file(tensors(model), out / "model.safetensors", metadata={"format": "pt"})
    generation = {"bos_token_id": vocabulary.BOS, "eos_token_id": vocabulary.EOS, "do_sample": False}
    files = {
        "config.json": config(model.spec),
        "generation_config.json": generation,
        "tokenizer_config.json": tokenizer_config(model.spec),
    }
    for name, content in files.items():
        output.write_json(out / name, content)
    tokens.tokenizer().save(str(out / "tokenizer.json"))
