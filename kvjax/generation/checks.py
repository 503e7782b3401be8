"""What may be asked of a model: every request is looked at here, before anything is allocated."""

import reprlib
from collections.abc import Collection, Sequence

from kvjax.attention import dispatch
from kvjax.cache.layout import layer_groups
from kvjax.cache.pages import LARGEST
from kvjax.errors import InputError, say_once
from kvjax.generation.sampling import FILTERS, Sampling
from kvjax.policies.base import Recipe
from kvjax.policies.budgets.budget import tokens_of
from kvjax.policies.layers import layer_recipe, rotates_at_read
from kvjax.spec import ModelSpec

GREEDY = Sampling()


def check_options(
    spec: ModelSpec,
    recipe: Recipe,
    *,
    new: int = 1,
    max_length: int | None = None,
    sampling: Sampling = GREEDY,
    logprobs: int | None = None,
) -> None:
    """Raise `InputError` for what cannot be asked, whatever the texts are: the arguments of `Model.generate`."""
    dispatch.check(recipe.kernels)
    if type(new) is not int or not 1 <= new <= LARGEST:
        raise InputError(f"max-new-tokens {new!r} is not a whole number from 1 to {LARGEST}")
    if max_length is not None and (type(max_length) is not int or not 2 <= max_length <= spec.max_position):
        raise InputError(
            f"max-length {max_length!r} is not a whole number from 2 to the context limit {spec.max_position}"
        )
    if max_length is not None and new > max_length:
        raise InputError(f"max-new-tokens ({new}) pass max-length ({max_length})")
    if not isinstance(sampling, Sampling):
        raise InputError(f"sampling {sampling!r} is not a kvjax.Sampling")
    try:
        sampling.check()
    except TypeError as error:
        raise InputError(f"{sampling!r} has a value of a wrong type: {error}") from None
    if any(token >= spec.vocab_size for token, _ in sampling.logit_bias):
        raise InputError(f"logit-bias has a token id that is not in the vocabulary (0 to {spec.vocab_size - 1})")
    if sampling.mode == "greedy" and (idle := sampling.changed(FILTERS)):
        say_once(f"{', '.join(idle)}: without effect, for at temperature {sampling.temperature:g} decoding is greedy")
    if logprobs is not None and (type(logprobs) is not int or not 0 <= logprobs <= spec.vocab_size):
        raise InputError(f"logprobs {logprobs!r} is not a whole number from 0 to the vocabulary's {spec.vocab_size}")


def check_list(name: str, given: object) -> None:
    """Raise `InputError` for what is not a list of texts."""
    if isinstance(given, str):
        raise InputError(f"{name} is one text: give a list of {name}")
    if isinstance(given, bytes) or not isinstance(given, Collection):
        raise InputError(f"{name} {reprlib.repr(given)} is not a list of texts")


def check_texts(
    spec: ModelSpec,
    recipe: Recipe,
    prompts: Sequence[Sequence[int]],
    after: Sequence[Sequence[int]],
    new: int = 0,
    max_length: int | None = None,
    unread: int = 0,
) -> None:
    """Raise `InputError` for texts that cannot be read.

    Args:
      spec, recipe: the model and the method.
      prompts: token ids, at least one of each prompt.
      after: of what is read after each through its cache.
      new: tokens that are generated then.
      max_length: most tokens of any sequence; None = as many as the model is made for.
      unread: of `after`, tokens at its end that are judged and not read.
    """
    if not prompts:
        raise InputError("there is no prompt")
    if len(after) != len(prompts):
        raise InputError(f"{len(after)} texts follow {len(prompts)} prompts: give one for each")
    for prompt, text in zip(prompts, after, strict=True):
        length = len(prompt) + len(text)
        if not prompt:
            raise InputError("the prompt is empty")
        for i in (*prompt, *text):
            if not 0 <= i < spec.vocab_size:
                raise InputError(f"token id {i} is not in the vocabulary (0 to {spec.vocab_size - 1})")
        if length > spec.max_position:
            raise InputError(f"the prompt has {length} tokens, the context limit is {spec.max_position}")
        if max_length is not None and length + new > max_length:
            raise InputError(
                f"prompt ({length} tokens) and max-new-tokens ({new}) pass max-length ({max_length}): give"
                f" at least {length + new}"
            )
        reach = length + new
        keep = recipe.amounts.decoding or recipe.amounts.keep
        if recipe.positions is not None and keep is not None:  # places in the cache, not positions
            reach = min(reach, int(tokens_of(keep, len(prompt))))
        if reach > spec.max_position:
            raise InputError(
                f"prompt ({length} tokens) and max-new-tokens ({new}) pass the context limit"
                f" ({spec.max_position}): ask for at most {spec.max_position - length} new tokens"
            )
        if recipe.replay is not None and len(prompt) + min(recipe.replay, len(prompt)) > spec.max_position:
            raise InputError(
                f"{recipe.name} reads the {len(prompt)} tokens of a prompt again behind its end, {recipe.replay} at a"
                f" time: that passes the context limit ({spec.max_position}); set a smaller chunk"
            )
        check_frequencies(spec, recipe, len(prompt), length - unread + max(new - 1, 0))


def check_frequencies(spec: ModelSpec, recipe: Recipe, prompt: int, reach: int) -> None:
    """Raise `InputError` where keys would be cached under frequencies that their sequence outgrows.

    Args:
      spec, recipe: the model and the method.
      prompt: tokens of a prompt.
      reach: tokens that are read of the sequence in the end.
    """
    turn = spec.rope.original_max_position
    if spec.rope.type != "longrope" or not prompt <= turn < reach:
        return
    if not all(rotates_at_read(spec, layer_recipe(spec, recipe, g.index[0])) for g in layer_groups(spec)):
        raise InputError(
            f"the model has other rotary frequencies beyond {turn} tokens, which cached keys of a prompt of {prompt} "
            f"cannot follow: end at {turn} tokens, not {reach}, or begin with a longer prompt"
        )
