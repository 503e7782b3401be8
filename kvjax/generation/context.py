"""A context: a text that is read once, kept compressed, and asked often.

It is a value. Nothing that is done with it changes it: questions and answers go into caches of their own beside it, and
what it grows to is another context. So to fork it is to use it twice.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from kvjax.cache import layout, pages
from kvjax.cache import tier as tiers_
from kvjax.cache.layout import Cache
from kvjax.cache.tier import Bytes
from kvjax.errors import InputError, say_once
from kvjax.generation import generate as generating
from kvjax.generation import stopping
from kvjax.generation.accounting import footprint
from kvjax.generation.allocate import allocate
from kvjax.generation.checks import check_list, check_options, check_texts
from kvjax.generation.generate import Pieces, Tokens
from kvjax.generation.model import Model, Texts, encode_continuation, encode_prompt
from kvjax.generation.prefill import padded_length
from kvjax.generation.results import Footprint, Generation
from kvjax.generation.sampling import Sampling
from kvjax.generation.timing import Stopwatch
from kvjax.methods import of, resolve
from kvjax.policies.base import Recipe
from kvjax.policies.budgets.budget import Keep, parse_keep, tokens_of
from kvjax.policies.layers import asking, layer_recipe
from kvjax.spec import Lengths, ModelSpec

AT_ONCE = 64  # tokens that a context grows by in one call
OnToken = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """A text as a method keeps it. Made by `Model.read`.

    Attributes:
      model: what has read the text.
      recipe: the method.
      tokens: the text, and what has been added to it.
      logits: after its last token, `[1 V]`.
      cache: of one sequence.
      prompt: tokens that were read at once: budgets are of these.
      room: tokens that the cache can take before it is made larger; tokens of the text included.
      named: the method and its budget as they were given, for files; None = as a recipe.
      chat: the text begins what a user says to a chat model, and questions end it.
    """

    model: Model
    recipe: Recipe
    tokens: tuple[int, ...]
    logits: jax.Array
    cache: Cache
    prompt: int
    room: int
    named: tuple[str, str | None] | None = None
    chat: bool = False

    def __repr__(self) -> str:
        return f"Context({len(self.tokens)} tokens, {self.recipe.name}, {self.bytes.total} bytes)"

    @property
    def footprint(self) -> Footprint:
        """What the context's cache takes and keeps, beside the full one of the same text."""
        return footprint(self.model, self.cache, [len(self.tokens)])

    @property
    def bytes(self) -> Bytes:
        """Allocated for the context's cache."""
        return self.footprint.bytes

    @property
    def full_bytes(self) -> int:
        """That a full cache needs for the same text, in the model's dtype."""
        return self.footprint.full_bytes

    @property
    def kept(self) -> list[int | float]:
        """Kept slots of each layer, averaged over heads."""
        return self.footprint.slots[0]

    def ask(
        self,
        questions: Sequence[str] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        n: int = 1,
        on_token: OnToken | None = None,
    ) -> Generation:
        """Answer questions, each as if it were the only one.

        All of them read this context, which is not copied; questions and answers are kept whole, in caches of their own
        and in the context's number format. Methods that evict while decoding evict nothing of a context that is asked.

        Args:
          questions: texts or token ids that follow the context; "" goes on with it. In a chat a text gets what the
            template has between the user's words and the answer.
          max_new_tokens, sampling, stop, logprobs, on_token: as in `Model.generate`.
          n: samples of each question, one after the other: sequence `i` draws with `seed + i`.

        Returns:
          As `Model.generate`: bytes and slots are those of the context, once, and of all questions.

        Raises:
          InputError: what is given cannot be used, in one line.

        >>> import kvjax
        >>> context = kvjax.load().read(list(range(1, 65)), "snapkv", "50%")
        >>> out = context.ask([[5, 6], [7]], max_new_tokens=4)
        >>> [sequence.prompt_tokens for sequence in out.sequences]
        [66, 65]
        """
        return generating.run(self.asked(questions, max_new_tokens, sampling, stop, logprobs, n), on_token)

    def stream(
        self,
        question: str | Sequence[int],
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> Pieces[Generation]:
        """The answer of `ask` to one question, in pieces as they appear; see `Model.stream`."""
        tokens = self.asked([question], max_new_tokens, sampling, stop)  # pyright: ignore[reportArgumentType]
        return generating.pieces(self.model, tokens, stop)

    def asked(
        self,
        questions: Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling | None,
        stop: Sequence[str],
        logprobs: int | None = None,
        n: int = 1,
    ) -> Tokens[Generation]:
        """`ask` as a generator of (sequence, token)."""
        check_list("questions", questions)
        if not len(questions):
            raise InputError("there is no question")
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise InputError(f"n {n} is not a whole number from 1 on")
        model, sampling, recipe = self.model, sampling or Sampling(), asking(self.recipe)
        check_options(model.spec, recipe, new=max_new_tokens, sampling=sampling, logprobs=logprobs)
        if n > 1 and sampling.mode == "greedy":
            say_once(f"n {n}: all samples are alike, for at temperature {sampling.temperature:g} decoding is greedy")
        stops, ending = stopping.stops(model, stop), ""
        if self.chat and model.tokenizer is not None:
            _, ending = model.tokenizer.around("")
        texts = [question + ending if isinstance(question, str) else question for question in questions]
        after = [ids for text in texts for ids in [encode_continuation(model, text)] * n]
        ids = [list(self.tokens)] * len(after)
        self._check(recipe, after, max_new_tokens)
        check_askable(model.spec, self.recipe)
        whole = [prompt + question for prompt, question in zip(ids, after, strict=True)]
        new = pages.ladder(max(map(len, after)) + max_new_tokens, steps=2, smallest=32)
        with Stopwatch() as watch:
            own = allocate(model.decoder, recipe, Lengths((0,) * len(after), new, padded=64))
            logits = jnp.broadcast_to(self.logits, (len(after), *self.logits.shape[1:]))
            logits, own, _ = generating.read_continuations(model, recipe, logits, own, ids, after, shared=self.cache)
            jax.block_until_ready((logits, own))
            read_s = watch.lap()
            own, sequences = yield from generating.decode_texts(
                model, recipe, whole, len(after), max_new_tokens, logits, own, sampling, stops, logprobs, self.cache
            )
            decode_s = watch.lap()
        lengths = [len(self.tokens), *(len(question) + max_new_tokens for question in after)]
        both = tuple((*shared, *tiers) for shared, tiers in zip(self.cache, own, strict=True))
        seconds = read_s, decode_s, watch.compile_s
        return generating.report(model, self.recipe, sequences, logits, both, lengths, seconds)

    def extend(self, text: str | Sequence[int]) -> "Context":
        """The context with more text at its end, read token by token through its cache, as the method decodes.

        >>> import kvjax
        >>> context = kvjax.load().read([1, 2, 3])
        >>> len(context.extend([4, 5]).tokens), len(context.tokens)
        (5, 3)
        """
        ids = encode_continuation(self.model, text)
        if not ids:
            return self
        self._check(self.recipe, [ids], 0)
        return self._read(self._with_room(len(ids)), ids)

    def generate(
        self,
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        on_token: OnToken | None = None,
    ) -> tuple[Generation, "Context"]:
        """Go on with the text; and the context with what was generated at its end, as the method decodes.

        Args:
          max_new_tokens, sampling, stop, logprobs, on_token: as in `Model.generate`. The context has all tokens, those
            of a stop string too.
        """
        return generating.run(self.generated(max_new_tokens, sampling, stop, logprobs), on_token)

    def generated(
        self, max_new_tokens: int, sampling: Sampling | None, stop: Sequence[str], logprobs: int | None = None
    ) -> Tokens[tuple[Generation, "Context"]]:
        """`generate` as a generator of (0, token)."""
        model, sampling, stops = self.model, sampling or Sampling(), stopping.stops(self.model, stop)
        check_options(model.spec, self.recipe, new=max_new_tokens, sampling=sampling, logprobs=logprobs)
        self._check(self.recipe, [[]], max_new_tokens)
        whole = [list(self.tokens)]
        with Stopwatch() as watch:
            grown = self._with_room(max_new_tokens)
            cache, sequences = yield from generating.decode_texts(
                model, self.recipe, whole, 1, max_new_tokens, self.logits, grown.cache, sampling, stops, logprobs
            )
            decode_s = watch.lap()
        lengths = [len(self.tokens) + max_new_tokens]
        seconds = 0.0, decode_s, watch.compile_s
        *read, last = sequences[0].tokens  # the last token is chosen, and not yet read
        after = dataclasses.replace(grown, cache=cache, tokens=(*self.tokens, *read))
        after = after._read(after, [last])
        found = generating.report(model, self.recipe, sequences, self.logits, after.cache, lengths, seconds)
        return found, after

    def prune(self, budget: Keep) -> "Context":
        """The context under a smaller budget, without reading the text again.

        As if it had been read with it, for methods whose rows each keep their best tokens: `snapkv`, `pyramidkv`,
        `h2o`, `tova`, `streaming_llm`, and any under `split=row` or `split=profile`.

        Args:
          budget: slots per row, 512 or "10%" of the text.

        Raises:
          InputError: the method divides slots over heads or layers by scores that a cache does not keep, merges or
            demotes what it does not keep, or has no budget; the context has grown; the budget is larger.

        >>> import kvjax
        >>> context = kvjax.load().read(list(range(1, 101)), "snapkv+window=8", "20%")
        >>> context.prune("10%").kept[0], context.kept[0]
        (10, 20)
        """
        spec, now, keep = self.model.spec, self.recipe.amounts.keep, parse_keep(budget)
        first = [group.index[0] for group in layout.layer_groups(spec)]
        windows = [spec.window(layer) for layer in first]
        whole = [window is not None and self.recipe.windowed == "whole" for window in windows]
        parts = [layer_recipe(spec, self.recipe, layer) for layer in first]
        prunes = [part.policy.pool_hooks.prune for part in parts]
        if now is None or any(prune is None and not kept for prune, kept in zip(prunes, whole, strict=True)):
            why = _not_pruned(self.recipe)
            raise InputError(f"{self.recipe.name} cannot be pruned: {why}: read the text with budget {budget}")
        if len(self.tokens) > self.prompt:
            raise InputError("the context has grown since it was read: prune it before")
        if tokens_of(keep, self.prompt) > tokens_of(now, self.prompt):
            raise InputError(f"budget {budget} is more than the context has: read the text with it")
        recipe = self.recipe._replace(amounts=self.recipe.amounts._replace(keep=keep))
        lengths = Lengths((self.prompt,), self.room - self.prompt, padded_length(self.prompt))
        fresh, length = allocate(self.model.decoder, recipe, lengths), jnp.asarray([self.prompt], jnp.int32)
        cache = tuple(
            tiers if prune is None else prune(tiers, new, length, window)
            for prune, tiers, new, window in zip(prunes, self.cache, fresh, windows, strict=True)
        )
        named = None if self.named is None else (self.named[0], str(budget))
        return dataclasses.replace(self, recipe=recipe, cache=cache, named=named)

    def save(self, path: str | Path) -> None:
        """Write the context to a file, for `Model.load_context`: what its cache holds, and which model has made it.

        Raises:
          InputError: the file cannot be written; then it is as it was before.
        """
        from kvjax.generation import context_file

        context_file.save(self, Path(path))

    def _read(self, grown: "Context", ids: Sequence[int]) -> "Context":
        """With tokens that the cache of `grown`, which is consumed, has room for; one program reads however many."""
        tokens, logits, cache = list(self.tokens), self.logits, grown.cache
        for start in range(0, len(ids), AT_ONCE):
            some = list(ids[start : start + AT_ONCE])
            logits, cache, _ = generating.read_continuations(self.model, self.recipe, logits, cache, [tokens], [some])
            tokens += some
        return dataclasses.replace(grown, tokens=tuple(tokens), logits=logits, cache=cache)

    def _with_room(self, new: int) -> "Context":
        """A copy with room for so many more tokens."""
        need = len(self.tokens) + new
        if need <= self.room:
            return dataclasses.replace(self, cache=jax.tree.map(jnp.copy, self.cache))
        spec = self.model.spec
        room = max(need, min(pages.ladder(need, steps=2, smallest=64), spec.max_position))
        lengths = Lengths((self.prompt,), room - self.prompt, padded_length(self.prompt))
        wanted = jax.eval_shape(lambda: allocate(self.model.decoder, self.recipe, lengths))
        cache: list[layout.Tiers] = []
        for group, tiers, want in zip(layout.layer_groups(spec), self.cache, wanted, strict=True):
            extend = layer_recipe(spec, self.recipe, group.index[0]).policy.pool_hooks.extend
            grown = tuple(_resized(t, w.free.shape[0] * w.page, w.capacity) for t, w in zip(tiers, want, strict=True))
            cache.append(grown if extend is None else extend(grown, len(self.tokens), room - self.room))
        return dataclasses.replace(self, cache=tuple(cache), room=room)

    def _check(self, recipe: Recipe, after: Sequence[Sequence[int]], new: int) -> None:
        """Raise `InputError` for texts that a recipe cannot cache behind this one, or so many new tokens after them."""
        read, later = list(self.tokens[: self.prompt]), list(self.tokens[self.prompt :])
        check_texts(self.model.spec, recipe, [read] * len(after), [[*later, *text] for text in after], new)


def read(
    model: Model,
    prompt: str | Sequence[int],
    method: str | Recipe | None,
    budget: Keep | None,
    prefill_chunk: int,
    max_length: int | None,
    chat: bool,
) -> Context:
    """`Model.read` with everything said."""
    recipe = resolve(model.spec, method, budget)
    named = None if isinstance(method, Recipe) else (method or of(model.spec), None if budget is None else str(budget))
    if chat and isinstance(prompt, str) and model.tokenizer is not None:
        ids = model.tokenizer.encode(model.tokenizer.around(prompt)[0], special=False)
    else:
        ids = encode_prompt(model, prompt)
    check_one_device(model)
    check_options(model.spec, recipe, max_length=max_length)
    check_texts(model.spec, recipe, [ids], [[]], max_length=max_length)
    new = 1 if max_length is None else max_length - 1
    logits, cache = generating.read_prompts(model, recipe, [ids], new, prefill_chunk, max_length)
    return Context(model, recipe, tuple(ids), logits, cache, len(ids), max_length or len(ids) + 1, named, chat)


def sample(
    model: Model,
    prompts: Texts,
    recipe: Recipe,
    *,
    questions: Texts | None,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str],
    logprobs: int | None,
    prefill_chunk: int,
    max_length: int | None,
    n: int,
) -> Tokens[Generation]:
    """`Model.generate` with several samples of one prompt."""
    if isinstance(prompts, str) or len(prompts) != 1:
        raise InputError(f"n {n} is of one prompt: give a list of one, or read each as a context and ask it")
    with Stopwatch() as watch:
        context = read(model, prompts[0], recipe, None, prefill_chunk, max_length, chat=False)
        jax.block_until_ready(context.cache)
        read_s = watch.lap()
    asked = [""] if questions is None else questions
    out = yield from context.asked(asked, max_new_tokens, sampling, stop, logprobs, n)
    timing = out.timing
    timing = timing._replace(prefill_s=timing.prefill_s + read_s, compile_s=timing.compile_s + watch.compile_s)
    return out._replace(timing=timing)


def check_one_device(model: Model) -> None:
    """Raise `InputError` for a model whose weights are split."""
    if model.mesh is not None:
        raise InputError("a context lies on one device: load the model without a mesh")


def check_askable(spec: ModelSpec, recipe: Recipe) -> None:
    """Raise `InputError` for a method whose contexts cannot be asked."""
    if recipe.positions is not None and recipe.windowed != "whole" and any(spec.windows):
        raise InputError(
            f"{recipe.name}: a sliding window counts places in its cache, which questions beside it have not:"
            " set windowed=whole or positions=absolute"
        )


def _not_pruned(recipe: Recipe) -> str:
    """Why what a method keeps cannot be made less."""
    if recipe.amounts.keep is None or recipe.budget is None:
        return "it has no budget"
    if recipe.budget.allocate is not None or recipe.budget.split is not None:
        return "its heads or layers share slots by scores that a cache does not keep"
    return "tokens that leave are merged, or go to another tier"


@functools.partial(jax.jit, static_argnums=(1, 2))
def _resized(tier: tiers_.Tier, slots: int, row: int) -> tiers_.Tier:
    """A copy of a tier with room for at least so many slots, and for so many of a row."""
    size, width = pages.pages_for(slots, tier.page), pages.pages_for(row, tier.page)
    return tiers_.resize(tier, max(size, tier.free.shape[0]), max(width, tier.table.shape[-1]))
