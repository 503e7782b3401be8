"""LoRC: make a model's keys and values low-rank while its checkpoint is converted."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float, Int

from kvjax.checkpoint import hf
from kvjax.checkpoint.lorc import calibration, low_rank, ranks
from kvjax.checkpoint.lorc.ranks import LowRankOptions, RankRequest
from kvjax.errors import InputError
from kvjax.files.text import read_prose
from kvjax.models.tokenizer import Tokenizer
from kvjax.spec import LatentSpec, ModelSpec

T = TypeVar("T")
Report = Callable[[str, int, int], None]  # (what is done, done, in all)
KERNELS = ("attention.k.kernel", "attention.v.kernel")


class Preparation(NamedTuple):
    """What is known before the parts of a model are factored.

    Attributes:
      latent: widths of the latents.
      n: channels of a group.
      moments: of each layer's keys and values on a text; None = those of the weights.
      hadamard: turn the latents.
    """

    latent: LatentSpec
    n: int
    moments: list[Float[np.ndarray, "2 C n n"]] | None
    hadamard: bool


def plan(weights: hf.StoredWeights, src: Path, options: LowRankOptions, report: Report) -> Preparation:
    """Decide the ranks, and collect the moments of keys and values on a text where that is wanted.

    Args:
      weights: the model.
      src: where its tokenizer is.
      options: what is wanted.
      report: called with what is done, layers done and layers in all.

    Cost: reads the projections of keys and values; for a text every layer, and holds `L 2 C n^2` float32 numbers.
    """
    spec = weights.spec
    heads, given = _settled(spec, options)
    n, found = heads * spec.head_dim, None
    counted = lambda what, each: _counted(what, each, spec.num_layers, report)
    if options.basis == "whiten":
        ids = _calibration_ids(src, options.text, spec)
        found = list(counted("calibrating", calibration.moments(weights, ids, n)))
    if given is None:
        assert isinstance(options.request, RankRequest)
        of_outputs = options.request.rule == "energy" and found
        source = of_outputs or counted("measuring", grams(weights, n))
        given = ranks.allot(options.request, np.stack([spectra(moments) for moments in source]))
    return Preparation(LatentSpec(heads, given), n, found, options.hadamard)


def _calibration_ids(src: Path, text: Path | None, spec: ModelSpec) -> Int[np.ndarray, "B T"]:
    tokenizer = Tokenizer.load(src)
    if tokenizer is None:
        raise InputError(f"{src}: has no tokenizer.json to calibrate on a text: --lorc-basis plain needs none")
    read = calibration.sample_text() if text is None else read_prose(text)
    ids = calibration.cut(read, tokenizer, spec.max_position)
    if ids.max() >= spec.vocab_size:
        raise InputError(f"{src}: its tokenizer's id {ids.max()} is not in the vocabulary (0 to {spec.vocab_size - 1})")
    return ids


def _settled(spec: ModelSpec, options: LowRankOptions) -> tuple[int, ranks.Ranks | None]:
    """Heads that share a latent, and the ranks if they were given; raises `InputError` for what the model has not."""
    if spec.joint_qk_norm:
        raise InputError(f"--lorc: {spec.family} models norm the keys of all heads together, which latents cannot")
    heads, given = options.heads or spec.num_kv_heads, None
    said = f"--lorc-groups {heads}"
    if isinstance(options.request, Path):
        written, given = ranks.read_ranks(options.request)
        if written is not None and options.heads not in (None, written):
            raise InputError(f"{options.request}: is for latents of {written} heads, {said} was given")
        if written is not None:
            heads, said = written, f"{options.request}: heads = {written}"
    if spec.num_kv_heads % heads:
        raise InputError(f"{said} does not divide the model's {spec.num_kv_heads} key/value heads")
    n = heads * spec.head_dim
    if given is None:
        assert isinstance(options.request, RankRequest)
        ranks.check(options.request, spec.num_kv_heads * spec.head_dim, n)
    elif len(given) != spec.num_layers or max(map(max, given)) > n:
        raise InputError(
            f"{options.request}: has ranks up to {max(map(max, given))} of {len(given)} layers, "
            f"the model has {spec.num_layers} layers with {n} channels for {heads} heads"
        )
    return heads, given


def grams(weights: hf.StoredWeights, n: int) -> Iterator[Float[np.ndarray, "2 C n n"]]:
    """Yield the moments of each layer's projections of keys and of values."""
    for layer in range(weights.spec.num_layers):
        kernels = hf.read(weights, [f"layers.{layer}.{name}" for name in KERNELS])
        yield np.stack([low_rank.gram(kernel, n) for _, kernel in kernels])


def spectra(moments: Float[np.ndarray, "2 C n n"]) -> Float[np.ndarray, "2 C n"]:
    """Singular values of a layer's keys and values."""
    return np.stack([low_rank.spectrum(one.astype(np.float64)) for one in moments])


def factor(parts: Iterable[tuple[str, hf.Part]], made: Preparation) -> Iterator[tuple[str, hf.Part]]:
    """The parts of a model with low-rank keys and values: `kvjax.models.decoder.LowRank` in place of their kernels."""
    for name, part in parts:
        kind, _, layer = name.partition(".")
        if kind == "layers":
            for each, (path, rank) in enumerate(zip(KERNELS, made.latent.ranks[int(layer)], strict=True)):
                kernel = part.pop(f"{name}.{path}")
                moments = low_rank.gram(kernel, made.n) if made.moments is None else made.moments[int(layer)][each]
                pair = low_rank.factors(kernel, moments.astype(np.float64), rank, made.hadamard)
                for side, array in zip(("down", "up"), pair, strict=True):
                    part[f"{name}.{path.removesuffix('kernel')}{side}"] = array.astype(kernel.dtype)
        yield name, part
        del part


def about(made: Preparation, options: LowRankOptions) -> dict[str, Any]:
    """What is noted of it in a converted checkpoint."""
    text = None if options.basis == "plain" else "a sample" if options.text is None else options.text.name
    asked = options.request.name if isinstance(options.request, Path) else ranks.write(options.request)
    how = {"ranks": asked, "basis": options.basis, "text": text, "hadamard": options.hadamard}
    return {"latent": asdict(made.latent), "lorc": how}


def _counted(what: str, each: Iterable[T], total: int, report: Report) -> Iterator[T]:
    for done, one in enumerate(each, 1):
        yield one
        report(what, done, total)
