"""What generation and scoring return."""

from typing import NamedTuple

import numpy as np

from kvjax.cache.layout import Cache
from kvjax.cache.tier import Bytes
from kvjax.parallel import mesh as meshes
from kvjax.policies.base import Recipe


class Compared(NamedTuple):
    """A cache beside the full one [bytes]: numbers that no store encodes count two bytes in both.

    That is what they take in bfloat16, in which checkpoints come and accelerators compute. A run in float32 allocates
    twice that, and would flatter every store: of 32 bits four are an eighth, of 16 a quarter.
    """

    cache: int
    full: int  # for the same tokens

    @property
    def share(self) -> float:
        """What the cache takes of the full one."""
        return self.cache / self.full


class Footprint(NamedTuple):
    """What a cache takes and keeps."""

    bytes: Bytes  # allocated, on all devices together
    full_bytes: int  # that a full cache needs for the same tokens, in the model's dtype
    compared: Compared
    slots: list[list[int | float]]  # kept slots per layer, per sequence, averaged over heads


class Logprobs(NamedTuple):
    """Natural logarithms of the probabilities that the model gives to tokens, before anything is done to choose one."""

    chosen: np.ndarray  # [T] of each generated token
    ids: np.ndarray  # [T k] the most likely tokens in its place, from the first on
    top: np.ndarray  # [T k] theirs


class Continuation(NamedTuple):
    """One generated sequence."""

    prompt_tokens: int  # with the question
    tokens: list[int]  # generated, with the stop token if one was generated
    text: str | None  # None without a tokenizer
    finish_reason: str  # "stop" or "length"
    logprobs: Logprobs | None = None  # where they were asked for


class Timing(NamedTuple):
    """Wall-clock time [seconds], compilation apart."""

    prefill_s: float  # until the first generated token: prompts and questions
    decode_s: float
    decode_tokens_per_s: float
    compile_s: float


class Generation(NamedTuple):
    """What `generate` returns."""

    sequences: list[Continuation]
    bytes: Bytes  # allocated for the cache, on all devices together
    full_bytes: int  # that a full cache needs for the same prompts and new tokens or total length, in the model's dtype
    compared: Compared
    slots: list[list[int | float]]  # kept slots per layer, per sequence, averaged over heads
    full_slots: list[list[int]]  # the same of a full cache that has read as many tokens
    timing: Timing
    logits: np.ndarray  # [B V] after each prompt's last token
    cache: Cache
    recipe: Recipe
    forced: int = 0  # slots that a learned gate asked for in vain, over all rows; 0 for other methods

    @property
    def device_bytes(self) -> int:
        """Allocated for the cache on each device."""
        return self.bytes.total // meshes.count(self.cache)


class Judgement(NamedTuple):
    """Of one continuation."""

    logprobs: np.ndarray  # [q] natural logarithms
    greedy: bool  # every token is the most likely one
