"""What an evaluation task is: a source of samples and a metric."""

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from kvjax.errors import InputError

Form = Literal["short", "natural"]
EVALUATION = 0x6576616C  # entropy: no seed is shared with the training or the scores of the demo model


class Sample(NamedTuple):
    """One prompt and what is expected after it.

    The prompt is `context + question`, then the beginning of the answer, `prefix`. With `--question unseen` only the
    context is compressed at prefill; the rest is read token by token from the compressed cache. Samples of one part and
    index have one context and several questions about it: it is then compressed once for all of them.
    """

    part: str  # of the task: a length, a data set; a task's score is the mean over its parts
    index: int  # within the part
    context: str
    question: str = ""  # of a teacher-forced task: the continuation
    prefix: str = ""  # what the answer is made to begin with (after the chat template's turn)
    answers: tuple[str, ...] = ()
    new: int = 0  # most tokens to generate
    chat: bool = True  # may be wrapped in a chat template
    facts: dict[str, int | float | str] = {}  # noqa: RUF012  (never changed) what the sample was drawn with: depth, lines
    asked: int = 0  # which of the questions about its context


class Request(NamedTuple):
    """What the command line asks a task for."""

    samples: int  # contexts per part
    seed: int
    lengths: tuple[int, ...]  # of prompt and answer together [tokens]
    form: Form  # short = what the demo model is trained on; natural = for chat models
    encode: Callable[[str], list[int]]  # token ids of a text, without special tokens
    frame: int  # tokens that surround a prompt: special tokens, chat template
    text: str  # for haystacks and perplexity
    data: Path | None  # folder of file tasks

    def rng(self, task: str, part: str, index: int) -> np.random.Generator:
        """The generator of one sample: the same however many samples are drawn."""
        return np.random.default_rng([EVALUATION, self.seed, zlib.crc32(f"{task}/{part}".encode()), index])

    def tokens(self, *samples: Sample) -> int:
        """Length of the longest of these samples with its answer [tokens]."""
        return self.frame + max(len(self.encode(s.context + s.question + s.prefix)) + s.new for s in samples)


class Task(NamedTuple):
    """A named source of samples and its metric.

    Attributes:
      name: key in `TASKS`.
      samples: all samples of a request, parts one after the other, and questions about a context.
      metric: `(generated text, sample) -> score`, 0 to 1; or what is measured on `question` as a given continuation:
        the model's `perplexity`, or the `kl` divergence from the full cache's next-token distributions.
    """

    name: str
    samples: Callable[[Request], list[Sample]]
    metric: Callable[[str, Sample], float] | Literal["perplexity", "kl"]

    @property
    def better(self) -> Literal["higher", "lower"]:
        """The direction of a good score."""
        return "higher" if callable(self.metric) else "lower"


def most(limit: int, fits: Callable[[int], bool], least: int = 0) -> int:
    """The largest n that fits, `least <= n <= limit`, when `least` fits and what is smaller fits too."""
    low, high = least, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def fit(
    request: Request, task: str, length: int, build: Callable[[int], Sequence[Sample]], least: int, limit: int
) -> Sequence[Sample]:
    """The largest `build(n)`, `least <= n <= limit`, all of whose samples fit into `length` tokens.

    Args:
      request: counts tokens.
      task: name, for the error.
      length: prompt and answer together [tokens].
      build: samples of size n (lines, sentences, words): the questions about one context; longer for larger n.
      least, limit: range of n.
    """
    if (used := request.tokens(*build(least))) > length:
        raise InputError(f"task {task} does not fit into {length} tokens: its shortest prompt and answer take {used}")
    return build(most(limit, lambda n: request.tokens(*build(n)) <= length, least))
