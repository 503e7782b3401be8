"""The tensors of a GGUF file under the names of a Hugging Face checkpoint, and as they are there.

llama.cpp's conversion renames them, turns the rows of queries and keys where Llama's rotary embedding is meant, groups
Falcon's packed rows by kind, adds 1 to the norms of Gemma, and puts the matrices of all experts into one; all of it is
undone where a tensor is read.

Source: llama.cpp, `conversion/llama.py`, `falcon.py`, `gemma.py`, `internlm.py`, `smollm.py`, `granite.py`, `olmo.py`,
  `mistral3.py`, `qwen.py`, `gpt_oss.py`.
"""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Int

from kvjax.checkpoint import names
from kvjax.checkpoint.header import Stored
from kvjax.errors import InputError
from kvjax.files import gguf
from kvjax.models import gguf_config

# kvjax's module -> the GGUF's. Modules of a layer are relative to the layer.
_NAMES = {
    "embedding": "token_embd",
    "norm": "output_norm",
    "head": "output",
    "attention_norm": "attn_norm",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.o": "attn_output",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "attention_post_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
    "mlp_post_norm": "post_ffw_norm",
}
_EXPERTS = {"mlp.router": "ffn_gate_inp"} | {f"mlp.{each}": f"ffn_{each}_exps" for each in ("gate", "up", "down")}
_PACKED = dict.fromkeys(("attention.q", "attention.k", "attention.v"), "attn_qkv")
_OTHERS = {"phi3": _PACKED | {"mlp.gate": "ffn_up"}, "falcon": _PACKED}
_OTHERS |= {"gpt-oss": {"attention": "attn_sinks", "mlp_norm": "post_attention_norm"}}
_TWO_NORMS = {"attention_norm": "attn_norm_2", "mlp_norm": "attn_norm"}
_ROPE = re.compile(r"(blk\.\d+\.)?(rope_\w+|attn_rot_embd)\.weight")  # frequencies, which the configuration has
_PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_EXACT = {"MXFP4": "BF16"}  # types all of whose numbers a smaller one than float32 has
_TOGETHER = 2**20  # numbers that are dequantised at once

Order = Callable[[int], Int[np.ndarray, " rows"]]  # which rows of so many are those of the Hugging Face tensor


def headers(path: Path) -> dict[str, Stored]:
    """What every tensor of a GGUF file would be in a Hugging Face directory, without reading one."""
    file = gguf.read(path)
    config = gguf_config.config(file)
    kind = gguf_config.architecture(file)
    renamed, orders = _renamed(file, kind, config["model_type"]), _orders(kind, config)
    found: dict[str, Stored] = {}
    stacks: dict[str, list[gguf.Tensor]] = {}
    for tensor in file.tensors.values():
        if _ROPE.fullmatch(tensor.name):
            continue
        named = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", tensor.name)
        module = named and renamed.get((named[1] is not None, named[2]))
        name = module.format(named[1], named[3]) if named and module else tensor.name
        if not _is_readable(tensor.kind):
            raise InputError(f"{tensor.file}: tensor {tensor.name} is {tensor.kind}, which nothing here dequantises")
        order = orders.get(named[2]) if named else None
        shift = -1.0 if kind.startswith("gemma") and tensor.name.endswith("norm.weight") else 0.0
        if kind == "gpt-oss" and "_exps." in tensor.name:
            stacks.setdefault(name, []).append(tensor)
        elif "*" in name and len(tensor.shape) == 3 and tensor.shape[0] == config["num_local_experts"]:
            found |= {name.replace("*", str(i)): _stored(one, order, shift) for i, one in enumerate(_rows(tensor))}
        else:
            found[tensor.name if name in found else name] = _stored(tensor, order, shift)
    return _gpt_oss(found, stacks) if kind == "gpt-oss" else found


def _gpt_oss(found: dict[str, Stored], stacks: dict[str, list[gguf.Tensor]]) -> dict[str, Stored]:
    """The tensors of gpt-oss: experts in one, kernels `[E in out]`, gates and what they multiply in turns."""
    found = {re.sub(r"self_attn\.weight$", "self_attn.sinks", name): one for name, one in found.items()}
    for name, tensors in stacks.items():
        first, *others = sorted(tensors, key=lambda tensor: tensor.name)
        dtype = _dtype(first.kind) if all(one.kind == first.kind for one in others) else "F32"
        experts, *shape = first.shape
        if len(tensors) != 1 + ("gate_up" in name) or any(one.shape != first.shape for one in others) or not shape:
            found[first.name] = _stored(first, None, 0.0)  # named as what has no place
            continue
        whole = (experts, *shape[:0:-1], shape[0] * len(tensors))
        how = functools.partial(_in_turns, [first, *others], whole, _PLAIN[dtype])
        found[name.removesuffix(".weight").replace(".bias", "_bias")] = Stored(
            first.file, first.name, dtype, whole, how
        )
    return found


def _in_turns(tensors: list[gguf.Tensor], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Matrices of each expert, transposed; the columns of several in turns."""
    whole = np.empty(shape, dtype)
    for i, tensor in enumerate(tensors):
        for expert, one in enumerate(_rows(tensor)):
            whole[expert, ..., i :: len(tensors)] = _read(one, None, 0.0).T
    return whole


def _dtype(kind: str) -> str:
    """What the numbers of a type become."""
    return kind if kind in _PLAIN else _EXACT.get(kind, "F32")


def _stored(tensor: gguf.Tensor, order: Order | None, shift: float) -> Stored:
    dtype = "F32" if shift else _dtype(tensor.kind)
    return Stored(tensor.file, tensor.name, dtype, tensor.shape, functools.partial(_read, tensor, order, shift))


def _rows(tensor: gguf.Tensor) -> list[gguf.Tensor]:
    """A tensor's parts along its first axis, such as those of the experts."""
    count, *shape = tensor.shape
    size = tensor.nbytes // count
    part = tensor._replace(shape=tuple(shape), nbytes=size)
    return [part._replace(offset=tensor.offset + i * size) for i in range(count)]


def _renamed(file: gguf.Gguf, kind: str, family: str) -> dict[tuple[bool, str], str]:
    """(whether it is of a layer, the GGUF's module) -> the Hugging Face name, with {} for the layer and the leaf."""
    two = "blk.0.attn_norm_2.weight" in file.tensors
    theirs = names.modules(family, 2 if two else 0)
    ours = _NAMES | _OTHERS.get(kind, {}) | (_TWO_NORMS if two else {}) | (_EXPERTS if "mlp.router" in theirs else {})
    outside = ("embedding", "norm", "head")
    return {
        (module not in outside, ours[module]): f"{theirs[module]}.{{1}}"
        if module in outside
        else f"{theirs['layers']}.{{0}}.{theirs[module]}.{{1}}"
        for module in theirs
        if module in ours
    }


def _orders(kind: str, config: dict[str, Any]) -> dict[str, Order]:
    """Modules whose rows are in another order."""
    heads = config["num_attention_heads"]
    if kind in gguf_config.LIKE_LLAMA:
        kv_heads = config["num_key_value_heads"]
        return {"attn_q": functools.partial(_halves, heads), "attn_k": functools.partial(_halves, kv_heads)}
    return {"attn_qkv": functools.partial(_groups, heads, config["num_kv_heads"])} if kind == "falcon" else {}


def _halves(heads: int, rows: int) -> Int[np.ndarray, " rows"]:
    """Rows of heads whose number `i` turns with `i + H / 2`, from those whose neighbours turn together."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def _groups(heads: int, kv_heads: int, rows: int) -> Int[np.ndarray, " rows"]:
    """Rows of each key/value head with its queries, from all queries, all keys, all values."""
    width = rows // (heads + 2 * kv_heads)
    q, k, v = np.split(np.arange(rows).reshape(-1, width), [heads, heads + kv_heads])
    return np.concatenate([q.reshape(kv_heads, -1), k, v], axis=1).reshape(-1)


def _read(tensor: gguf.Tensor, order: Order | None, shift: float) -> np.ndarray:
    """A tensor's numbers, dequantised a few rows at a time."""
    rows, width = (1, tensor.shape[0]) if len(tensor.shape) == 1 else (tensor.shape[0], int(np.prod(tensor.shape[1:])))
    if tensor.kind in _PLAIN:
        array = gguf.numbers(tensor).view(_PLAIN[tensor.kind])
    else:
        array = np.empty((rows, width), _PLAIN[_dtype(tensor.kind)])
        step = max(1, _TOGETHER // width)
        for i in range(0, rows, step):
            some = array[i : i + step]
            nbytes = tensor.nbytes // rows
            raw = gguf.numbers(tensor, i * nbytes, len(some) * nbytes).reshape(len(some), nbytes)
            some[:] = _dequantised(raw, tensor.kind)
    array = array.reshape(tensor.shape)
    array = array if order is None else array[order(len(array))]
    return array + np.float32(shift) if shift else array


def _dequantised(raw: np.ndarray, kind: str) -> np.ndarray:
    from gguf import GGMLQuantizationType, dequantize

    with np.errstate(all="ignore"):  # what is not finite is seen by whoever asked
        return dequantize(raw, GGMLQuantizationType[kind])


@functools.cache
def _is_readable(kind: str) -> bool:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        return (
            kind in _PLAIN
            or _dequantised(np.zeros((1, GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]), np.uint8), kind).size > 0
        )
    except NotImplementedError:
        return False
