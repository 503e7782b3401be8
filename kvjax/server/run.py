"""What `kvjax.serve` does once its flags are read: load, compile, listen, and end in order."""

import argparse
import asyncio
import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from kvjax.cli.flags import CHAT_LENGTH, numbers
from kvjax.engine.engine import Engine
from kvjax.errors import InputError, one_line
from kvjax.generation.checks import check_options
from kvjax.generation.model import load
from kvjax.methods import default_budget, of, resolve, write_entry
from kvjax.server import app
from kvjax.server.app import Service

CLOSING = 5  # seconds that clients have to read what is left once all has been generated


class Server(uvicorn.Server):
    """Ends when its engine does; SIGTERM lets requests end, a second one cancels them.

    Ctrl-C is `kvjax.interrupts`' to hear.

    Args:
      config: of uvicorn.
      service: what it serves.
      drain: seconds that requests have to end.
    """

    def __init__(self, config: uvicorn.Config, service: Service, drain: float):
        super().__init__(config)
        self._service, self._drain, self._hurry = service, drain, False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Hear SIGTERM while it serves."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self.handle_exit)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def handle_exit(self, sig: int, frame: object) -> None:
        """A signal."""
        del sig, frame
        self._hurry = self.should_exit
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Whether to end, ten times a second."""
        return await super().on_tick(counter) or self._service.engine.error is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End requests first: clients see the end of a text, or an error, and never a cut stream."""
        self._service.draining = True
        engine = self._service.engine
        closing = asyncio.create_task(asyncio.to_thread(engine.close, self._drain))
        while not closing.done():
            if self._hurry:
                await asyncio.to_thread(engine.close)
            await asyncio.wait([closing], timeout=0.1)
        await super().shutdown(sockets)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes; the exit status."""
    with bind(args.host, args.port) as bound:  # a port that is taken is known before a model is loaded
        engine = _engine(args)
        host, port = bound.getsockname()[:2]
        service = Service(
            engine, args.alias or _name(engine.model.name), _method(args, engine), keys=args.keys,
            origins=tuple(args.cors_origin), local=app.is_local(f"//{_address(host)}"), max_body=args.max_body,
            watchdog=args.watchdog,
        )  # fmt: skip
        bound.listen()  # who reads this line may ask at once
        _say(
            f"{service.name} at http://{_address(host)}:{port}/v1, {engine.cache_bytes:,} bytes of cache"
            f" and up to {engine.reading_bytes:,} of prompts that are read"
            + (f", {engine.context_cache_bytes:,} of contexts" if engine.contexts else "")
        )
        Server(config(service), service, args.drain).run([bound])
    if engine.error is not None:
        _say(one_line(f"the engine has ended: {type(engine.error).__name__}: {engine.error}"))
        return 1
    return 0


def _method(args: argparse.Namespace, engine: Engine) -> str:
    """What the page and the list of models say of the cache."""
    name = args.method or of(engine.model.spec)
    budget = default_budget(name) if args.budget is None else args.budget
    return write_entry(name, args.arguments) + ("" if budget is None else f" {budget}")


def _engine(args: argparse.Namespace) -> Engine:
    _say(f"loading {args.model or 'the demo model'}")
    model = load(args.model, **numbers(args), ignore_config=args.ignore_config)
    if model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer.json: a server needs one")
    method = write_entry(args.method or of(model.spec), args.arguments)
    length = min(CHAT_LENGTH, model.spec.max_position) if args.max_length is None else args.max_length
    check_options(
        model.spec, resolve(model.spec, method, args.budget), max_length=length
    )  # before it says what it does
    _say(f"compiling for {method}, {args.seats} seats of {length} tokens")
    return Engine(
        model, method, args.budget, seats=args.seats, max_length=length, max_new_tokens=args.max_new_tokens,
        cache=args.cache, stall=args.stall, queue=args.max_queue, contexts=args.contexts,
        context_cache=args.context_cache, after_context=min(args.after_context, length),
    )  # fmt: skip


def config(service: Service) -> uvicorn.Config:
    """How uvicorn serves it: quietly, and no longer than needed once it is to end."""
    return uvicorn.Config(
        app.make(service), loop="asyncio", http="h11", ws="none", lifespan="off", log_config=None, access_log=False,
        server_header=False, timeout_graceful_shutdown=CLOSING,
    )  # fmt: skip


def bind(host: str, port: int) -> socket.socket:
    """A socket that has the address, and does not answer yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(address)
        except OSError:
            found.close()
            raise
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"cannot listen at {host}, port {port}: {why}") from None
    return found


def _address(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _name(model: str) -> str:
    """What clients call a model: a file's or folder's name without where it is, or its name on a hub."""
    path = Path(model)
    return path.name.removesuffix(".gguf") if path.exists() else model


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
