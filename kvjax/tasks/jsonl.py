"""Official data files of tasks: one JSON object per line."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from kvjax.errors import InputError
from kvjax.files.text import parse_json


def find(data: Path | None, task: str, names: Sequence[str], source: str) -> Path:
    """The first file that exists.

    Args:
      data: folder given with `--data`.
      task: name, for the error.
      names: paths in `data`, the best first; a pattern with `*` means its first match by name.
      source: address of the official files.
    """
    if data is None:
        raise InputError(f"task {task} reads its official files: download them from {source}, then give --data DIR")
    for name in names:
        if found := sorted(path for path in data.glob(name) if path.is_file()):
            return found[0]
    looked = " or ".join(str(data / name) for name in names)
    raise InputError(f"task {task} finds no {looked}: download the official files from {source}")


def read(path: Path, fields: Mapping[str, type], most: int) -> list[tuple[int, dict]]:
    """The first records of a file with their line numbers, from 1.

    Args:
      path: a JSONL file; blank lines are passed over.
      fields: name and type that every record must have.
      most: records to read, at least 1.
    """
    records = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if len(records) == most:
                    break
                if line.strip():
                    records.append((number, _record(path, number, line, fields)))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if not records:
        raise InputError(f"{path} is empty")
    return records


def _record(path: Path, number: int, line: bytes, fields: Mapping[str, type]) -> dict:
    """One line as an object that has `fields`."""
    record = parse_json(line, f"{path}, line {number}")
    for name, kind in fields.items():
        if not isinstance(record, dict) or not isinstance(record.get(name), kind):
            raise InputError(f"{path}, line {number} has no field {name!r} that is a {kind.__name__}")
    return record
