"""Convert a Hugging Face checkpoint to Orbax."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from kvjax.checkpoint import hf, orbax
from kvjax.errors import InputError
from kvjax.models.hf_config import read_config

DTYPES = ("bfloat16", "float32")


def convert(source: str, dst: Path, dtype: str | None = None, ignore: Collection[str] = ()) -> None:
    """Convert the checkpoint `source` into the new directory `dst`, with a progress bar on stderr.

    Args:
      source: a Hugging Face directory or a hub id.
      dst: the directory to make.
      dtype: one of `DTYPES`; None keeps each tensor's own.
      ignore: fields of `config.json` to treat as absent; noted in `dst`, so that loading it needs no flag.

    Cost: host memory of the checkpoint in its new dtype and of about its largest tensor.
    """
    if dtype not in (None, *DTYPES):
        raise InputError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    if dst.exists():
        raise InputError(f"{dst}: exists already; remove it or choose another directory")
    if orbax.is_orbax(Path(source)):
        raise InputError(f"{source}: is a converted checkpoint already")
    src = hf.resolve(source)
    spec = read_config(src, ignore)
    stored = hf.stored_dtype(src, spec)
    about = {
        "dtype": np.dtype(dtype or stored).name,
        "source": Path(source).resolve().name if Path(source).is_dir() else source.split("/")[-1],
        "ignore_config": sorted(ignore),
    }
    with _bar() as progress:
        orbax.save(dst, src, hf.read(src, spec, dtype and np.dtype(dtype), progress), about)


@contextmanager
def _bar() -> Iterator[hf.Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("reading", total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, description="reading" if done < total else "writing")

        yield advance
