"""What clients ask for: JSON bodies of OpenAI's completions and chats, checked field by field."""

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kvjax.engine.programs import TOP
from kvjax.errors import InputError
from kvjax.files.text import parse_json
from kvjax.generation.sampling import BIASES, Sampling
from kvjax.policies.budgets.budget import Keep, parse_keep

STOPS, STOP_LENGTH = 4, 256  # strings, and characters of each
ROLES = ("system", "developer", "user", "assistant")  # of those who speak in a chat
NEW_TOKENS = 16  # of a completion that does not say how many it wants, as OpenAI has it
# Fields that would change the answer, and what is as good as leaving them out.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "web_search_options": (),
    "min_tokens": (0,),
}
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


class Refused(Exception):
    """A request that is answered by an error, in OpenAI's shape.

    Args:
      status: of HTTP.
      message: one line.
      param: the field that is wrong.
      code: for programs.
      headers: beside the answer's.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.body = {
            "error": {"message": message, "type": TYPES.get(status, "server_error"), "param": param, "code": code}
        }


class Asked(NamedTuple):
    """What a client wants.

    Attributes:
      prompts: texts or token ids; of a chat none.
      messages: of a chat, each with `role` and `content`.
      max_new_tokens: of each choice; None = what the server has for those who do not say.
      usage: whether a stream tells what it has cost.
      logprobs: how many of the most likely tokens are told of each place; None = nothing.
      budget: of each prompt; None = the server's.
      context: name of what they continue; None = nothing.
    """

    prompts: list[str | list[int]]
    messages: list[dict[str, str]]
    max_new_tokens: int | None
    sampling: Sampling
    n: int
    stop: list[str]
    ignore_eos: bool
    stream: bool
    usage: bool
    logprobs: int | None
    budget: Keep | None = None
    context: str | None = None


class AskedContext(NamedTuple):
    """A text that a client wants to have read.

    Attributes:
      input: a text or token ids; of a conversation "".
      messages: of a conversation.
      budget: None = the server's.
    """

    input: str | list[int]
    messages: list[dict[str, str]]
    budget: Keep | None


def parse(data: bytes) -> dict[str, Any]:
    """A body as an object; fields that are null count as left out."""
    try:
        body = parse_json(data, "the body")
    except InputError as error:
        raise Refused(400, str(error)) from None
    if not isinstance(body, dict):
        raise Refused(400, "the body is not a JSON object")
    return {name: value for name, value in body.items() if value is not None}


def completion(body: dict[str, Any], most: int) -> Asked:
    """A body of /v1/completions; `most` prompts may be in it."""
    asked = _shared(body)
    prompt = body.get("prompt")
    prompts = [prompt] if _is_text(prompt) else prompt
    if not isinstance(prompts, list) or not prompts or not all(map(_is_text, prompts)):
        raise Refused(400, "prompt is not a text, a list of token ids, or a list of these", "prompt")
    if len(prompts) > most:
        raise Refused(400, f"{len(prompts)} prompts: at most {most} are read at a time", "prompt")
    new = _whole(body, "max_tokens", NEW_TOKENS, least=1)
    ranks = _whole(body, "logprobs", None, least=0, most=TOP)
    return asked._replace(prompts=prompts, max_new_tokens=new, logprobs=ranks)


def chat(body: dict[str, Any]) -> Asked:
    """A body of /v1/chat/completions."""
    asked = _shared(body)
    messages = _messages(body)
    new = _whole(body, "max_completion_tokens", _whole(body, "max_tokens", None, least=1), least=1)
    top = _whole(body, "top_logprobs", 0, least=0, most=TOP)
    ranks = top if _flag(body, "logprobs") else None
    if top and ranks is None:
        raise Refused(400, "top_logprobs is for logprobs: say logprobs, or leave it out", "top_logprobs")
    return asked._replace(messages=messages, max_new_tokens=new, logprobs=ranks)


def context(body: dict[str, Any]) -> AskedContext:
    """A body of /v1/contexts."""
    if ("input" in body) == ("messages" in body):
        raise Refused(400, "a context is made of input or of messages: say one of them", "input")
    if "messages" in body:
        return AskedContext("", _messages(body), _budget(body))
    if not _is_text(body["input"]):
        raise Refused(400, "input is not a text or a list of token ids", "input")
    return AskedContext(body["input"], [], _budget(body))


def _is_text(value: Any) -> bool:
    """A text, or token ids."""
    ids = isinstance(value, list) and bool(value) and all(type(i) is int for i in value)
    return isinstance(value, str) or ids


def _messages(body: dict[str, Any]) -> list[dict[str, str]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages is not a list of one message or more", "messages")
    return [_message(i, each) for i, each in enumerate(messages)]


def _budget(body: dict[str, Any]) -> Keep | None:
    if (given := body.get("budget")) is None:
        return None
    try:
        return parse_keep(given)
    except InputError as error:
        raise Refused(400, str(error), "budget") from None


def _shared(body: dict[str, Any]) -> Asked:
    """The fields that both kinds have."""
    for name, harmless in UNSUPPORTED.items():
        if name in body and not any(type(body[name]) is type(each) and body[name] == each for each in harmless):
            raise Refused(400, f"{name} is not supported by this server: leave it out", name, "unsupported_parameter")
    stream, options = _flag(body, "stream"), body.get("stream_options", {})
    if not isinstance(options, dict):
        raise Refused(400, "stream_options is not an object", "stream_options")
    if options and not stream:
        raise Refused(400, "stream_options is for streams: say stream, or leave it out", "stream_options")
    usage = _flag({name: on for name, on in options.items() if on is not None}, "include_usage")
    n, endless = _whole(body, "n", 1, least=1), _flag(body, "ignore_eos")
    if not isinstance(name := body.get("context", ""), str):
        raise Refused(400, "context is not the id of a context", "context")
    return Asked(
        [], [], None, _sampling(body), n, _stop(body), endless, stream, usage, None, _budget(body), name or None
    )  # fmt: skip


def _sampling(body: dict[str, Any]) -> Sampling:
    """How tokens are chosen; without a seed every request draws anew."""
    found = Sampling(
        temperature=_number(body, "temperature", 1.0, 0, 2),
        top_k=max(_whole(body, "top_k", 0, least=-1), 0),
        top_p=_number(body, "top_p", 1.0, 0, 1) or 1e-9,  # 0 leaves the most likely token
        min_p=_number(body, "min_p", 0.0, 0, 1),
        repetition_penalty=_number(body, "repetition_penalty", 1.0, 1e-6, 1e6),
        seed=_whole(body, "seed", secrets.randbits(31), least=-(2**63), most=2**63 - 1),
        presence_penalty=_number(body, "presence_penalty", 0.0, -2, 2),
        frequency_penalty=_number(body, "frequency_penalty", 0.0, -2, 2),
        logit_bias=_biases(body),
    )
    # Filters have nothing to act on there, which is said to whoever starts a program, and not of each request.
    return found._replace(top_k=0, top_p=1.0, min_p=0.0) if found.mode == "greedy" else found


def _biases(body: dict[str, Any]) -> tuple[tuple[int, float], ...]:
    given = body.get("logit_bias", {})
    if not isinstance(given, dict) or len(given) > BIASES or not all(re.fullmatch("[0-9]{1,9}", i) for i in given):
        raise Refused(400, f"logit_bias is not an object of at most {BIASES} token ids", "logit_bias")
    biases = {name: _number({"logit_bias": bias}, "logit_bias", 0.0, -100, 100) for name, bias in given.items()}
    return tuple((int(name), bias) for name, bias in biases.items())


def _stop(body: dict[str, Any]) -> list[str]:
    stop = body.get("stop", [])
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, list) or not all(isinstance(each, str) and each for each in strings):
        raise Refused(400, "stop is not a text, or a list of texts", "stop")
    if len(strings) > STOPS or any(len(each) > STOP_LENGTH for each in strings):
        raise Refused(400, f"stop has more than {STOPS} texts, or one of more than {STOP_LENGTH} characters", "stop")
    return strings


def _message(i: int, message: Any) -> dict[str, str]:
    """A message with its text parts joined."""
    where = f"messages[{i}]"
    if not isinstance(message, dict) or not isinstance(role := message.get("role"), str):
        raise Refused(400, f"{where} is not an object with role and content", where)
    if role not in ROLES:
        raise Refused(400, f"{where}.role is not one of {', '.join(ROLES)}", where)
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            raise Refused(400, f"{where}.{name} is not supported by this server", where, "unsupported_parameter")
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        texts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(text, str) for text in texts):
            raise Refused(400, f"{where}.content has parts that are not text", where, "unsupported_parameter")
        content = "\n".join(map(str, texts))
    if not isinstance(content, str):
        raise Refused(400, f"{where}.content is not a text, or a list of text parts", where)
    return {"role": "system" if role == "developer" else role, "content": content}


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise Refused(400, f"{name} is not true or false", name)
    return value


def _whole(body: dict[str, Any], name: str, default: Any, least: int, most: int = 2**31 - 1) -> Any:
    """A whole number in bounds, or the default where the field is left out."""
    value = body.get(name, default)
    if value is not default and (type(value) is not int or not least <= value <= most):
        raise Refused(400, f"{name} is not a whole number from {least} to {most}", name)
    return value


def _number(body: dict[str, Any], name: str, default: float, least: float, most: float) -> float:
    value = body.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise Refused(400, f"{name} is not a number from {least:g} to {most:g}", name)
    return float(value)
