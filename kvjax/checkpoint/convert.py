"""Convert a Hugging Face or GGUF checkpoint to Orbax, or an Orbax checkpoint to another dtype."""

import functools
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from kvjax.checkpoint import hf, orbax, shipped
from kvjax.checkpoint.header import DTYPES
from kvjax.checkpoint.lorc import lorc
from kvjax.checkpoint.lorc.ranks import LowRankOptions
from kvjax.checkpoint.stage import check_absent
from kvjax.errors import InputError
from kvjax.models import quantized
from kvjax.models.hf_config import read_config
from kvjax.spec import ModelSpec


def convert(
    source: str,
    dst: Path,
    dtype: str | None = None,
    ignore: Collection[str] = (),
    low_rank: LowRankOptions | None = None,
    weights: str | None = None,
) -> None:
    """Convert the checkpoint `source` into the new directory `dst`, with a progress bar on stderr.

    Args:
      source: a Hugging Face directory, a GGUF file, a hub id, a shipped checkpoint (`demo`), or a converted one to have
        in another dtype.
      dst: the directory to make.
      dtype: one of `DTYPES`; None keeps each tensor's own, float32 where it is quantised.
      ignore: fields of `config.json` to treat as absent; noted in `dst`, so that loading it needs no flag.
      low_rank: make keys and values low-rank; None = as they are.
      weights: int8 or int4, what matrices are kept in; None = in `dtype`.

    Cost: host memory of at most twice the largest part (embedding, layer or head) in the larger of its dtypes, and of
      about 128 MiB, whatever the model's size: parts stream from `hf.read_parts` to `orbax.save`. What changes weights
      goes between the two, as a generator of parts from parts; see `lorc.plan` for what it takes before.
    """
    if dtype not in (None, *DTYPES):
        raise InputError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    check_absent(dst)
    source = str(shipped.find(source))
    if orbax.is_orbax(Path(source)):
        _cast(Path(source), dst, dtype, ignore, low_rank, weights)
        return
    src = hf.resolve(source)
    found = hf.locate(src, read_config(src, ignore))
    kind = np.dtype(dtype or hf.stored_dtype(found))
    about = {
        "dtype": kind.name,
        "source": Path(source).resolve().name if Path(source).is_dir() else source.split("/")[-1],
        "ignore_config": sorted(ignore),
    }
    with _bar() as report:
        cast = dtype and np.dtype(dtype) if weights is None else None
        parts = hf.read_parts(found, cast, functools.partial(report, "converting"))
        if low_rank is not None:
            made = lorc.plan(found, src, low_rank, report)
            about |= lorc.about(made, low_rank)
            parts = lorc.factor(parts, made)
        if weights is not None:
            about |= {"weights": weights}
            parts = _encoded(parts, quantized.asked(found.spec, weights), kind)
        orbax.save(dst, src, parts, about)


def _encoded(parts: Iterable[tuple[str, hf.Part]], spec: ModelSpec, dtype: np.dtype) -> Iterator[tuple[str, hf.Part]]:
    """Parts with the matrices of a model in few bits, low-rank ones as they are, and the rest cast."""
    wanted, _ = hf.abstract(spec, dtype)
    for name, part in parts:
        yield name, dict(quantized.encoded(part.items(), wanted, dtype))


def _cast(
    src: Path,
    dst: Path,
    dtype: str | None,
    ignore: Collection[str],
    low_rank: LowRankOptions | None,
    weights: str | None,
) -> None:
    """A converted checkpoint in another dtype or in few bits; low-rank and retrofitted ones stay what they are."""
    about = orbax.read_about(src)
    if low_rank is not None:
        raise InputError(f"{src}: is a converted checkpoint already: --lorc is for what it was made from")
    if dtype in (None, about["dtype"]) and weights is None:
        has = f"{about['dtype']}, weights {about['weights']}" if about.get("weights") else about["dtype"]
        raise InputError(f"{src}: is a converted checkpoint already, in {has}: only --dtype and --weights change it")
    spec, kind = orbax.read_spec(src, ignore), np.dtype(dtype or about["dtype"])
    about |= {"dtype": kind.name, "ignore_config": sorted({*orbax.ignored(src), *ignore})}
    if weights is not None:
        parts = _encoded(orbax.read_parts(src, None, spec), quantized.asked(spec, weights), kind)
        about |= {"weights": weights}
    else:
        parts = orbax.read_parts(src, kind, spec)
    orbax.save(dst, src, parts, about)


@contextmanager
def _bar() -> Iterator[lorc.Report]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    bar, tasks = Progress(*columns, console=Console(stderr=True)), dict[str, TaskID]()
    with ExitStack() as shown:

        def report(what: str, done: int, total: int) -> None:
            if not tasks:  # not before: an error that comes first is one line
                shown.enter_context(bar)
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        yield report
