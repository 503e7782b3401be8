"""The small files of a checkpoint: a directory's own, or what they would be where a GGUF file says it in fields."""

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from kvjax.files import gguf, text
from kvjax.models import gguf_config, gguf_tokenizer

_MADE = {
    "config.json": gguf_config.config,
    "generation_config.json": gguf_config.generation,
    "tokenizer.json": gguf_tokenizer.tokenizer,
    "tokenizer_config.json": gguf_tokenizer.settings,
}


def read_text(path: Path, name: str) -> str | None:
    """The text of a file of a checkpoint; None if it has none of this name."""
    if gguf.is_gguf(path):
        content = _made(path, name)
        return None if content is None else json.dumps(content, ensure_ascii=False)
    return text.read_text(path / name) if (path / name).is_file() else None


def read_json(path: Path, name: str) -> dict[str, Any] | None:
    """The object in a file of a checkpoint; None if it has none of this name."""
    if gguf.is_gguf(path):
        return _made(path, name)
    return text.read_json(path / name) if (path / name).is_file() else None


def source(path: Path, name: str, field: str) -> str:
    """Who says a field of a checkpoint's generation_config.json or its like: the file, or fields of a GGUF file."""
    return gguf_config.source(gguf.read(path), field) if gguf.is_gguf(path) else name


def copy(path: Path, names: Collection[str], dst: Path) -> None:
    """Copy those files that a checkpoint has into a directory."""
    for name in names:
        if gguf.is_gguf(path):
            content = read_text(path, name)
            if content is not None:
                (dst / name).write_text(content, encoding="utf-8")
        elif (path / name).is_file():
            shutil.copyfile(path / name, dst / name)


def _made(path: Path, name: str) -> dict[str, Any] | None:
    make = _MADE.get(name)
    return None if make is None else make(gguf.read(path))


def config(path: Path) -> dict[str, Any]:
    """A checkpoint's `config.json`."""
    return gguf_config.config(gguf.read(path)) if gguf.is_gguf(path) else text.read_json(path / "config.json")
