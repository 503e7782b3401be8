"""kvjax as a model of EleutherAI's lm-evaluation-harness (`lm_eval`): its tasks with a compressed cache.

    lm_eval --model kvjax --model_args pretrained=DIR,method=snapkv,budget=20% --tasks gsm8k --batch_size 8

works where lm_eval finds models of other packages (its releases after 0.4.13). With any release, the same command is
`python -m kvjax.evaluation.harness --model kvjax ...`: lm_eval's own command line after `kvjax` has been registered.

What a task measures depends on its requests:

- `loglikelihood`, multiple choice: the context is compressed at prefill and the continuation is read token by token
  through the compressed cache. A continuation's first token comes from prefill's exact attention, hence continuations
  of one token score the same with every method.
- `loglikelihood_rolling` (perplexity): the prompt is the first token and all the rest is continuation. Methods that
  only compress the prompt score as the full cache; those that evict while decoding need a budget in tokens.
- `generate_until`: the prompt is compressed. Generation stops at the end of text or after `max_gen_toks` tokens; the
  text is cut at the stop strings afterwards.

Source: lm_eval's `HFLM`, for how texts become tokens.
Differs: the last token counts against the context limit, so that the longest text is a token shorter;
  `loglikelihood_rolling` does not score the token that a tokenizer puts before a text; without BOS around a text the
  prefix is EOS, even if the vocabulary has a BOS; sampling without `top_k` draws from all tokens.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from kvjax import compilation
from kvjax.cli import command
from kvjax.cli.flags import DTYPES
from kvjax.errors import InputError
from kvjax.evaluation.harness_arguments import GenerationArguments, cut_at, read_generation_arguments, whole_number
from kvjax.generation.model import load
from kvjax.generation.results import Compared
from kvjax.methods import default_budget, make

PROG = "kvjax.evaluation.harness"
Pair = tuple[list[int], list[int]]  # token ids of a context and of its continuation
Scored = tuple[tuple[str, str] | None, list[int], list[int]]  # with the texts, None = a window of a longer text

log = logging.getLogger("lm_eval.models.kvjax")  # shown as lm_eval is told to


@register_model("kvjax")
class HarnessModel(TemplateLM):
    """A model with a compressed cache.

    Args:
      pretrained: as in `kvjax.load`: a directory or a hub id; None = the demo model.
      method: a key of `kvjax.METHODS`.
      budget: `512` or `20%`; None = the method's default.
      dtype: `float32`, `bfloat16` or `float16`, of weights and cache.
      weights: `int8` or `int4`, matrices in so few bits; None = as they are stored.
      max_length: tokens that longer contexts are cut to, from the left; None = the context limit.
      max_gen_toks: most tokens to generate where a task does not say.
      batch_size: sequences that are run together; the last batch is filled up with copies.
      prefix_token_id: the token before an empty context; None = what the tokenizer puts before a text, else EOS.
      device: ignored, since lm_eval always gives one: JAX chooses (`JAX_PLATFORMS`).
      arguments: the method's own arguments, such as `window=16`.

    Attributes:
      cache_bytes, full_bytes: of the caches of all sequences so far, and of full ones, as in `Compared`.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        method: str = "full",
        budget: str | int | float | None = None,
        dtype: str | None = None,
        weights: str | None = None,
        max_length: int | str | None = None,
        max_gen_toks: int | str = 256,
        batch_size: int | str = 1,
        prefix_token_id: int | None = None,
        device: str | None = None,
        **arguments: Any,
    ):
        super().__init__()
        if dtype is not None and dtype not in DTYPES:
            raise InputError(f"dtype={dtype} is not one of {', '.join(DTYPES)}")
        self._recipe = make(method, budget, arguments)  # pyright: ignore[reportArgumentType]: a wrong budget raises
        self._settings = {"method": method, "budget": default_budget(method) if budget is None else budget} | arguments
        self._model = load(pretrained, dtype=None if dtype is None else DTYPES[dtype], weights=weights)
        if self._model.tokenizer is None:
            raise InputError(f"{self._model.name} has no tokenizer.json: its texts cannot be read")
        self._tokenizer = self._model.tokenizer
        self._begin = self._tokenizer.encode("")[:1]
        limit = self._model.spec.max_position
        self.max_length = limit if max_length is None else whole_number("max_length", max_length, limit)
        self.max_gen_toks = whole_number("max_gen_toks", max_gen_toks)
        self.batch_size = whole_number("batch_size", batch_size)
        self._prefix = prefix_token_id
        self._room = min(self.max_length + 1, limit)  # tokens of a context and its continuation
        self._draws = 0  # sequences so far, so that each has a seed of its own
        self.cache_bytes = self.full_bytes = 0.0

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        if not self._model.stop:
            raise InputError(f"{self._model.name} names no end-of-sequence token: give prefix_token_id")
        return self._model.stop[0]

    @property
    def prefix_token_id(self) -> int:
        """The token before an empty context."""
        if self._prefix is not None:
            return self._prefix
        return self._begin[0] if self._begin else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """For the keys of lm_eval's caches."""
        return self._model.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; by default with what the tokenizer puts around a text, once."""
        plain = self._tokenizer.encode(string, special=False)
        if add_special_tokens is None:  # a chat template has already written the first token
            add_special_tokens = not self._begin or plain[:1] != self._begin
        return self._tokenizer.encode(string) if add_special_tokens else plain

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation in the checkpoint's template; an answer that has begun follows the generation prompt."""
        if add_generation_prompt:
            return self._tokenizer.render(chat_history)
        return self._tokenizer.render(chat_history[:-1]) + chat_history[-1]["content"]

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Refuse to choose among several templates; lm_eval's record of the template stays empty."""
        if isinstance(chat_template, str):
            raise InputError("kvjax takes a checkpoint's default chat template: give --apply_chat_template no name")
        return ""

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval writes into its results."""
        return {
            "model_dtype": str(self._model.decoder.dtype),
            "kv_cache": self._settings | {"cache_bytes": self.cache_bytes, "full_bytes": self.full_bytes},
        }

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows as long as the context limit."""
        if self._recipe.budget is not None:
            log.warning(
                "loglikelihood_rolling has prompts of one token: methods that only compress the prompt score as the"
                " full cache, and a budget in % is a share of that token"
            )
        owners: list[int] = []
        windows: list[Scored] = []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self._room - 1, context_len=1):
                owners.append(owner)
                windows.append((None, *make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding gives it."""
        pairs = [self._fit(context, continuation) for _, context, continuation in requests]
        results = [(0.0, False)] * len(pairs)
        for batch in self._batches([(len(a), len(b)) for a, b in pairs], "loglikelihood", disable_tqdm):
            filled = self._filled([pairs[i] for i in batch])
            contexts, continuations = [context for context, _ in filled], [rest for _, rest in filled]
            judged, reading = self._model.log_likelihood(contexts, continuations, self._recipe)
            self._count(reading.compared, len(batch))
            for i, judgement in zip(batch, judged, strict=False):
                results[i] = float(judgement.logprobs.sum(dtype=np.float64)), judgement.greedy
                if (texts := requests[i][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, results[i])
        self._log()
        return results

    def _fit(self, context: list[int], continuation: list[int]) -> Pair:
        """A context cut from the left until its continuation has room."""
        if len(continuation) >= self._room:
            raise InputError(f"a continuation has {len(continuation)} tokens, at most {self._room - 1} can be scored")
        return context[-(self._room - len(continuation)) :], continuation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations, cut at the stop strings."""
        groups: dict[GenerationArguments, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(read_generation_arguments(request.arguments[1], self.max_gen_toks), []).append(i)
        if (new := max((asked.new for asked in groups), default=0)) >= self.max_length:
            raise InputError(f"max_gen_toks={new} leaves no room for a prompt in {self.max_length} tokens")
        prompts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        texts = [""] * len(requests)
        for asked, group in groups.items():
            cut = [prompts[i][-(self.max_length - asked.new) :] for i in group]
            for batch in self._batches([(len(prompt),) for prompt in cut], "generate_until", disable_tqdm):
                for i, text in zip(batch, self._generate([cut[i] for i in batch], asked), strict=True):
                    texts[group[i]] = text
                    self.cache_hook.add_partial("generate_until", requests[group[i]].args, text)
        self._log()
        return texts

    def _generate(self, prompts: list[list[int]], asked: GenerationArguments) -> list[str]:
        sampling = asked.sampling._replace(seed=asked.sampling.seed + self._draws)
        self._draws += len(prompts)
        out = self._model.generate(self._filled(prompts), self._recipe, max_new_tokens=asked.new, sampling=sampling)
        self._count(out.compared, len(prompts))
        return [cut_at(sequence.text or "", asked.until) for sequence in out.sequences[: len(prompts)]]

    def _batches(self, lengths: Sequence[tuple[int, ...]], name: str, quiet: bool) -> Iterator[list[int]]:
        """Indices in batches of similar lengths, longest first: few shapes, and what does not fit fails at once."""
        order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        with tqdm(total=len(order), desc=f"kvjax {name}", disable=quiet) as bar:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                yield batch
                bar.update(len(batch))

    def _filled(self, batch: list[Any]) -> list[Any]:
        """A batch of the full size, so that it is not compiled for itself."""
        return batch + batch[-1:] * (self.batch_size - len(batch))

    def _count(self, size: Compared, sequences: int) -> None:
        self.cache_bytes += size.cache * sequences / self.batch_size
        self.full_bytes += size.full * sequences / self.batch_size

    def _log(self) -> None:
        if self.full_bytes:
            share = self.cache_bytes / self.full_bytes
            log.info("caches of %.3g bytes, %.1f%% of full ones", self.cache_bytes, 100 * share)


def main() -> None:
    """lm_eval's command line, with the model `kvjax`."""
    from lm_eval.__main__ import cli_evaluate

    compilation.enable_compilation_cache()
    cli_evaluate()


if __name__ == "__main__":
    command.run(PROG, main)
