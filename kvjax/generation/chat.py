"""A conversation on one context that grows: a turn reads what is new of it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvjax.errors import InputError
from kvjax.generation import context_file
from kvjax.generation.context import Context, OnToken
from kvjax.generation.generate import Pieces, Tokens, check_recipe, pieces, run
from kvjax.generation.model import Model
from kvjax.generation.results import Generation
from kvjax.generation.sampling import Sampling
from kvjax.methods import resolve
from kvjax.models.tokenizer import Tokenizer
from kvjax.policies.base import Recipe
from kvjax.policies.budgets.budget import Keep


@dataclasses.dataclass(frozen=True, eq=False)
class Chat:
    """A conversation with a chat model; a value, as its context is: every turn makes another one.

    Attributes:
      model: with a tokenizer and a chat template.
      method, budget: as in `Model.generate`; budgets are of what the first turn reads.
      max_length: most tokens of the conversation. The cache has this size from the first turn on, so that later ones
        compile nothing.
      messages: each with `role` and `content`; a system's message may stand there from the start.
      context: what has been read; None before the first turn.
      text: that is in it, as the chat template has shown it.
      read: tokens that the last turn has read: what was new, or everything where the template shows earlier turns
        otherwise than they were.

    >>> import kvjax
    >>> Chat(kvjax.load(), max_length=64).say("hello")
    Traceback (most recent call last):
    kvjax.errors.InputError: this checkpoint has no chat template; give a plain prompt instead
    """

    model: Model
    method: str | Recipe | None = None
    budget: Keep | None = None
    _: dataclasses.KW_ONLY
    max_length: int
    messages: tuple[dict[str, Any], ...] = ()
    context: Context | None = None
    text: str = ""
    read: int = 0

    def using(self, method: str | Recipe | None, budget: Keep | None = None) -> "Chat":
        """The conversation with another method, which reads the tokens that have been read so far, at once."""
        context = self.context and self.model.read(self.context.tokens, method, budget, max_length=self.max_length)
        resolve(self.model.spec, method, budget)
        return dataclasses.replace(self, method=method, budget=budget, context=context)

    def save(self, path: str | Path) -> None:
        """Write the conversation and its context to a file, for `load`; `Model.load_context` reads the context alone.

        Raises:
          InputError: nothing has been said yet, or the file cannot be written; then it is as it was before.
        """
        if self.context is None:
            raise InputError("nothing has been said yet: there is no context to save")
        said = {"messages": self.messages, "text": self.text, "max_length": self.max_length}
        context_file.save(self.context, Path(path), said)

    @classmethod
    def load(cls, model: Model, path: str | Path) -> "Chat":
        """Read a file that `save` has written; the conversation goes on as it would have.

        Raises:
          InputError: it is no conversation, or damaged, or another model's.
        """
        context, said = context_file.load(model, Path(path))
        match said:
            case {"messages": [*messages], "text": str(text), "max_length": int(length)} if context.named is not None:
                return cls(model, *context.named, max_length=length, messages=(*messages,), context=context, text=text)
        raise InputError(f"{path}: is a context without a conversation: ask it, with kvjax.generate --context")

    def say(
        self,
        words: str,
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        on_token: OnToken | None = None,
    ) -> tuple[Generation, "Chat"]:
        """The answer to a user's words, and the conversation with both.

        Args:
          words: what the user says.
          max_new_tokens: fewer where `max_length` leaves fewer.
          sampling, stop, on_token: as in `Model.generate`.

        Raises:
          InputError: there is no chat template, or no room for an answer.
        """
        return run(self._say(words, max_new_tokens, sampling, stop), on_token)

    def stream(
        self,
        words: str,
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> Pieces[tuple[Generation, "Chat"]]:
        """The answer of `say` in pieces as they appear; see `Model.stream`. The generator returns what `say` does."""
        return pieces(self.model, self._say(words, max_new_tokens, sampling, stop), stop)

    def check(self) -> None:
        """Raise `InputError` where not even one word could be answered."""
        check_recipe(self.model, resolve(self.model.spec, self.method, self.budget))
        self._next("x")

    def _say(
        self, words: str, max_new_tokens: int, sampling: Sampling | None, stop: Sequence[str]
    ) -> Tokens[tuple[Generation, "Chat"]]:
        messages, text, ids, begun = self._next(words)
        left = self.max_length - len(ids)
        if begun is None:
            context = self.model.read(ids, self.method, self.budget, max_length=self.max_length)
        else:
            context, left = begun.extend(ids), left - len(begun.tokens)
        out, after = yield from context.generated(min(max_new_tokens, left), sampling, stop)
        answer = out.sequences[0].text or ""
        if out.sequences[0].finish_reason == "stop" and after.tokens[-1] not in self.model.stop:
            after = context.extend(answer)  # without the stop string, which later turns do not show
        messages = (*messages, {"role": "assistant", "content": answer})
        return out, dataclasses.replace(self, messages=messages, context=after, text=text + answer, read=len(ids))

    def _next(self, words: str) -> tuple[tuple[dict[str, Any], ...], str, list[int], Context | None]:
        """The messages with a user's words, their text, and its tokens behind a context; None = from the beginning."""
        tokenizer = self.model.tokenizer
        if tokenizer is None:
            raise InputError(f"{self.model.name} has no tokenizer: a conversation needs one, and a chat template")
        messages = (*self.messages, {"role": "user", "content": words})
        text = tokenizer.render(messages)
        rest = self._rest(tokenizer, text)
        ids, context = (tokenizer.encode(text, special=False), None) if rest is None else (rest, self.context)
        total = len(ids) + (0 if context is None else len(context.tokens))
        if total >= self.max_length:
            raise InputError(
                f"the conversation has {total} tokens, max-length is {self.max_length}: give more, or begin another one"
            )
        return messages, text, ids, context

    def _rest(self, tokenizer: Tokenizer, text: str) -> list[int] | None:
        """The tokens of a conversation that the context has not read yet; None if it has read others."""
        if self.context is None or not text.startswith(self.text.rstrip()):  # templates strip what was said
            return None
        rest = text[len(self.text) if text.startswith(self.text) else len(self.text.rstrip()) :]
        ids = tokenizer.encode(rest, special=False)
        ended = self.context.tokens[-1] in self.model.stop and ids[:1] == [self.context.tokens[-1]]
        return ids[1:] if ended else ids
