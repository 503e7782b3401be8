"""Tiny checkpoints with the logits and greedy tokens that transformers computes for them.

Made by `python tests/golden/make_golden.py`; reading them needs neither torch nor transformers.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

FOLDER = Path(__file__).parent
NAMES = tuple(sorted(file.stem for file in FOLDER.glob("*.npz")))


class Golden(NamedTuple):
    """One checkpoint and what transformers makes of it, in float32."""

    config: dict[str, Any]  # config.json
    weights: dict[str, np.ndarray]  # the state dict; the numbers fit float16
    prompt: np.ndarray  # [T]
    logits: np.ndarray  # [V] at the prompt's last position
    greedy: np.ndarray  # [12] generated with a cache
    recomputed: np.ndarray  # [12] generated without: differs where rope is dynamic


def load(name: str) -> Golden:
    """A golden file by its name."""
    with np.load(FOLDER / f"{name}.npz") as file:
        weights = {key.removeprefix("weights/"): file[key] for key in file.files if key.startswith("weights/")}
        fields = {key: file[key] for key in ("prompt", "logits", "greedy", "recomputed")}
        return Golden(json.loads(str(file["config"])), weights, **fields)


def write_checkpoint(name: str, directory: Path, dtype: Any = np.float32, shards: int = 1) -> Path:
    """Write a golden file as a Hugging Face directory; with several shards, an index as well."""
    golden = load(name)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(golden.config, indent=2))
    weights = {key: value.astype(dtype) for key, value in golden.weights.items()}
    if shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    listed = {}
    for index in range(shards):
        shard = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        part = {key: weights[key] for key in list(weights)[index::shards]}
        save_file(part, directory / shard, metadata={"format": "pt"})
        listed |= dict.fromkeys(part, shard)
    size = sum(value.nbytes for value in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(listed.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return directory
