"""What clients are answered: OpenAI's objects, whole or in pieces."""

import bisect
import json
import secrets
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from kvjax.engine.request import Choice, Request
from kvjax.models.tokenizer import Tokenizer

LEAST = -9999.0  # logarithm of a probability


class Answer(NamedTuple):
    """An answer under way: of a chat, or to one or several prompts."""

    id: str
    created: int
    model: str
    chat: bool
    usage: bool  # a stream tells it at its end
    requests: list[Request]
    tokenizer: Tokenizer

    @property
    def choices(self) -> list[Choice]:
        """Prompt after prompt."""
        return [choice for request in self.requests for choice in request.choices]

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts, with the contexts that they continue; each is read once for all its choices."""
        return sum(len(request.whole) for request in self.requests)

    @property
    def cached_tokens(self) -> int:
        """Of these, those of contexts."""
        return sum(len(request.context.tokens) for request in self.requests if request.context)

    @property
    def new_tokens(self) -> int:
        """Of all choices so far, tokens that ended them included."""
        return sum(len(choice.tokens) for choice in self.choices)

    def ranked(self, choice: Choice, shown: int, reason: str | None) -> int:
        """Tokens that begin in the first `shown` characters of a choice's text; in the end all but what ended it."""
        stops = self.requests[0].stops
        if reason is None or (reason == "stop" and choice.tokens[-1] not in stops.ids):
            return bisect.bisect_left(choice.begins, shown)
        return len(choice.begins) - (reason == "stop")

    def cancel(self) -> None:
        """Ask for no more."""
        for request in self.requests:
            request.cancel()

    def check(self) -> None:
        """Raise what has ended a request before its time."""
        for request in self.requests:
            request.check()


def begin(model: str, chat: bool, usage: bool, requests: list[Request], tokenizer: Tokenizer) -> Answer:
    """An answer with an id of its own."""
    return Answer(
        f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
        int(time.time()),
        model,
        chat,
        usage,
        requests,
        tokenizer,
    )


def whole(answer: Answer) -> dict[str, Any]:
    """The answer once it is done."""
    choices = []
    for i, choice in enumerate(answer.choices):
        said = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        text = said if answer.chat else {"text": choice.text}
        ranks = _logprobs(answer, i, (0, answer.ranked(choice, len(choice.text), choice.finish_reason)))
        choices.append({"index": i, **text, "logprobs": ranks, "finish_reason": choice.finish_reason})
    return _object(answer, "chat.completion" if answer.chat else "text_completion", choices) | {"usage": _usage(answer)}


def first(answer: Answer) -> Iterator[bytes]:
    """The events that begin a stream."""
    if answer.chat:
        for i in range(len(answer.choices)):
            yield _piece(answer, i, {"delta": {"role": "assistant", "content": ""}}, None, (0, 0))


def piece(answer: Answer, index: int, text: str, ranks: tuple[int, int]) -> bytes:
    """An event with more of a choice's text, and of what is said of its tokens."""
    return _piece(answer, index, {"delta": {"content": text}} if answer.chat else {"text": text}, None, ranks)


def end(answer: Answer, index: int, reason: str, ranks: tuple[int, int]) -> bytes:
    """The event that ends a choice."""
    return _piece(answer, index, {"delta": {}} if answer.chat else {"text": ""}, reason, ranks)


def last(answer: Answer) -> bytes:
    """The events that end a stream."""
    usage = _object(answer, _kind(answer), []) | {"usage": _usage(answer)}
    return (event(usage) if answer.usage else b"") + b"data: [DONE]\n\n"


def event(content: dict[str, Any]) -> bytes:
    """An object as a server-sent event."""
    return b"data: " + to_json(content) + b"\n\n"


def to_json(content: object) -> bytes:
    """In UTF-8; halves of surrogate pairs, which a client's text may have, stay escaped."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


def _logprobs(answer: Answer, index: int, span: tuple[int, int]) -> dict[str, Any] | None:
    """What is said of some of a choice's tokens, in the shape of chats or of completions; None = not wanted."""
    choice, most, (begin, end) = answer.choices[index], answer.requests[0].logprobs, span
    if most is None or end <= begin:
        return None
    ranks = choice.ranks[begin:end]
    texts = [answer.tokenizer.piece(token) for token in choice.tokens[begin:end]]
    likely = [[*zip(map(answer.tokenizer.piece, r.ids[:most]), map(_finite, r.top), strict=False)] for r in ranks]
    if not answer.chat:
        own = [{text: _finite(rank.logprob)} for text, rank in zip(texts, ranks, strict=True)]
        return {
            "tokens": texts,
            "token_logprobs": [_finite(rank.logprob) for rank in ranks],
            "top_logprobs": [dict(reversed(top)) | one for top, one in zip(likely, own, strict=True)] if most else None,
            "text_offset": choice.begins[begin:end],
        }
    said = lambda text, logprob: {"token": text, "logprob": logprob, "bytes": _bytes(text)}
    content = [
        said(text, _finite(rank.logprob)) | {"top_logprobs": [said(*each) for each in top]}
        for text, rank, top in zip(texts, ranks, likely, strict=True)
    ]
    return {"content": content, "refusal": None}


def _finite(logprob: float) -> float:
    """JSON has no infinity."""
    return max(logprob, LEAST)


def _bytes(text: str) -> list[int] | None:
    """In UTF-8; of parts of a character nothing is known."""
    return None if "\ufffd" in text else list(text.encode("utf-8", "replace"))


def _piece(answer: Answer, index: int, what: dict[str, Any], reason: str | None, ranks: tuple[int, int]) -> bytes:
    choice = {"index": index, **what, "logprobs": _logprobs(answer, index, ranks), "finish_reason": reason}
    return event(_object(answer, _kind(answer), [choice]) | ({"usage": None} if answer.usage else {}))


def _kind(answer: Answer) -> str:
    return "chat.completion.chunk" if answer.chat else "text_completion"


def _object(answer: Answer, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": answer.id, "object": kind, "created": answer.created, "model": answer.model, "choices": choices}


def _usage(answer: Answer) -> dict[str, Any]:
    prompt, new = answer.prompt_tokens, answer.new_tokens
    cached = {"cached_tokens": answer.cached_tokens}
    return {
        "prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new, "prompt_tokens_details": cached
    }  # fmt: skip
