"""The run over a grid of tasks, methods and budgets: batched, resumable, one JSON line per sample.

A line is written when its sample's batch is finished. A killed run continues with the first batch that has a sample
without a line. Batches are always formed from the same samples, so that what is computed does not depend on where a
run was killed.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvjax.cache import pages
from kvjax.errors import InputError
from kvjax.evaluation.grid import Point
from kvjax.evaluation.manifest import digest
from kvjax.evaluation.results import SAMPLES, Key, Line, check, key
from kvjax.files import journal
from kvjax.generation.accounting import full_slots
from kvjax.generation.model import Model
from kvjax.generation.results import Compared, Footprint, Generation
from kvjax.spec import ModelSpec
from kvjax.tasks.task import Form, Request, Sample, Task
from kvjax.tasks.text import shipped_text

Done = dict[Key, str | None]  # results that are there, and the digests of their samples
Size = tuple[float, float]  # of a sequence's cache, and of its full one [bytes]
NOTHING = Compared(0, 0)


class Prompts(NamedTuple):
    """A batch as generation takes it."""

    ids: list[list[int]]  # what is compressed at prefill
    after: list[list[int]]  # what follows: the question, or the continuation to be judged


class Batch(NamedTuple):
    """Samples that are run together: of one part, or of one context."""

    number: int
    samples: list[Sample]
    size: int  # sequences that are run at once: copies of the first one fill up the last batch of several


class Evaluation:
    """Runs samples of tasks through a model.

    Args:
      model: from `kvjax.load`.
      batch: most sequences that are run together.
      unseen: compress the context only, once for all questions about it, which are read beside it.
      chat: wrap prompts in the checkpoint's chat template.
      reference: whose full cache KL divergence compares with; None = the model itself.
    """

    def __init__(self, model: Model, *, batch: int, unseen: bool, chat: bool, reference: Model | None = None):
        self._model, self._batch, self._unseen, self._chat = model, batch, unseen, chat
        self._reference = reference or model
        numbers = {"latent": None, "profile": None, "weights": None}  # in which a model may be another's copy
        own, other = (replace(each.spec, **numbers) for each in (model, self._reference))
        if own != other:
            raise InputError(f"{self._reference.name} is another model than {model.name}: kl cannot compare them")
        self._references: dict[tuple[str, int], np.ndarray] = {}  # of the full cache, for KL divergence

    def batches(self, task: Task, samples: Sequence[Sample]) -> list[Batch]:
        """Samples of one part in groups; or all questions about a context that is read without them."""
        beside = self._beside(task)
        parts: dict[tuple, list[Sample]] = {}
        for sample in samples:
            parts.setdefault((sample.part, sample.index if beside else None), []).append(sample)
        found: list[Batch] = []
        for part in parts.values():
            size = min(self._batch, len(part))
            step = len(part) if beside else size
            found += [
                Batch(len(found) + i, part[at : at + step], size) for i, at in enumerate(range(0, len(part), step))
            ]
        return found

    def run(self, task: Task, point: Point, batch: Batch) -> list[dict[str, Any]]:
        """The lines of one batch."""
        pairs = list(map(self._encode, batch.samples))
        if self._beside(task):
            found = self._ask(task, point, batch, pairs)
        else:
            filled = [*pairs, *pairs[:1] * (batch.size - len(pairs))]  # one shape, compiled once
            contexts, rest = (list(texts) for texts in zip(*filled, strict=True))
            if task.metric == "kl":
                found = self._diverge(task, point, batch, Prompts(contexts, rest))
            elif task.metric == "perplexity":
                found = self._judge(point, Prompts(contexts, rest))
            else:
                found = self._generate(task, point, batch, [context + after for context, after in filled])
        lines = zip(batch.samples, pairs, found, strict=False)
        return [_head(task, point, sample) | line | {"digest": _digest(sample, pair)} for sample, pair, line in lines]

    def _beside(self, task: Task) -> bool:
        """Whether a task's questions are asked of a context that has been read without them."""
        return self._unseen and callable(task.metric)

    def check(self, samples: Mapping[str, Sequence[Sample]], done: Done) -> None:
        """Raise `InputError` if a result that is there is of another prompt than the sample has now.

        Args:
          samples: of each task.
          done: what is there.
        """
        drawn = {(task, s.part, s.index, s.asked): s for task, each in samples.items() for s in each}
        digests: dict[tuple[str, str, int, int], str] = {}
        for (task, part, index, asked, _, _), found in done.items():
            if (name := (task, part, index, asked)) not in drawn:
                continue
            if name not in digests:
                digests[name] = _digest(drawn[name], self._encode(drawn[name]))
            if found != digests[name]:
                raise InputError(
                    f"task {task}, part {part}, sample {index}: the results are of another prompt than it has now:"
                    " choose another --out"
                )

    def _encode(self, sample: Sample) -> tuple[list[int], list[int]]:
        return encode(self._model, sample, chat=self._chat, unseen=self._unseen)

    def _generate(self, task: Task, point: Point, batch: Batch, prompts: list[list[int]]) -> list[dict[str, Any]]:
        new = max(sample.new for sample in batch.samples)
        out = self._model.generate(prompts, point.recipe, max_new_tokens=new)
        return self._scored(task, batch.samples, new, batch.number, out, _each(out.compared, len(prompts)))

    def _ask(
        self, task: Task, point: Point, batch: Batch, pairs: Sequence[tuple[list[int], list[int]]]
    ) -> list[dict[str, Any]]:
        """Questions of one context, read once; a line's bytes are the context's and its own question's."""
        new, ids = max(sample.new for sample in batch.samples), pairs[0][0]
        if any(context != ids for context, _ in pairs):
            raise InputError(f"task {task.name}: questions change the tokens of their context: give --question seen")
        context, lines = self._model.read(ids, point.recipe), []
        alone = context.footprint.compared
        for start in range(0, len(pairs), self._batch):
            asked = [question for _, question in pairs[start : start + self._batch]]
            asked += asked[:1] * (pages.ladder(len(asked), steps=1, smallest=1) - len(asked))  # one of few shapes
            out = context.ask(asked, max_new_tokens=new)
            samples = batch.samples[start : start + self._batch]
            found = self._scored(task, samples, new, batch.number, out, _each(out.compared, len(asked), alone))
            lines += [line | {"context_bytes": alone.cache, "context_full_bytes": alone.full} for line in found]
        return lines

    def _scored(
        self, task: Task, samples: Sequence[Sample], new: int, number: int, out: Generation, each: Size
    ) -> list[dict[str, Any]]:
        """A line of each sample whose answer was generated, and what its sequence's cache takes."""
        assert callable(task.metric)
        decoded = sum(len(sequence.tokens) - 1 for sequence in out.sequences)
        timing = {"batch": number, "decode_s": out.timing.decode_s, "decoded": decoded}
        lines = []
        for sample, sequence, slots in zip(samples, out.sequences, out.slots, strict=False):
            text = sequence.text or ""
            read = sequence.prompt_tokens + len(sequence.tokens) - 1  # the last token is chosen and never read
            line = {
                "metric": "score",
                "score": float(task.metric(text, sample)),
                "prediction": text,
                "answers": list(sample.answers),
                "prompt_tokens": sequence.prompt_tokens,
                "new_tokens": new,
            }
            lines.append(line | _cost(self._model.spec, each, slots, read) | {"timing": timing})
        return lines

    def _judge(self, point: Point, prompts: Prompts) -> list[dict[str, Any]]:
        judged, reading = self._model.log_likelihood(prompts.ids, prompts.after, point.recipe)
        # The first token's distribution comes from prefill's exact attention: the same for every method.
        values = [-judgement.logprobs[1:] for judgement in judged]
        return _forced_lines(self._model.spec, "perplexity", values, prompts, reading, fed=-1)

    def _diverge(self, task: Task, point: Point, batch: Batch, prompts: Prompts) -> list[dict[str, Any]]:
        key = (task.name, batch.number)
        if key not in self._references:
            self._references[key] = self._reference.references(*prompts)
        values, reading = self._model.divergence(
            *prompts, point.recipe, reference=self._references[key], source=self._reference
        )
        return _forced_lines(self._model.spec, "kl", values, prompts, reading, fed=0)


def request(
    model: Model,
    *,
    samples: int,
    lengths: tuple[int, ...],
    form: Form,
    chat: bool = False,
    seed: int = 0,
    text: str | None = None,
    data: Path | None = None,
) -> Request:
    """What tasks need to know to write prompts for a model.

    Args:
      model: counts tokens.
      samples, lengths, form, seed, data: as in `Request`.
      chat: prompts are wrapped in the checkpoint's chat template.
      text: for haystacks and perplexity; None = the shipped one.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer.json: its prompts cannot be written")
    plain = lambda words: tokenizer.encode(words, special=False)
    # In a template texts may be split differently: one token more.
    whole = len(tokenizer.chat([{"role": "user", "content": "x"}])) + 1 if chat else len(tokenizer.encode("x"))
    text = shipped_text() if text is None else text
    return Request(samples, seed, lengths, form, plain, whole - len(plain("x")), text, data)


def encode(model: Model, sample: Sample, *, chat: bool, unseen: bool = False) -> tuple[list[int], list[int]]:
    """Token ids of a sample's context, with what stands before it, and of what follows it."""
    context, question, tokenizer = sample.context, sample.question, model.tokenizer
    assert tokenizer is not None
    whole, cut = context + question, len(context)
    if chat and sample.chat:
        whole = tokenizer.render([{"role": "user", "content": whole}])
        stripped = context.strip()  # templates strip what they wrap
        cut = whole.find(stripped) + len(stripped)
        if stripped not in whole:
            raise InputError("the chat template changes its messages: give --no-chat")
    if unseen and not context.strip():
        raise InputError(f"sample {sample.part} {sample.index} has nothing before its question: give --question seen")
    return tokenizer.split(whole + sample.prefix, cut, special=not (chat and sample.chat))


def _digest(sample: Sample, pair: tuple[list[int], list[int]]) -> str:
    """What names a sample: its tokens, the answers and how much is generated."""
    return digest(json.dumps([pair, sample.answers, sample.new]))


def _head(task: Task, point: Point, sample: Sample) -> dict[str, Any]:
    return {
        "task": task.name,
        "part": sample.part,
        "index": sample.index,
        "asked": sample.asked,
        "method": point.method,
        "budget": point.budget,
        "better": task.better,
        "facts": sample.facts,
    }


def _forced_lines(
    spec: ModelSpec, metric: str, values: list[np.ndarray], prompts: Prompts, reading: Footprint, fed: int
) -> list[dict[str, Any]]:
    lines = []
    for value, context, after, slots in zip(values, *prompts, reading.slots, strict=True):
        new = len(after) + fed
        cost = _cost(spec, _each(reading.compared, len(values)), slots, len(context) + new)
        tokens = [float(f"{x:.6g}") for x in value]
        line = {"metric": metric, "score": float(np.mean(value, dtype=np.float64)), "tokens": tokens}
        lines.append(line | {"prompt_tokens": len(context), "new_tokens": new} | cost)
    return lines


def _each(size: Compared, count: int, shared: Compared = NOTHING) -> Size:
    """What one of `count` sequences takes, with all of what they share."""
    each = lambda whole, one: one + (whole - one) / count
    return each(size.cache, shared.cache), each(size.full, shared.full)


def _cost(spec: ModelSpec, size: Size, slots: Sequence[int | float], read: int) -> dict[str, float]:
    """What the cache of one sequence takes, and its slots beside those of a full one that has read as many tokens."""
    kept = sum(slots) / sum(full_slots(spec, read))
    return {"cache_bytes": size[0], "full_bytes": size[1], "kept": kept}


@contextlib.contextmanager
def results(directory: Path) -> Iterator[tuple[Done, FileIO]]:
    """The samples that are done, and the file to append to; one process at a time.

    A line that was being written when a run was killed is cut off.
    """
    path = directory / SAMPLES
    with journal.open_lines(path) as file:
        journal.lock(file, path)
        yield {key(line): line.get("digest") for line in check(journal.recover(file), path)}, file


def append(file: FileIO, lines: Sequence[Line], done: Done) -> None:
    """Write the lines that are not there yet."""
    fresh = [line for line in lines if key(line) not in done]
    journal.append(file, fresh)
    done.update((key(line), line["digest"]) for line in fresh)
