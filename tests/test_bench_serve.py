"""`bench serve` at tiny sizes: who has how many seats of the same bytes, what is counted, and what is refused."""

import importlib.util
import json

import pytest

from kvjax import compilation
from kvjax.bench import __main__ as bench
from kvjax.bench import serve
from kvjax.bench.serve import Event, Run, Trace
from kvjax.errors import InputError

TINY = "serve --model llama-tiny --prompt-tokens 120-160 --new-tokens 5-9 --requests 6 --pool 1 --seats 4 --rounds 1"


@pytest.fixture(autouse=True)
def own_programs(monkeypatch):
    monkeypatch.setattr(compilation, "enable_compilation_cache", lambda: None)


def test_methods_share_the_bytes_of_a_pool(capsys):
    against = " --against transformers" if importlib.util.find_spec("transformers") else ""
    bench.main([*TINY.split(), *f"--methods full,h2o:20% --loads 2 --json{against}".split()])
    found = json.loads(capsys.readouterr().out)
    assert [section["title"].split()[0] for section in found["sections"]] == ["closed", "open"]
    for section in found["sections"]:
        full, h2o, *others = section["rows"]
        assert (full["seats"], h2o["seats"]) == (1, 4) and full["x"] == 1
        assert all(0 < each["cache_bytes"] <= found["cache_bytes"] for each in section["rows"])
        assert full["decoding"] < 1
        assert not full["unfinished"] and not h2o["unfinished"] and 0 < full["reading"] < 1
        assert full["ttft_p50"] <= full["ttft_p99"] and len(others) == bool(against)


def test_what_is_said_of_requests():
    trace = lambda arrived, *events: Trace(arrived, 5, [Event(*event, done=False) for event in events])
    slow = Run([trace(0.0, (1.0, 1), (3.0, 5)), trace(1.0, (4.0, 2), (4.5, 3))], 8.0, 0.25)
    fast = Run([trace(0.0, (0.5, 1), (1.5, 5)), trace(1.0, (2.0, 2), (2.5, 5))], 4.0, 0.75)
    contestant = serve.Contestant("one", lambda *_: None, lambda: None, {"seats": 2})
    row = serve.row(contestant, [slow, fast], [slow, slow])
    assert row["per_s"] == (8 / 8 + 10 / 4) / 2 and row["x"] == (1 + 2.5) / 2 and row["reading"] == 0.5
    assert row["unfinished"] == 1 and row["ttft_p50"] == 1.0 and row["gap_p50"] == 0.75 and row["seats"] == 2
    assert row["decoding"] == pytest.approx((2.5 / 8 + 1.5 / 4) / 2)
    assert trace(0.0, (1.0, 1), (3.0, 5)).per_token == 0.5


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--prompt-tokens 9-3", "--prompt-tokens 9-3 is not a range"),
        ("--new-tokens 0", "--new-tokens 0 is not a range"),
        ("--requests 0", "--requests 0"),
        ("--loads fast", "--loads is not a list"),
        ("--loads -1", "--loads is not a list"),
        ("--model demo --prompt-tokens 4096", "pass the context limit"),
    ],
)
def test_wrong_flags_are_refused(flags, said):
    with pytest.raises(InputError, match=said):
        bench.main(["serve", *flags.split()])
