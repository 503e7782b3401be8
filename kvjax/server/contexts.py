"""Contexts that clients have had read, by the names that they were told."""

import secrets
import time
from typing import Any, NamedTuple

from kvjax.engine.engine import Engine
from kvjax.engine.request import ContextsFull, Kept
from kvjax.generation.accounting import full_bytes
from kvjax.models.tokenizer import Tokenizer
from kvjax.server.bodies import AskedContext, Refused


class Stored(NamedTuple):
    """A context and whose it is.

    Attributes:
      id: that nobody guesses.
      kept: the engine's.
      owner: the key of who has made it; only who shows the same may use it.
      created: Unix time.
      begin: the conversation that was read, in the chat template; None = a text.
    """

    id: str
    kept: Kept
    owner: str
    created: int
    begin: str | None


class Contexts:
    """What a server has read for its clients.

    Args:
      engine: that keeps them.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._stored: dict[str, Stored] = {}

    def read(self, asked: AskedContext, tokenizer: Tokenizer, owner: str) -> Stored:
        """Begin to read a text; nobody finds it before `add`."""
        begin = begin_of(asked.messages, tokenizer) if asked.messages else None
        try:
            given = asked.input if begin is None else tokenizer.encode(begin, special=False)
            kept = self._engine.read(given, asked.budget)
        except ContextsFull as error:
            raise Refused(429, str(error), None, "contexts_full", {"x-should-retry": "false"}) from None
        return Stored(f"ctx_{secrets.token_hex(16)}", kept, owner, int(time.time()), begin)

    def add(self, stored: Stored) -> None:
        """From now on clients find it."""
        self._stored[stored.id] = stored

    def of(self, owner: str) -> list[Stored]:
        """All of one client, from the oldest on."""
        return [stored for stored in list(self._stored.values()) if stored.owner == owner]

    def find(self, name: str, owner: str) -> Stored:
        """One of a client; raises `Refused` for what is not there, or another's."""
        stored = self._stored.get(name)
        if stored is None or stored.owner != owner:
            raise Refused(
                404, "there is no such context: it was deleted, or never made", "context", "context_not_found"
            )
        return stored

    def forget(self, stored: Stored) -> None:
        """No more requests for it; those that there are end first."""
        self._stored.pop(stored.id, None)
        self._engine.forget(stored.kept)

    def about(self, stored: Stored, model: str) -> dict[str, Any]:
        """What a client is told of one."""
        tokens = len(stored.kept.tokens)
        return {
            "id": stored.id, "object": "context", "created": stored.created, "model": model, "tokens": tokens,
            "bytes": stored.kept.bytes, "full_bytes": full_bytes(self._engine.model, [tokens]),
        }  # fmt: skip


def begin_of(messages: list[dict[str, str]], tokenizer: Tokenizer) -> str:
    """What all conversations that begin with these messages have in common; the last one may go on."""
    *before, last = messages
    if last["role"] == "user":
        return tokenizer.around(last["content"], before)[0]
    return tokenizer.around("", messages)[0]


def rest_of(messages: list[dict[str, str]], stored: Stored, tokenizer: Tokenizer) -> str:
    """What a whole conversation has behind the context that it begins with."""
    if stored.begin is None:
        why = "the context is a text and no conversation: make one of messages, or ask for a completion"
        raise Refused(400, why, "context", "context_mismatch")
    whole = tokenizer.render(messages)
    if not whole.startswith(stored.begin):
        at = next((i for i, (a, b) in enumerate(zip(whole, stored.begin, strict=False)) if a != b), len(whole))
        why = f"the messages do not begin as the context does: they differ from character {at} of the chat template on"
        raise Refused(400, why, "messages", "context_mismatch")
    return whole[len(stored.begin) :]
