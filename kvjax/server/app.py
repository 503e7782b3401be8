"""Routes: OpenAI's completions and chats, and what the server says of itself."""

import asyncio
import contextlib
import dataclasses
import functools
import hmac
import ipaddress
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as Http
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from kvjax.engine.engine import Engine
from kvjax.engine.request import EngineError, QueueFull, Request
from kvjax.errors import InputError, one_line
from kvjax.generation.accounting import full_bytes
from kvjax.models.tokenizer import Tokenizer
from kvjax.server import answers, bodies
from kvjax.server.answers import Answer
from kvjax.server.bodies import Asked, Refused
from kvjax.server.contexts import Contexts, Stored, rest_of
from kvjax.server.metrics import Metrics

HEARTBEAT = 10.0  # seconds of silence until a stream says that it is there: proxies cut silent ones
BODY_SECONDS = 30.0  # that a client may take to send what it wants
GONE = 499  # nobody reads the answer
EVENTS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


@dataclasses.dataclass
class Service:
    """An engine, and on what terms it serves.

    Attributes:
      name: of the model.
      method: of the cache, as it was asked for.
      keys: one of which a client must show; none = everybody may ask.
      origins: of web pages that may ask, "*" = all.
      local: only clients of this machine are meant: what a web page of another name sends is refused.
      max_body: bytes.
      watchdog: seconds without a sign of life after which the engine counts as stuck.
      draining: no request is taken any more.
    """

    engine: Engine
    name: str
    method: str
    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    local: bool = True
    max_body: int = 8 * 2**20
    watchdog: float = 60.0
    draining: bool = False

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.engine)
        self.contexts = Contexts(self.engine)
        self.created = int(time.time())

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        found = self.engine.model.tokenizer
        assert found is not None
        return found

    @property
    def state(self) -> str:
        """Whether it takes requests."""
        if self.engine.error is not None:
            return "dead"
        return "draining" if self.draining else "stuck" if self.engine.silent > self.watchdog else "ok"

    def check(self) -> None:
        """Raise `Refused` if no request is taken."""
        if self.state == "dead":
            raise Refused(500, f"the engine has ended: {self.engine.error}", headers={"x-should-retry": "false"})
        if self.draining:
            raise _draining()

    def check_model(self, name: object) -> None:
        """Raise `Refused` for a model that is not this one."""
        if name != self.name:
            message = f"there is no model {name!r}: this server has {self.name!r}"
            raise Refused(404, one_line(message), "model", "model_not_found")

    def owner(self, http: Http) -> str:
        """Who asks, as far as that is known: whose contexts are found."""
        return _key(http.headers) if self.keys else ""

    def about(self) -> dict[str, Any]:
        """The model, as OpenAI lists one."""
        engine = self.engine
        own = {"method": self.method, "seats": engine.seats, "max_new_tokens": engine.max_new_tokens}
        own |= {"contexts": engine.contexts, "after_context": engine.after_context} if engine.contexts else {}
        return {
            "id": self.name, "object": "model", "created": self.created, "owned_by": "kvjax",
            "max_model_len": engine.max_length, "kvjax": own,
        }  # fmt: skip

    def status(self) -> dict[str, Any]:
        """What it is busy with."""
        engine, load = self.engine, self.engine.load
        return {
            "model": self.name, "method": self.method, "state": self.state, "since": self.created,
            "max_length": engine.max_length, "load": load._asdict(),
            "seats": engine.seats, "full_bytes": full_bytes(engine.model, [engine.max_length] * engine.seats),
        }  # fmt: skip


def make(service: Service) -> Starlette:
    """The application."""
    routes = [
        Route("/", page),
        Route("/status", status),
        Route("/health", health),
        Route("/health/live", live),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/v1/models/{id:path}", model),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/contexts", create_context, methods=["POST"]),
        Route("/v1/contexts", contexts),
        Route("/v1/contexts/{id}", context),
        Route("/v1/contexts/{id}", delete_context, methods=["DELETE"]),
    ]
    guards = [Middleware(Guard, service=service)]
    if service.origins:
        cors = Middleware(CORSMiddleware, allow_origins=service.origins, allow_methods=["*"], allow_headers=["*"])
        guards.insert(0, cors)
    handlers = {Refused: _refused, HTTPException: _not_routed, Exception: _failed}
    app = Starlette(routes=routes, middleware=guards, exception_handlers=handlers)  # pyright: ignore[reportArgumentType]
    app.state.service = service
    return app


class Guard:
    """Who may ask: holders of a key; without keys, on this machine, nobody whom a browser sends from elsewhere."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        try:
            if scope["type"] == "http":
                self._check(Headers(scope=scope), scope["path"])
        except Refused as error:
            await _refusal(Http(scope), self._service, error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _check(self, headers: Headers, path: str) -> None:
        service = self._service
        if service.keys:
            right = [hmac.compare_digest(_key(headers).encode("latin-1"), key.encode()) for key in service.keys]
            if path.startswith("/v1/") and not any(right):
                raise Refused(
                    401, "no valid API key: send it as Authorization: Bearer KEY", None, "invalid_api_key",
                    {"www-authenticate": "Bearer"},
                )  # fmt: skip
        elif service.local:
            names = [f"//{headers.get('host', '')}", headers.get("origin", "")]
            if "*" not in service.origins and not (
                is_local(names[0]) and (not names[1] or names[1] in service.origins or is_local(names[1]))
            ):
                raise Refused(403, "without --api-key-file this server answers only what is asked of localhost")


def _key(headers: Headers) -> str:
    """What a client shows; "" = nothing."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return given.strip() if scheme.lower() == "bearer" else ""


def is_local(address: str) -> bool:
    """Whether an address (`//HOST:PORT`, or with a scheme) names this machine's loopback."""
    with contextlib.suppress(ValueError):
        name = urlsplit(address).hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    return False


class Stream(StreamingResponse):
    """Events of an answer, which is cancelled when nobody reads them any more, however early."""

    def __init__(self, service: Service, answer: Answer, first: AsyncIterator[bytes]):
        super().__init__(first, headers=EVENTS | {"x-request-id": answer.id}, media_type="text/event-stream")
        self._service, self._answer = service, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            _end(self._service, self._answer)


async def completions(http: Http) -> Response:
    """POST /v1/completions."""
    return await _answer(http, chat=False)


async def chat_completions(http: Http) -> Response:
    """POST /v1/chat/completions."""
    return await _answer(http, chat=True)


async def _answer(http: Http, chat: bool) -> Response:
    """Everything that can be refused is, before a stream begins."""
    service: Service = http.app.state.service
    body = await _asked(http)
    asked = bodies.chat(body) if chat else bodies.completion(body, service.engine.queue)
    requests = await run_in_threadpool(_submit, service, asked, service.owner(http))
    answer = answers.begin(service.name, chat, asked.usage, requests, service.tokenizer)
    if asked.stream:
        return Stream(service, answer, _events(answer, _wake(requests)))
    try:
        left = await _left(http, requests, answer.cancel)
    finally:
        _end(service, answer)
    if left:
        return Response(status_code=GONE)
    if any(choice.finish_reason == "cancelled" for choice in answer.choices):
        raise _draining()
    return _json(answers.whole(answer), headers={"x-request-id": answer.id})


async def _asked(http: Http) -> dict[str, Any]:
    """What a client asks of this server's model."""
    service: Service = http.app.state.service
    service.check()
    body = bodies.parse(await _body(http, service.max_body))
    service.check_model(body.get("model", service.name))
    return body


async def _left(http: Http, requests: Sequence[Request], cancel: Callable[[], None]) -> bool:
    """Wait until requests are over, and say whether the client left meanwhile, which cancels them."""
    wake = _wake(requests)
    gone = asyncio.create_task(_when_gone(http, cancel, wake))
    try:
        while not all(request.done for request in requests):
            await wake.wait()
            wake.clear()
        for request in requests:
            request.check()
    except (InputError, EngineError) as error:
        http.app.state.service.check()
        raise Refused(500, str(error)) from None
    finally:
        left = gone.done()
        gone.cancel()
    return left


def _draining() -> Refused:
    return Refused(503, "the server is shutting down", code="draining", headers={"retry-after": "5"})


async def _body(http: Http, most: int) -> bytes:
    """All of a body, of which no more than may be is kept."""
    found = bytearray()
    too_long = Refused(413, f"the body has more than {most} bytes")
    if int(http.headers.get("content-length", "0")) > most:
        raise too_long
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in http.stream():
                found += part
                if len(found) > most:
                    raise too_long
    except TimeoutError:
        raise Refused(408, f"the body did not come within {BODY_SECONDS:g} seconds") from None
    except ClientDisconnect:
        raise Refused(GONE, "the client has left") from None
    return bytes(found)


def _submit(service: Service, asked: Asked, owner: str) -> list[Request]:
    """All requests of a body, or none."""
    engine, tokenizer, requests = service.engine, service.tokenizer, list[Request]()
    stored = None if asked.context is None else service.contexts.find(asked.context, owner)
    room, size = engine.max_length if stored is None else engine.after_context, 0
    try:
        for prompt in asked.prompts or [_conversation(asked, stored, tokenizer)]:
            ids = tokenizer.encode(prompt, special=stored is None) if isinstance(prompt, str) else prompt
            size = len(ids)
            request = engine.submit(
                ids, max_new_tokens=asked.max_new_tokens, sampling=asked.sampling, stop=asked.stop,
                ignore_stop=asked.ignore_eos, n=asked.n, logprobs=asked.logprobs, budget=asked.budget,
                context=None if stored is None else stored.kept,
            )  # fmt: skip
            requests.append(request)
    except (InputError, EngineError) as error:
        for request in requests:
            request.cancel()
        raise _not_taken(
            error, "context_length_exceeded" if size + (asked.max_new_tokens or 1) > room else None
        ) from None
    return requests


def _conversation(asked: Asked, stored: Stored | None, tokenizer: Tokenizer) -> str | list[int]:
    """A chat as a prompt, or what of it follows a context."""
    if stored is None:
        return tokenizer.chat(asked.messages)
    return rest_of(asked.messages, stored, tokenizer)


def _not_taken(error: InputError | EngineError, code: str | None) -> Refused:
    """What an engine says of a request, as an answer."""
    if isinstance(error, QueueFull):
        return Refused(429, str(error), code="queue_full", headers={"retry-after": "1"})
    if isinstance(error, EngineError):
        return Refused(503, str(error), headers={"retry-after": "5"})
    return Refused(400, str(error), code=code)


async def create_context(http: Http) -> Response:
    """POST /v1/contexts: answered once the text is read."""
    service: Service = http.app.state.service
    asked, read = (
        bodies.context(await _asked(http)),
        functools.partial(service.contexts.read, tokenizer=service.tokenizer),
    )
    try:
        stored = await run_in_threadpool(read, asked, owner=service.owner(http))
    except (InputError, EngineError) as error:
        raise _not_taken(error, None) from None
    request = stored.kept.request
    try:
        left = await _left(http, [request], functools.partial(service.contexts.forget, stored))
    finally:
        service.metrics.ended(request, time.monotonic(), "context" if stored.kept.logits is not None else "cancelled")
    if left:
        return Response(status_code=GONE)
    if stored.kept.logits is None:
        raise _draining()
    service.contexts.add(stored)
    print(f"context: {len(request.prompt)} tokens, {stored.kept.bytes} bytes", file=sys.stderr, flush=True)
    return _json(service.contexts.about(stored, service.name))


async def contexts(http: Http) -> Response:
    """GET /v1/contexts."""
    service: Service = http.app.state.service
    found = [service.contexts.about(each, service.name) for each in service.contexts.of(service.owner(http))]
    return _json({"object": "list", "data": found})


async def context(http: Http) -> Response:
    """GET /v1/contexts/ID."""
    service: Service = http.app.state.service
    stored = service.contexts.find(http.path_params["id"], service.owner(http))
    return _json(service.contexts.about(stored, service.name))


async def delete_context(http: Http) -> Response:
    """DELETE /v1/contexts/ID: nobody finds it any more; those that read it end first."""
    service: Service = http.app.state.service
    stored = service.contexts.find(http.path_params["id"], service.owner(http))
    service.contexts.forget(stored)
    return _json({"id": stored.id, "object": "context.deleted", "deleted": True})


def _wake(requests: Sequence[Request]) -> asyncio.Event:
    """An event that the engine's thread sets whenever there is more."""
    loop, event = asyncio.get_running_loop(), asyncio.Event()

    def more() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(event.set)

    for request in requests:
        request.listen(more)
    event.set()  # for what has come before
    return event


async def _when_gone(http: Http, call: Callable[[], None], wake: asyncio.Event) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
    call()
    wake.set()


async def _events(answer: Answer, wake: asyncio.Event) -> AsyncIterator[bytes]:
    """An answer as it appears; an error is an event, too, and the last one."""
    for event in answers.first(answer):
        yield event
    shown, told = [0] * len(answer.choices), [0] * len(answer.choices)
    open_ = set(range(len(answer.choices)))
    try:
        while open_:
            try:
                await asyncio.wait_for(wake.wait(), HEARTBEAT)
            except TimeoutError:
                yield b": still there\n\n"
            wake.clear()
            answer.check()
            for i in sorted(open_):
                choice = answer.choices[i]
                reason, text = choice.finish_reason, choice.text  # in this order: the text of an end is whole
                if len(text) > shown[i]:
                    ranks = answer.ranked(choice, len(text), None)
                    yield answers.piece(answer, i, text[shown[i] :], (told[i], ranks))
                    shown[i], told[i] = len(text), ranks
                if reason == "cancelled":
                    raise EngineError("the server is shutting down")
                if reason is not None:
                    yield answers.end(answer, i, reason, (told[i], answer.ranked(choice, len(text), reason)))
                    open_.remove(i)
    except (InputError, EngineError) as error:
        yield answers.event(Refused(500, str(error)).body)
    else:
        yield answers.last(answer)


def _end(service: Service, answer: Answer) -> None:
    """Nobody waits for an answer any more: count it, and say so in the log, of which prompts are no part."""
    now = time.monotonic()
    reasons = []
    for request in answer.requests:
        whole = request.over
        request.cancel()
        ends = {choice.finish_reason for choice in request.choices}
        reasons.append(
            "cancelled" if not whole else "error" if ends <= {None, ""} else "/".join(sorted(map(str, ends)))
        )
        service.metrics.ended(request, now, reasons[-1])
    took = now - answer.requests[0].times[0]
    what = f"{answer.prompt_tokens} + {answer.new_tokens} tokens, {', '.join(sorted(set(reasons)))}, {took:.2f} s"
    print(f"{answer.id}: {what}", file=sys.stderr, flush=True)


async def models(http: Http) -> Response:
    """GET /v1/models."""
    return _json({"object": "list", "data": [http.app.state.service.about()]})


async def model(http: Http) -> Response:
    """GET /v1/models/ID."""
    http.app.state.service.check_model(http.path_params["id"])
    return _json(http.app.state.service.about())


async def health(http: Http) -> Response:
    """GET /health: whether requests are taken."""
    service: Service = http.app.state.service
    load, state = service.engine.load, service.state
    kept = {"contexts": load.contexts, "most_contexts": load.most_contexts} if load.most_contexts else {}
    return _json({"status": state} | kept, 200 if state == "ok" else 503)


async def live(http: Http) -> Response:
    """GET /health/live: whether the process does its work, or is to be started anew."""
    state = http.app.state.service.state
    return _json({"status": state}, 503 if state in ("stuck", "dead") else 200)


async def metrics(http: Http) -> Response:
    """GET /metrics."""
    return Response(http.app.state.service.metrics.text(), media_type="text/plain; version=0.0.4")


async def status(http: Http) -> Response:
    """GET /status: what the page shows."""
    return _json(http.app.state.service.status())


async def page(http: Http) -> Response:
    """GET /: a page for people."""
    del http
    return Response(_page(), media_type="text/html")


@functools.cache
def _page() -> bytes:
    return resources.files("kvjax.server").joinpath("page.html").read_bytes()


def _json(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(answers.to_json(content), status, headers, "application/json")


def _refusal(http: Http, service: Service, error: Refused) -> Response:
    service.metrics.refused.labels(str(error.status)).inc()
    print(one_line(f"{http.method} {http.url.path}: {error.status}"), file=sys.stderr, flush=True)
    return _json(error.body, error.status, error.headers)


async def _refused(http: Http, error: Refused) -> Response:
    return _refusal(http, http.app.state.service, error)


async def _not_routed(http: Http, error: HTTPException) -> Response:
    message = {404: f"there is no {http.url.path}", 405: f"{http.url.path} does not take {http.method}"}
    refused = Refused(error.status_code, one_line(message.get(error.status_code, error.detail)), headers=error.headers)
    return await _refused(http, refused)


async def _failed(http: Http, error: Exception) -> Response:
    return await _refused(http, Refused(500, f"{type(error).__name__}: the server's log has more"))
