"""A server, asked by the official client and by clients that do what none should."""

import asyncio
import dataclasses
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kvjax
from kvjax import serve
from kvjax.errors import InputError
from kvjax.models.tokenizer import Tokenizer
from kvjax.server import app, bodies, run
from kvjax.server.app import Service
from tests.lib.later import Later

httpx, openai = Later("httpx"), Later("openai")

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}assistant:"
LENGTH, SEATS, QUEUE = 1024, 2, 4
ENDLESS = {"ignore_eos": True}  # own fields of the server
HELLO = [{"role": "user", "content": "some words"}]


@pytest.fixture(scope="module")
def engine(shallow_demo) -> Iterator[kvjax.Engine]:
    model = kvjax.load()
    assert model.tokenizer is not None
    model = dataclasses.replace(model, tokenizer=Tokenizer(model.tokenizer._backend, TEMPLATE, {}))
    with kvjax.Engine(
        model, "h2o", 64, seats=SEATS, max_length=LENGTH, queue=QUEUE, contexts=2, after_context=200
    ) as engine:
        yield engine


def start(service: Service) -> tuple[run.Server, threading.Thread, str]:
    """A server on a free port."""
    bound = run.bind("127.0.0.1", 0)
    server = run.Server(run.config(service), service, drain=0.0)
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    wait(lambda: server.started)
    return server, thread, f"http://127.0.0.1:{bound.getsockname()[1]}"


def wait(until: Callable[[], bool]) -> None:
    while not until():
        time.sleep(0.01)


@pytest.fixture(scope="module")
def url(engine) -> Iterator[str]:
    server, thread, url = start(Service(engine, "demo", "h2o 64"))
    yield url
    server.handle_exit(signal.SIGTERM, None)
    thread.join()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def counted(url: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def idle(url: str) -> bool:
    load = httpx.get(f"{url}/status").json()["load"]
    return not (load["waiting"] or load["reading"] or load["decoding"] or any(load["promised"]))


def test_answers_are_what_generate_says(client, engine):
    chat = client.chat.completions.create(model="demo", messages=HELLO, max_completion_tokens=12, temperature=0)
    model = engine.model
    prompt = model.tokenizer.chat(HELLO)
    (said,) = model.generate([prompt], "h2o", 64, max_new_tokens=12).sequences
    (choice,) = chat.choices
    assert (choice.message.role, choice.message.content) == ("assistant", said.text)
    assert choice.finish_reason == said.finish_reason and chat.object == "chat.completion"
    assert chat.usage.prompt_tokens == len(prompt) and chat.usage.completion_tokens == len(said.tokens)
    for prompt in ("some words", model.tokenizer.encode("some words")):
        text = client.completions.create(model="demo", prompt=prompt, max_tokens=12, temperature=0)
        (said,) = model.generate(["some words"], "h2o", 64, max_new_tokens=12).sequences
        assert (text.choices[0].text, text.object) == (said.text, "text_completion")


def test_streams_join_to_the_whole(client):
    """Hot enough for tokens that are halves of characters."""
    how = dict(model="demo", temperature=2, seed=5, n=2, extra_body=ENDLESS)
    whole = client.chat.completions.create(messages=HELLO, max_tokens=60, **how)
    stream = client.chat.completions.create(
        messages=HELLO, max_tokens=60, stream=True, stream_options={"include_usage": True}, **how
    )
    *pieces, last = stream
    assert [piece.choices[0].delta.role for piece in pieces[:2]] == ["assistant"] * 2
    assert all(piece.id == last.id and piece.usage is None for piece in pieces)
    assert last.choices == [] and last.usage.completion_tokens == 120 == whole.usage.completion_tokens
    texts, ends = ["", ""], ["", ""]
    for (choice,) in (piece.choices for piece in pieces):
        assert not ends[choice.index]
        texts[choice.index] += choice.delta.content or ""
        ends[choice.index] = choice.finish_reason or ""
    assert texts == [choice.message.content for choice in whole.choices] and ends == ["length"] * 2
    assert texts[0] != texts[1] and any(ord(letter) > 127 for letter in texts[0])


def test_many_prompts_of_one_completion(client):
    out = client.completions.create(model="demo", prompt=["some", "words"], n=2, max_tokens=3, seed=1)
    alone = client.completions.create(model="demo", prompt="words", n=2, max_tokens=3, seed=1)
    assert [choice.index for choice in out.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in out.choices[2:]] == [choice.text for choice in alone.choices]
    drawn = {client.completions.create(model="demo", prompt="some", max_tokens=9).choices[0].text for _ in range(4)}
    assert len(drawn) > 1  # without a seed


def test_texts_end_before_stop_strings(client):
    how = dict(model="demo", prompt="some words", max_tokens=40, temperature=0, extra_body=ENDLESS)
    text = client.completions.create(**how).choices[0].text
    for stop in (text[9:12], [text[9:12], "not there"]):
        found = client.completions.create(**how, stop=stop)
        assert (found.choices[0].text, found.choices[0].finish_reason) == (text[: text.index(text[9:12])], "stop")
        pieces = [piece.choices[0].text for piece in client.completions.create(**how, stop=stop, stream=True)]
        assert "".join(pieces) == found.choices[0].text


def test_own_fields_and_harmless_ones(client):
    """The likeliest token alone is left by each of these, whatever the temperature; what changes nothing passes."""
    ask = lambda **how: client.chat.completions.create(model="demo", messages=HELLO, max_tokens=8, **how)
    greedy = ask(temperature=0).choices[0].message.content
    for own in ({"top_k": 1}, {"min_p": 1}, {"what": 1}):
        assert ask(temperature=0 if "what" in own else 1.5, extra_body=own).choices[0].message.content == greedy
    assert ask(temperature=1.5, top_p=0).choices[0].message.content == greedy
    harmless = dict(tools=[], response_format={"type": "text"}, logprobs=False, presence_penalty=0.0, user="me")
    parts = [{"role": "user", "content": [{"type": "text", "text": "some words"}]}]
    out = client.chat.completions.create(model="demo", messages=parts, max_tokens=8, temperature=0, **harmless)
    assert out.choices[0].message.content == greedy


def test_log_probabilities(client, engine):
    """Those of the library, in both shapes, whole and in pieces; the token and the text of a stop are in neither."""
    model = engine.model
    out = model.generate(["some words"], "h2o", 64, max_new_tokens=9, logprobs=3).sequences[0]
    how = dict(model="demo", prompt="some words", max_tokens=9, temperature=0, logprobs=3)
    said = client.completions.create(**how).choices[0].logprobs
    assert "".join(said.tokens) == out.text and said.token_logprobs == pytest.approx(out.logprobs.chosen, abs=1e-4)
    tops = [sorted(top.values(), reverse=True)[:3] for top in said.top_logprobs]
    assert tops == [pytest.approx(top, abs=1e-4) for top in out.logprobs.top]
    assert said.text_offset == [len("".join(said.tokens[:i])) for i in range(9)]
    stop = out.text[9:12]
    for stream in (False, True):
        found = client.completions.create(**how, stop=stop, stream=stream)
        pieces = [piece.choices[0] for piece in found] if stream else [found.choices[0]]
        tokens = [token for piece in pieces if piece.logprobs for token in piece.logprobs.tokens]
        text = "".join(piece.text for piece in pieces)
        assert text == out.text[: out.text.index(stop)] and tokens == said.tokens[: len(tokens)]
        assert len("".join(tokens[:-1])) < len(text) <= len("".join(tokens))
    chat = dict(model="demo", messages=HELLO, max_tokens=9, temperature=2, seed=3, logprobs=True, top_logprobs=2)
    whole = client.chat.completions.create(**chat, extra_body=ENDLESS).choices[0].logprobs.content
    pieces = [p.choices[0].logprobs for p in client.chat.completions.create(**chat, extra_body=ENDLESS, stream=True)]
    assert [one for piece in pieces if piece for one in piece.content] == whole and len(whole) == 9
    assert all(len(one.top_logprobs) == 2 and one.logprob <= one.top_logprobs[0].logprob for one in whole)
    assert all(one.bytes is None or bytes(one.bytes).decode() == one.token for one in whole)


def test_biases_and_penalties(client, engine):
    ask = lambda **how: client.completions.create(model="demo", prompt="a a a", max_tokens=12, temperature=0, **how)
    text = lambda **how: ask(**how, extra_body=ENDLESS).choices[0].text
    tokens = ask(logprobs=0, extra_body=ENDLESS).choices[0].logprobs.tokens
    assert text(logit_bias={"300": 100}) == text(logit_bias={"300": 100, "301": -100}) != text()
    assert len(text(logit_bias={"300": 100}).split(engine.model.tokenizer.piece(300))) == 13
    many = (
        ask(logprobs=0, logit_bias={"300": 20, "301": 19}, frequency_penalty=2, extra_body=ENDLESS).choices[0].logprobs
    )
    assert len(set(many.tokens)) > 1 and len(tokens) == 12


def test_the_asynchronous_client_asks_many_things_at_once(url, engine):
    async def all_() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            ask = lambda n: client.completions.create(model="demo", prompt="some " * n, max_tokens=9, temperature=0)
            return [out.choices[0].text for out in await asyncio.gather(*map(ask, range(1, QUEUE + 1)))]

    prompts = ["some " * n for n in range(1, QUEUE + 1)]
    alone = [engine.submit(prompt, max_new_tokens=9).result()[0].text for prompt in prompts]
    assert asyncio.run(all_()) == alone


def test_contexts(client, url, engine):
    """A text that is read once: what follows it is answered as the library does, and the usage says what it saved."""
    text, before = "river: 217 130\nlake: 43 21\n" * 12, counted(url, "kvjax_cached_tokens_total")
    made = httpx.post(f"{url}/v1/contexts", json={"input": text}, timeout=None).json()
    alone = engine.model.read(text, "h2o", 64)
    assert made["object"] == "context" and made["tokens"] == len(alone.tokens) and made["bytes"] < made["full_bytes"]
    assert counted(url, "kvjax_contexts") == 1 and counted(url, "kvjax_context_tokens") == made["tokens"]
    for prompts in (["river:"], ["", "lake: 43 "]):
        how = dict(model="demo", prompt=prompts, max_tokens=10, temperature=0, extra_body={"context": made["id"]})
        out, said = client.completions.create(**how), alone.ask(prompts, max_new_tokens=10).sequences
        assert [choice.text for choice in out.choices] == [each.text for each in said]
        assert out.usage.prompt_tokens == sum(each.prompt_tokens for each in said)
        assert out.usage.prompt_tokens_details.cached_tokens == len(prompts) * made["tokens"]
    assert counted(url, "kvjax_cached_tokens_total") == before + 3 * made["tokens"]
    assert (
        httpx.get(f"{url}/v1/contexts").json()["data"]
        == [made]
        == [httpx.get(f"{url}/v1/contexts/{made['id']}").json()]
    )
    stream = client.completions.create(
        model="demo", prompt="", max_tokens=150, stream=True, extra_body=ENDLESS | {"context": made["id"]}
    )
    next(stream)
    assert httpx.delete(f"{url}/v1/contexts/{made['id']}").json()["deleted"]  # whoever reads it goes on
    assert len(list(stream)) > 1
    for answer in (httpx.get(f"{url}/v1/contexts/{made['id']}"), httpx.delete(f"{url}/v1/contexts/{made['id']}")):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "context_not_found")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**how)
    wait(lambda: counted(url, "kvjax_contexts") == 0 and idle(url))


def test_conversations_begin_with_a_context(client, url):
    """The whole conversation is sent, as ever; what does not begin as the context does is told from where on."""
    long = {"role": "user", "content": "river: 217 130 lake: 43 21 " * 20}
    made = httpx.post(f"{url}/v1/contexts", json={"messages": [long]}, timeout=None).json()
    ask = lambda *messages: client.chat.completions.create(
        model="demo", messages=messages, max_tokens=6, temperature=0, extra_body={"context": made["id"]}
    )
    more = {"role": "user", "content": long["content"] + "river:"}
    one = ask(more)
    assert one.usage.prompt_tokens_details.cached_tokens == made["tokens"] < one.usage.prompt_tokens
    said = one.choices[0].message
    assert (
        ask(more, {"role": "assistant", "content": said.content}, *HELLO).usage.prompt_tokens > one.usage.prompt_tokens
    )
    with pytest.raises(openai.BadRequestError) as error:
        ask({"role": "user", "content": "river: 218"})
    assert error.value.code == "context_mismatch" and "from character 15 of" in error.value.message
    plain = httpx.post(f"{url}/v1/contexts", json={"input": [1, 2, 3], "budget": 2}, timeout=None).json()
    full = httpx.post(f"{url}/v1/contexts", json={"input": "some"})
    assert (full.status_code, full.json()["error"]["code"]) == (429, "contexts_full")
    made, more = plain, long
    with pytest.raises(openai.BadRequestError, match="no conversation"):
        ask(more)
    for each in httpx.get(f"{url}/v1/contexts").json()["data"]:
        httpx.delete(f"{url}/v1/contexts/{each['id']}")
    wait(lambda: counted(url, "kvjax_contexts") == 0)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({}, "input"),
        ({"input": "a", "messages": HELLO}, "input"),
        ({"input": 5}, "input"),
        ({"messages": []}, "messages"),
        ({"input": "a", "budget": "101%"}, "budget"),
        ({"input": "a", "budget": 65}, None),
        ({"input": "some words " * LENGTH}, None),
    ],
    ids=range(7),
)
def test_contexts_that_cannot_be_made(given, param, url):
    answer = httpx.post(f"{url}/v1/contexts", json=given)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
    assert httpx.get(f"{url}/v1/contexts").json()["data"] == []


def test_budgets_of_requests(client, engine):
    ask = lambda **own: client.completions.create(
        model="demo", prompt="river: 217 130 " * 20, max_tokens=12, temperature=0, extra_body=ENDLESS | own
    )
    for budget in (16, "5%"):
        (said,) = engine.model.generate(["river: 217 130 " * 20], "h2o", budget, max_new_tokens=12).sequences
        assert ask(budget=budget).choices[0].text.startswith(said.text)
    for budget in (65, "0%", "much", True, [1]):
        with pytest.raises(openai.BadRequestError, match="budget"):
            ask(budget=budget)


def test_models(client, url):
    (model,) = client.models.list()
    assert model.id == "demo" and client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="other", messages=HELLO)
    assert (error.value.code, error.value.param) == ("model_not_found", "model")
    page = httpx.get(url)
    assert page.headers["content-type"].startswith("text/html") and "http" not in page.text
    assert httpx.get(f"{url}/health/live").json() == {"status": "ok"}
    assert httpx.get(f"{url}/health").json() == {"status": "ok", "contexts": 0, "most_contexts": 2}


def test_the_examples_of_the_page(url, client, capfd):
    """As they stand in docs/serving.md, but for the port and the name of the model."""
    page = (Path(__file__).parent.parent / "docs" / "serving.md").read_text("utf-8")
    here = lambda text: text.replace("localhost:8000", url.removeprefix("http://")).replace('"FILE"', '"demo"')
    names = {"text": "river: 217 130\n" * 20}
    python = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    for block in python:
        exec(here(block), names)
    assert len(python) == 2 and names["answer"].usage.prompt_tokens_details.cached_tokens == names["made"]["tokens"]
    names["client"].delete(f"/contexts/{names['made']['id']}", cast_to=object)
    names["client"].close()
    said = capfd.readouterr().out
    assert said.strip()
    for line in re.findall(r"^curl .*", page, re.MULTILINE) if shutil.which("curl") else ():
        answer = subprocess.run(["bash", "-c", f"{here(line)} -s"], check=True, capture_output=True, text=True).stdout
        assert '"error"' not in answer and re.search(r'"id": ?"(chatcmpl|cmpl|ctx)', answer), answer
    for each in httpx.get(f"{url}/v1/contexts").json()["data"]:
        httpx.delete(f"{url}/v1/contexts/{each['id']}")


WRONG = {
    "": (b"", b"{", b"[]", b"\xff", b'"x"', b'{"prompt": "\\ud800"}', b'{"prompt": ' + b"[" * 5000, b"{}"),
    "prompt": (b'{"prompt": 5}', b'{"prompt": []}', b'{"prompt": [1, "a"]}', b'{"prompt": ["a", "b", "c", "d", "e"]}'),
    "max_tokens": (b'{"prompt": "a", "max_tokens": 0}', b'{"prompt": "a", "max_tokens": true}'),
    "temperature": (b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "temperature": "1"}'),
    "n": (b'{"prompt": "a", "n": 0}', b'{"prompt": "a", "n": 1e2}'),
    "stop": (b'{"prompt": "a", "stop": ""}', b'{"prompt": "a", "stop": ["a", "b", "c", "d", "e"]}'),
    "stream": (b'{"prompt": "a", "stream": 1}',),
    "stream_options": (b'{"prompt": "a", "stream_options": {"include_usage": true}}',),
    "logprobs": (b'{"prompt": "a", "logprobs": 21}', b'{"prompt": "a", "logprobs": true}'),
    "logit_bias": (b'{"prompt": "a", "logit_bias": {"a": 1}}', b'{"prompt": "a", "logit_bias": {"5": 101}}'),
    "presence_penalty": (b'{"prompt": "a", "presence_penalty": 3}',),
    "echo": (b'{"prompt": "a", "echo": true}',),
    "seed": (b'{"prompt": "a", "seed": 1' + b"0" * 30 + b"}",),
}


@pytest.mark.parametrize("param", WRONG)
def test_malformed_bodies(param: str, url: str):
    for body in WRONG[param]:
        answer = httpx.post(f"{url}/v1/completions", content=body)
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["type"] == "invalid_request_error", (body, answer.text)
        assert error["message"] and (not param or error["param"] == param), (body, answer.text)
    assert idle(url)


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ({"messages": []}, None),
        ({"messages": [{"role": "user"}]}, None),
        ({"messages": [{"role": "poet", "content": "some"}]}, None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "unsupported_parameter"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter"),
        ({"top_logprobs": 2}, None),
        ({"logit_bias": {"4096": 1}}, None),
        ({"max_tokens": LENGTH}, "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "some words " * LENGTH}]}, "context_length_exceeded"),
        ({"n": SEATS + 1}, None),
        ({"n": 2**31 - 1}, None),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_done_is_refused(how, code, client):
    """Before a stream begins, too."""
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(**{"model": "demo", "messages": HELLO, "stream": stream} | how)
        assert error.value.code == code


def test_an_engine_that_gives_no_sign_of_life_fails_health_checks(engine, monkeypatch):
    ask = lambda: (ask_app(service, "/health"), ask_app(service, "/health/live"))
    service = Service(engine, "demo", "h2o")
    assert ask() == (200, 200)
    hangs, turned = threading.Event(), threading.Event()
    turn = engine._turn
    monkeypatch.setattr(engine, "_turn", lambda: (turned.set(), hangs.wait(), turn()))
    request = engine.submit([1], max_new_tokens=2)
    turned.wait()
    service.watchdog = 0.01
    wait(lambda: ask() == (503, 503))
    hangs.set()
    request.result()
    service.watchdog = 60.0
    assert ask() == (200, 200)


def test_routes_and_sizes(url):
    refused = 'kvjax_refused_total{status="405"}'
    before = counted(url, refused)
    assert httpx.get(f"{url}/v1/completions").status_code == 405 and counted(url, refused) == before + 1
    assert httpx.get(f"{url}/v2").json()["error"]["message"] == "there is no /v2"
    assert httpx.post(f"{url}/v1/completions", content=b" " * (8 * 2**20 + 1)).status_code == 413
    chunks = (b" " * 2**20 for _ in range(10))  # of which nobody says how many they are
    assert httpx.post(f"{url}/v1/completions", content=chunks).status_code == 413


def test_a_full_queue_refuses_and_readers_that_leave_free_it(client, url):
    """Streams of which two decode and four wait; all are dropped."""
    before, reason = counted(url, 'kvjax_requests_total{reason="cancelled"}'), "kvjax_requests_total"
    how = dict(model="demo", prompt="some", max_tokens=LENGTH - 10, stream=True, extra_body=ENDLESS)
    streams = [client.completions.create(**how) for _ in range(SEATS)]
    for stream in streams:
        assert next(stream).choices[0].finish_reason is None
    streams += [client.completions.create(**how) for _ in range(QUEUE)]
    with pytest.raises(openai.RateLimitError) as error:
        client.completions.create(**how)
    assert error.value.code == "queue_full" and error.value.response.headers["retry-after"] == "1"
    assert httpx.get(f"{url}/health").status_code == 200
    for stream in streams:
        stream.close()
    wait(lambda: idle(url))
    assert counted(url, f'{reason}{{reason="cancelled"}}') == before + SEATS + QUEUE


def test_clients_that_do_not_wait_for_an_answer_free_their_seat(url):
    before = counted(url, 'kvjax_requests_total{reason="cancelled"}')
    with pytest.raises(httpx.ReadTimeout):
        body = {"prompt": "some", "max_tokens": LENGTH - 10} | ENDLESS
        httpx.post(f"{url}/v1/completions", json=body, timeout=httpx.Timeout(60, read=0.2))
    wait(lambda: idle(url))
    wait(lambda: counted(url, 'kvjax_requests_total{reason="cancelled"}') == before + 1)


def test_streams_that_wait_say_that_they_are_there(url, monkeypatch):
    monkeypatch.setattr(app, "HEARTBEAT", 0.001)
    body = {"prompt": "some", "max_tokens": 50, "stream": True} | ENDLESS
    lines = httpx.post(f"{url}/v1/completions", json=body).text.splitlines()
    assert ": still there" in lines and lines[-2] == "data: [DONE]"


def ask_app(service: Service, path: str, **headers: str) -> int:
    """The status of an application's answer, without a server."""

    async def ask() -> int:
        transport = httpx.ASGITransport(app.make(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return (
                await client.get(path, headers={name.replace("_", "-"): x for name, x in headers.items()})
            ).status_code

    return asyncio.run(ask())


def test_keys(engine):
    service = Service(engine, "demo", "h2o", keys=("one", "two"))
    for given, status in {"one": 200, "two": 200, "on": 401, "one,two": 401, "": 401}.items():
        assert ask_app(service, "/v1/models", authorization=f"Bearer {given}") == status
    assert ask_app(service, "/v1/models") == ask_app(service, "/v1/models", authorization="Basic one") == 401
    assert ask_app(service, "/health") == ask_app(service, "/metrics", host="example.org") == 200


def test_contexts_are_found_by_who_has_made_them(engine):
    service = Service(engine, "demo", "h2o", keys=("one", "two"))
    stored = service.contexts.read(bodies.context({"input": "some words"}), service.tokenizer, "one")
    stored.kept.wait()
    service.contexts.add(stored)
    path = f"/v1/contexts/{stored.id}"
    assert ask_app(service, path, authorization="Bearer one") == 200
    assert ask_app(service, path, authorization="Bearer two") == 404
    service.contexts.forget(stored)
    assert ask_app(service, path, authorization="Bearer one") == 404


def test_web_pages_of_others_are_refused(engine):
    service = Service(engine, "demo", "h2o")
    assert ask_app(service, "/health", host="127.0.0.1:80") == ask_app(service, "/health", host="[::1]") == 200
    assert ask_app(service, "/health", origin="http://localhost:3000") == 200
    assert ask_app(service, "/health", host="example.org") == ask_app(service, "/health", origin="https://a.b") == 403
    assert (
        ask_app(service, "/health", host="localhost.example.org") == ask_app(service, "/health", origin="null") == 403
    )
    asked = dataclasses.replace(service, origins=("https://a.b",))
    assert ask_app(asked, "/health", origin="https://a.b") == 200 != ask_app(asked, "/health", origin="https://c.d")
    assert ask_app(dataclasses.replace(service, local=False), "/health", host="example.org") == 200


def test_an_engine_that_fails_ends_streams_with_an_error_and_the_server(engine, monkeypatch):
    other = kvjax.Engine(engine.model, "h2o", 64, seats=SEATS, max_length=LENGTH)
    _, thread, url = start(Service(other, "demo", "h2o 64"))
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        how = dict(model="demo", prompt="some", max_tokens=LENGTH - 10, stream=True, extra_body=ENDLESS)
        stream = client.completions.create(**how)
        next(stream)

        def fail(*_: object, **__: object) -> None:
            raise MemoryError("none is left")

        monkeypatch.setattr("kvjax.engine.engine.programs.steps", fail)
        with pytest.raises(openai.APIError, match="MemoryError: none is left"):
            list(stream)
    thread.join()


@pytest.mark.parametrize("package", serve.PACKAGES)
def test_what_is_not_installed_is_named(package: str, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == package or name.startswith("kvjax.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delattr("kvjax.server.run", raising=False)
    with pytest.raises(InputError, match=f"needs the package {package}: pip install"):
        serve.main([])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--port 70000", "--port 70000 is not"),
        ("--cache much", "--cache 'much' is not a size"),
        ("--seats 0", "--seats 0 is not"),
        ("--contexts -1", "--contexts -1 is not"),
        ("--context-cache 1GB", "say how many, as in --contexts 4"),
        ("--drain -1", "--drain -1.0 is not"),
        ("--stall nan", "--stall nan is not"),
        ("--api-key-file /nowhere", "cannot read /nowhere"),
        ("--method snapvk", "unknown method"),
        ("--host nowhere.invalid", "cannot listen at nowhere.invalid"),
        ("--port TAKEN", "cannot listen at 127.0.0.1, port"),
        ("--port 0 --max-length 100000", "context limit 4096"),
    ],
)
def test_flags_that_cannot_be_followed(flags: str, message: str, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match=re.escape(message)):
        serve.main(flags.replace("TAKEN", str(taken.getsockname()[1])).split())
    assert "compiling" not in capsys.readouterr().err


def test_the_command_serves_until_it_is_told_to_end(shallow: Path, tmp_path: Path):
    """Compiled is what the tests above have compiled. A stream that is open at SIGTERM ends in order."""
    (tmp_path / "keys").write_text("secret\n\n")
    flags = f"--model {shallow} --alias demo --method h2o --budget 64 --seats {SEATS} --max-length {LENGTH} --port 0"
    line = [
        sys.executable,
        "-m",
        "kvjax.serve",
        *flags.split(),
        "--api-key-file",
        str(tmp_path / "keys"),
        "--drain",
        "0",
    ]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        found = None
        while found is None:
            said = process.stderr.readline()
            assert said
            found = re.search(r"http://127\.0\.0\.1:\d+/v1", said)
        with pytest.raises(openai.AuthenticationError), openai.OpenAI(base_url=found[0], api_key="wrong") as client:
            client.models.list()
        with openai.OpenAI(base_url=found[0], api_key="secret") as client:
            how = dict(prompt="some", max_tokens=LENGTH - 10, stream=True, extra_body=ENDLESS)
            stream = client.completions.create(model="demo", **how)
            assert next(stream).choices[0].finish_reason is None
            process.send_signal(signal.SIGTERM)
            with pytest.raises(openai.APIError, match="shutting down"):
                list(stream)
        assert process.wait() == 0
        assert "some" not in process.stderr.read()  # nobody's words
