"""Choosing the next token: greedy, temperature, top-k, top-p, min-p, penalties, biases."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from kvjax.errors import InputError

Mode = Literal["greedy", "sample", "filter"]  # what runs: filters sort the vocabulary
MODES: tuple[Mode, ...] = get_args(Mode)
FILTERS = ("top_k", "top_p", "min_p")
SETTINGS = ("temperature", *FILTERS, "repetition_penalty")  # all but the seed
MOST_PENALTY = 1e6  # beyond it no rank changes any more, and logits leave float32
BIASES = 64  # tokens that a request may favour or shun


class Sampling(NamedTuple):
    """How the next token is chosen. The defaults are greedy decoding.

    Attributes:
      temperature: 0 = greedy.
      top_k: sample among the k most likely tokens; 0 = all.
      top_p: sample among the most likely tokens that together have this probability.
      min_p: sample among tokens at least this share as likely as the most likely one.
      repetition_penalty: divides the logits of tokens seen before (multiplies them if negative); 1 = off
        (arXiv 1909.05858).
      presence_penalty, frequency_penalty: taken from the logits of tokens that were generated before, once and as often
        as they were (OpenAI's).
      logit_bias: tokens and what is added to their logits, `BIASES` at most.
      seed: same seed, same text; 64 bits. Sequence `i` of a batch has the seed `seed + i`: it draws what it would draw
        alone.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def mode(self) -> Mode:
        """What of the rules below has to run; temperatures that round to nothing are greedy."""
        if self.temperature < 1e-6:
            return "greedy"
        return "filter" if self.top_k or self.top_p < 1 or self.min_p else "sample"

    def check(self) -> None:
        """Raise `InputError` for values that make no sense."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature {self.temperature} is not a number >= 0 (0 is greedy)")
        if self.top_k < 0:
            raise InputError(f"top-k {self.top_k} is negative (0 keeps all tokens)")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p {self.top_p} is not in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min-p {self.min_p} is not in [0, 1]")
        if not 1 / MOST_PENALTY <= self.repetition_penalty <= MOST_PENALTY:
            raise InputError(
                f"repetition-penalty {self.repetition_penalty} is not from {1 / MOST_PENALTY:g} to {MOST_PENALTY:g}"
                " (1 is off)"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(getattr(self, name)) <= MOST_PENALTY:
                raise InputError(
                    f"{name.replace('_', '-')} {getattr(self, name)} is not from {-MOST_PENALTY:g} to {MOST_PENALTY:g}"
                )
        if len(self.logit_bias) > BIASES or not all(
            isinstance(token, int) and 0 <= token < 2**31 and abs(bias) <= MOST_PENALTY
            for token, bias in self.logit_bias
        ):
            raise InputError(f"logit-bias is not at most {BIASES} token ids and biases up to {MOST_PENALTY:g}")
        if not -(2**63) <= self.seed < 2**63:
            raise InputError(f"seed {self.seed} does not fit 64 bits")

    def changed(self, names: Sequence[str]) -> list[str]:
        """Those of some values that are not the defaults, as flags name them."""
        found = {name: getattr(self, name) for name in names if getattr(self, name) != self._field_defaults[name]}
        return [f"{name.replace('_', '-')} {value}" for name, value in found.items()]


def of_config(config: Mapping[str, Any], where: object) -> Sampling:
    """How a checkpoint's generation_config.json wants tokens to be chosen.

    Differs from transformers: what the file leaves out is off, and no top-k of 50.

    Args:
      config: what the file says; without `do_sample` decoding is greedy, whatever its temperature.
      where: the file, for errors.
    """
    given = {name: value for name in SETTINGS if (value := config.get(name)) is not None}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or (name == "top_k" and value != value // 1):
            raise InputError(f"{where}: {name} = {value!r}, expected a number")
    if config.get("do_sample") is not True:
        given = {name: value for name, value in given.items() if name == "repetition_penalty"}
    else:
        given = {"temperature": 1.0} | given
    found = Sampling()._replace(
        **{name: max(int(value), 0) if name == "top_k" else float(value) for name, value in given.items()}
    )
    try:
        found.check()
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return found


class Chooser(NamedTuple):
    """`Sampling` of each sequence as arrays, so that new values do not recompile."""

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    repetition_penalty: Float[Array, " B"]
    presence_penalty: Float[Array, " B"]
    frequency_penalty: Float[Array, " B"]
    biased: Int[Array, "B biases"]  # tokens; none where the number is beyond the vocabulary
    bias: Float[Array, "B biases"]
    mode: Int[Array, " B"]  # index into `MODES`
    key: Array  # [B]


def chooser(sampling: Sampling, batch: int) -> Chooser:
    """The arrays of a `Sampling` for a batch; sequence `i` draws from the stream of the seed `seed + i`."""
    number = lambda x, dtype=jnp.float32: jnp.full(batch, x, dtype)
    biases = [*sampling.logit_bias, *[(2**31 - 1, 0.0)] * BIASES][:BIASES]
    seeds = [(int(sampling.seed) + i) % 2**64 for i in range(batch)]
    words = jnp.asarray([divmod(seed, 2**32) for seed in seeds], jnp.uint32)  # `jax.random.key` drops the high one
    return Chooser(
        number(sampling.temperature),
        number(min(sampling.top_k, 2**31 - 1), jnp.int32),
        number(sampling.top_p),
        number(sampling.min_p),
        number(sampling.repetition_penalty),
        number(sampling.presence_penalty),
        number(sampling.frequency_penalty),
        jnp.asarray(np.tile(np.asarray([token for token, _ in biases], np.int32), (batch, 1))),
        jnp.asarray(np.tile(np.asarray([bias for _, bias in biases], np.float32), (batch, 1))),
        number(MODES.index(sampling.mode), jnp.int32),
        jax.random.wrap_key_data(words, impl="threefry2x32"),
    )


def choose(
    logits: Float[Array, "B V"],
    chooser: Chooser,
    step: Int[Array, " B"],
    seen: Int[Array, "B V"],
) -> Int[Array, " B"]:
    """The next token of each sequence.

    Biases and penalties apply first, in vLLM's order: biases, repetition, frequency, presence; then filters in the
    order of transformers' logits processors: temperature, top-k, top-p, min-p.

    Args:
      logits: next-token logits.
      chooser: parameters and keys.
      step: index of the token to be chosen, folded into the keys.
      seen: tokens that penalties apply to: 1 in the prompt or 0, and once generated one more than how often.

    "greedy" takes the most likely token (after penalties), ties go to the lowest id; "sample" draws;
    "filter" draws among those that top-k, top-p and min-p leave. The mode is data: one program has all three, and runs
    what the sequence that asks for most needs.
    """
    mode, logits = chooser.mode, adjusted(logits, chooser, seen)
    warm = logits / jnp.where(mode > 0, chooser.temperature, 1.0)[:, None]
    likeliest = lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
        keys = jax.vmap(jax.random.fold_in)(chooser.key, step)
        return jnp.where(mode > 0, jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32), likeliest())

    filtered = lambda: jnp.where((mode > 1)[:, None], _filter(warm, chooser), warm)
    return jax.lax.switch(jnp.max(mode), [likeliest, lambda: draw(warm), lambda: draw(filtered())])


def adjusted(logits: Float[Array, "B V"], chooser: Chooser, seen: Int[Array, "B V"]) -> Float[Array, "B V"]:
    """Logits under biases and penalties; see `choose`."""
    logits = logits.at[jnp.arange(len(logits))[:, None], chooser.biased].add(chooser.bias, mode="drop")
    penalty = chooser.repetition_penalty[:, None]
    logits = jnp.where(seen > 0, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    count = jnp.maximum(seen.astype(jnp.float32) - 1, 0)
    return logits - (
        chooser.frequency_penalty[:, None] * count + chooser.presence_penalty[:, None] * jnp.minimum(count, 1)
    )


def _filter(logits: Float[Array, "B V"], chooser: Chooser) -> Float[Array, "B V"]:
    """Logits with -inf where top-k, top-p or min-p exclude a token."""
    vocab = logits.shape[-1]
    top_k, top_p, min_p = (x[:, None] for x in (chooser.top_k, chooser.top_p, chooser.min_p))
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    rank = jnp.arange(vocab)
    keep = rank < jnp.where(top_k > 0, top_k, vocab)
    prob = jax.nn.softmax(jnp.where(keep, ranked, -jnp.inf), axis=-1)
    keep &= jnp.cumsum(prob, axis=-1) - prob < top_p
    keep &= prob >= min_p * prob[..., :1]
    keep |= rank == 0  # whatever the numbers, one token is left
    keep = jnp.put_along_axis(jnp.zeros(logits.shape, bool), order, keep, axis=-1, inplace=False)
    return jnp.where(keep, logits, -jnp.inf)
