"""A checkpoint as it is used: weights, tokenizer, the ids that end a text."""

import dataclasses
import functools
import operator
import reprlib
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from kvjax.checkpoint import shipped
from kvjax.checkpoint.load import load_model
from kvjax.errors import InputError
from kvjax.generation import sampling as choosing
from kvjax.generation.results import Footprint, Generation, Judgement
from kvjax.generation.sampling import Sampling
from kvjax.methods import resolve
from kvjax.models import small_files
from kvjax.models.decoder import Decoder
from kvjax.models.hf_config import Stop, read_generation_config
from kvjax.models.stack import stacked_where_fast
from kvjax.models.tokenizer import Tokenizer
from kvjax.parallel import mesh as meshes
from kvjax.policies.base import Recipe
from kvjax.policies.budgets.budget import Keep
from kvjax.spec import PREFILL_CHUNK, ModelSpec, ProfileSpec

if TYPE_CHECKING:
    from kvjax.generation.context import Context

Texts = Sequence[str] | Sequence[Sequence[int]]  # or token ids


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded checkpoint: weights, tokenizer (None where there is none), ids that end a text, and who names them.

    `sampling` is how its generation_config.json wants tokens of a chat to be chosen, and `sampling_source` that file,
    or the fields of a GGUF file. Commands do so in chats; in Python give it: `generate(..., sampling=model.sampling)`.
    """

    decoder: Decoder
    tokenizer: Tokenizer | None
    stop: tuple[int, ...]
    name: str
    stop_source: str = ""
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    sampling_source: str = ""

    def __repr__(self) -> str:
        spec = self.spec
        weights = "" if spec.weights is None else f", weights in {spec.weights}"
        return f"Model({self.name!r}, {spec.family}, {spec.num_layers} layers, {self.decoder.dtype.name}{weights})"

    @property
    def spec(self) -> ModelSpec:
        """Shape and mathematics of the decoder."""
        return self.decoder.spec

    @property
    def mesh(self) -> jax.sharding.Mesh | None:
        """The devices that the weights are split over; None = one device."""
        return meshes.of(self.decoder)

    def generate(
        self,
        prompts: Texts,
        method: str | Recipe | None = None,
        budget: Keep | None = None,
        *,
        questions: Texts | None = None,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        n: int = 1,
        on_token: Callable[[int, int], None] | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        max_length: int | None = None,
    ) -> Generation:
        """Generate a continuation of each prompt with a compressed cache.

        Args:
          prompts: texts, or token ids.
          method: a name, "snapkv" or with arguments "snapkv+window=16", or a recipe from `kvjax.methods`; None = the
            full cache, or what a retrofitted model was made for.
          budget: beside a name: slots per row, 512 or "20%" of the prompt; None = the method's default.
          questions: what follows each prompt, texts or token ids, "" = nothing; read token by token after the prompt
            has been compressed, so that the method cannot know what will be asked.
          max_new_tokens: most tokens to generate for each prompt.
          sampling: how tokens are chosen; None = greedy.
          stop: a text ends before the first of these strings. Tokens of a `Continuation` are all that were
            generated, the last of which has completed it. One that is a special token is a stop token.
          logprobs: of each generated token, and of so many of the most likely ones in its place: see
            `Continuation.logprobs`. They are the model's own, before a penalty, a temperature or a filter.
          n: samples of one prompt, which is read once: sequence `i` draws with `seed + i`. They are kept whole beside
            the prompt's cache, which they share, as in `Context.ask`.
          on_token: called as `(sequence, token)` as tokens appear.
          prefill_chunk: most tokens of a device's prompts that a layer reads at once, but for attention; fewer need
            less memory.
          max_length: most tokens of any sequence, new ones included. The cache then has the size that this needs,
            whatever the prompts have, and what was compiled for it once serves all prompts, new tokens and ways of
            sampling, and budgets near each other: see `warm_up`. None = a cache of the size that these prompts need.

        Raises:
          InputError: what is given cannot be used, in one line.

        >>> import kvjax
        >>> out = kvjax.load().generate([[1, 2, 3]], "h2o", 16, max_new_tokens=4)
        >>> len(out.sequences[0].tokens) <= 4
        True
        """
        from kvjax.generation.context import sample
        from kvjax.generation.generate import generate, run

        make = generate if n == 1 else functools.partial(sample, n=n)
        tokens = make(
            self,
            prompts,
            resolve(self.spec, method, budget),
            questions=questions,
            max_new_tokens=max_new_tokens,
            sampling=sampling or Sampling(),
            stop=stop,
            logprobs=logprobs,
            prefill_chunk=prefill_chunk,
            max_length=max_length,
        )
        return run(tokens, on_token)

    def stream(
        self,
        prompt: str | Sequence[int],
        method: str | Recipe | None = None,
        budget: Keep | None = None,
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        prefill_chunk: int = PREFILL_CHUNK,
        max_length: int | None = None,
    ) -> Generator[str, None, Generation]:
        """The text that `generate` makes, in pieces as they appear; they join to it exactly.

        A piece is held back while it may be half a character or the beginning of a stop string. The generator returns
        what `generate` does, and raises as it does, with the first piece. Without a tokenizer pieces are ids.

        Args:
          prompt: a text or token ids.
          method, budget, max_new_tokens, sampling, stop, prefill_chunk, max_length: as in `generate`.

        >>> import kvjax
        >>> model = kvjax.load()
        >>> text = "".join(model.stream("some words", "h2o", 16, max_new_tokens=4))
        >>> text == model.generate(["some words"], "h2o", 16, max_new_tokens=4).sequences[0].text
        True
        """
        from kvjax.generation.generate import generate, pieces

        tokens = generate(
            self,
            [prompt],  # pyright: ignore[reportArgumentType]
            resolve(self.spec, method, budget),
            questions=None,
            max_new_tokens=max_new_tokens,
            sampling=sampling or Sampling(),
            stop=stop,
            logprobs=None,
            prefill_chunk=prefill_chunk,
            max_length=max_length,
        )
        return pieces(self, tokens, stop)

    def read(
        self,
        prompt: str | Sequence[int],
        method: str | Recipe | None = None,
        budget: Keep | None = None,
        *,
        prefill_chunk: int = PREFILL_CHUNK,
        max_length: int | None = None,
        chat: bool = False,
    ) -> "Context":
        """Read a text once, to ask it often: a `Context`, whose cache outlives the call.

        Args:
          prompt: a text or token ids.
          method, budget, prefill_chunk: as in `generate`. The method does not see the questions.
          max_length: most tokens that the text may grow to with `extend` and `generate`, which then compile nothing
            anew. None = the cache has the size of the text, and is made larger when it grows.
          chat: the text is the beginning of what a user says to a chat model; questions are its end.

        Raises:
          InputError: what is given cannot be used, in one line.

        >>> import kvjax
        >>> context = kvjax.load().read(list(range(1, 101)), "h2o", "20%")
        >>> len(context.tokens), context.kept[0]
        (100, 20)
        """
        from kvjax.generation.context import read

        return read(self, prompt, method, budget, prefill_chunk, max_length, chat)

    def load_context(self, path: str | Path) -> "Context":
        """Read a file that `Context.save` has written.

        Raises:
          InputError: the context is damaged, or was made by another model: it is never read anew in silence.
        """
        from kvjax.generation.context_file import load

        return load(self, Path(path))[0]

    def warm_up(
        self,
        method: str | Recipe | None = None,
        budget: Keep | None = None,
        *,
        max_length: int,
        max_new_tokens: int = 64,
        batch: int = 1,
        questions: bool = False,
    ) -> float:
        """Compile what `generate` runs with this `max_length`, so that it compiles nothing later on.

        Args:
          method, budget, max_length: as in `generate`. Budgets whose caches have the same size share their programs:
            sizes have four steps for each factor of two.
          max_new_tokens: up to 256 more are the same; see `kvjax.spec.NEW_TOKENS`.
          batch: prompts at a time.
          questions: what reads questions, too.

        Returns:
          Seconds that were spent on compiling.

        >>> import kvjax
        >>> kvjax.load().warm_up("snapkv", "20%", max_length=256) > 0
        True
        """
        from kvjax.generation.generate import warm_up

        recipe = resolve(self.spec, method, budget)
        return warm_up(self, recipe, max_length, max_new_tokens, batch, questions)

    def log_likelihood(
        self,
        prompts: Texts,
        continuations: Texts,
        method: str | Recipe | None = None,
        budget: Keep | None = None,
    ) -> tuple[list[Judgement], Footprint]:
        """Log-probability of each token of a continuation, and what reading it cost.

        Args:
          prompts: texts, or token ids.
          continuations: one for each prompt; at least one token.
          method, budget: as in `generate`.

        >>> import kvjax
        >>> judged, _ = kvjax.load().log_likelihood([[1, 2, 3]], [[4, 5]])
        >>> judged[0].logprobs.shape
        (2,)
        """
        from kvjax.generation.scoring import log_likelihood

        return log_likelihood(self, prompts, continuations, resolve(self.spec, method, budget))

    def references(self, prompts: Texts, continuations: Texts) -> np.ndarray:
        """The last layer's outputs for a continuation's tokens with the full cache, `[Q B D]`: for `divergence`."""
        from kvjax.generation.scoring import references

        return references(self, prompts, continuations)

    def divergence(
        self,
        prompts: Texts,
        continuations: Texts,
        method: str | Recipe | None = None,
        budget: Keep | None = None,
        *,
        reference: np.ndarray | None = None,
        source: "Model | None" = None,
    ) -> tuple[list[np.ndarray], Footprint]:
        """KL divergence of the next-token distribution from the full cache's, after each token of a continuation.

        Args:
          prompts, continuations, method, budget: as in `log_likelihood`.
          reference: the source's `references` for the same texts; None = they are computed.
          source: the model whose full cache is compared with, such as this one's before its weights were in few bits;
            None = this one.

        Returns:
          Per continuation `sum_v p(v) log(p(v) / q(v))` [nats], p with the reference and q with the method's, `[q]`;
          and what reading it cost.
        """
        from kvjax.generation.scoring import divergence, references

        source = self if source is None else source
        reference = references(source, prompts, continuations) if reference is None else reference
        recipe = resolve(self.spec, method, budget)
        return divergence(self, prompts, continuations, recipe, reference, source.decoder)

    def calibrate(self, method: str | None = None, texts: Sequence[Sequence[int]] | None = None) -> ProfileSpec:
        """How this model's layers and heads share a budget, for methods with `split="profile"`.

        Args:
          method: what compares tokens of all layers and heads, by name; None = `kvjax.policies.budgets.profile.METHOD`.
          texts: token ids; None = prose that comes with the library.

        Returns:
          The mean shares of these texts; `kvjax.policies.budgets.profile.write` puts them into a file.

        Cost: reads each text once for each of five budgets.
        """
        from kvjax.generation.calibrate import calibrate

        return calibrate(self, method, texts)


def load(
    name: str | Path | None = None,
    *,
    dtype: DTypeLike | None = None,
    ignore_config: Sequence[str] = (),
    mesh: str | None = None,
    weights: str | None = None,
) -> Model:
    """Load a checkpoint.

    Args:
      name: a Hugging Face directory, a GGUF file, an Orbax directory made by `kvjax.convert`, a hub id (`org/name`, or
        `org/name/FILE.gguf`), or a shipped checkpoint: `demo` (None as well) or `demo-dmc`.
      dtype: of weights, activations and cache; None = float32 on CPU, bfloat16 elsewhere.
      ignore_config: config fields that may be ignored although kvjax does not know them.
      mesh: "data=2,model=4" takes 2 times 4 devices: sequences are split over 2, weights and key/value heads over 4.
        What is computed with the model runs on them. None = one device.
      weights: "int8" or "int4" keeps matrices in few bits, in groups of 32 inputs, encoded one after the other as they
        are read; products are computed in `dtype`. None = as they are stored.

    >>> import kvjax
    >>> model = kvjax.load()
    >>> model.spec.num_kv_heads
    2
    """
    return load_from(name, dtype=dtype, ignore_config=ignore_config, mesh=mesh, weights=weights)[0]


def load_from(
    name: str | Path | None,
    *,
    dtype: DTypeLike | None = None,
    ignore_config: Sequence[str] = (),
    mesh: str | None = None,
    weights: str | None = None,
) -> tuple[Model, Path]:
    """Like `load`, and the directory that the checkpoint's files are in, or its GGUF file."""
    size = None if mesh is None else meshes.parse(mesh)
    decoder, directory = load_model(str(shipped.find(name)), dtype, ignore_config, size, weights)
    label = "demo" if name is None else str(name)
    tokenizer = Tokenizer.load(directory)
    stop = find_stop(directory, decoder.spec.vocab_size, tokenizer)
    name = "generation_config.json"
    sampling = choosing.of_config(small_files.read_json(directory, name) or {}, directory / name)
    source = small_files.source(directory, name, "temperature")
    decoder = stacked_where_fast(decoder)
    return Model(decoder, tokenizer, stop.ids, label, stop.source, sampling, source), directory


def find_stop(directory: Path, vocab_size: int, tokenizer: Tokenizer | None) -> Stop:
    """The ids that end a text: of generation_config.json, else of config.json, else of tokenizer_config.json."""
    stop = read_generation_config(directory, vocab_size)
    end = None if tokenizer is None else tokenizer.end
    if stop.ids or end is None:
        return stop
    if end >= vocab_size:
        raise InputError(
            f"{directory / 'tokenizer_config.json'}: eos_token has the id {end}, which is not in the vocabulary of the "
            f"model (0 to {vocab_size - 1}), and no other file names the end of a text: set eos_token_id in config.json"
        )
    return Stop((end,), "tokenizer_config.json")


def encode_prompt(model: Model, prompt: str | Sequence[int]) -> list[int]:
    """Token ids of a prompt, with what the tokenizer puts around a text."""
    if not isinstance(prompt, str):
        try:
            if isinstance(prompt, bytes):  # its numbers are no tokens
                raise TypeError
            return [operator.index(i) for i in prompt]
        except TypeError:
            raise InputError(f"prompt {reprlib.repr(prompt)} is not a text or a list of token ids") from None
    if model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer.json: give token ids instead (--prompt-tokens 1,2,3)")
    if not prompt:
        raise InputError("the prompt is empty")
    return model.tokenizer.encode(prompt)


def encode_text(model: Model, text: str, chat: bool) -> list[int]:
    """Token ids of a prompt, in the chat template if asked for."""
    if chat and model.tokenizer is not None:
        return model.tokenizer.chat([{"role": "user", "content": text}])
    return encode_prompt(model, text)


def encode_continuation(model: Model, text: str | Sequence[int]) -> list[int]:
    """Token ids of what follows a prompt."""
    if isinstance(text, str) and not text:
        return []
    if isinstance(text, str) and model.tokenizer is not None:
        return model.tokenizer.encode(text, special=False)
    return encode_prompt(model, text)


def not_finite(model: Model, i: int) -> InputError:
    """What is said of a sequence that no token can be chosen for."""
    return InputError(
        f"{model.name}: the logits of sequence {i + 1} are not finite: its weights are damaged, or too large for"
        f" {jnp.dtype(model.decoder.dtype).name}"
    )
