"""Mutated command lines: whatever is wrong is one line and exit code 2, and what is planned is what was asked for.

Commands that would run a model are given one that is not there: with right flags too they end with that line.
"""

import contextlib
import io
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

from kvjax import convert, evaluate, serve
from kvjax.bench import __main__ as bench
from kvjax.cli import command
from kvjax.generate import main as generate
from kvjax.inspect import main as inspect
from kvjax.plan import __main__ as plan
from kvjax.retrofit import __main__ as retrofit
from tests.lib.mutate import LONGEST, WORDS, Kind

ABSENT = "/not/there"
VALUES = [word for word in WORDS if "\x00" not in word and word.isascii()] + (
    "0 2 -7 10% 0% 101% -5% 1e30 1e-50 1e400 nan inf 999999999999 2.5 1,2,3 , x=1 =1 x= full h2o mikv+low_store=int4"
    " full,full int4 kivi2 dms:8 data=2 model=0 lines 20%,30% \udcff ٣ 512,512 h2o:10%"
).split()
FOLDER = "FOLDER"  # stands for an empty one


class Command(NamedTuple):
    """A command line.

    Attributes:
      main: the command.
      fixed: flags that stay.
      flags: those that are mutated.
      says: what a printed object must say of the flags, if the command can succeed.
    """

    main: Callable[[list[str]], None]
    fixed: str
    flags: str
    says: Sequence[str] = ()


SAMPLING = "--temperature 0.7 --top-k 5 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.1 --seed 3"
COMMANDS = {
    "generate": Command(
        generate, f"--model {ABSENT}",
        f"--prompt hi --method h2o --budget 20% --store int8 --set recent=0.5 --max-new-tokens 3 {SAMPLING}",
    ),
    "inspect": Command(
        inspect, "--json --dry-run", "--method snapkv --budget 20% --context 300 --batch 2 --max-new-tokens 4",
        ("context", "batch"),
    ),
    "plan": Command(
        plan.main, "--json --estimate",
        "--model llama-3-8b --chip h200 --context 4096 --batch 2 --method h2o --budget 20% --new-tokens 64"
        " --mesh model=2",
        ("context", "batch"),
    ),
    "convert": Command(convert.main, ABSENT, f"{FOLDER}/out --dtype bfloat16 --lorc keep=60% --lorc-groups 2"),
    "retrofit": Command(
        retrofit.main, f"--model {ABSENT} --out {FOLDER}/out --data {FOLDER}/absent.jsonl",
        "--cr 2 --objective dms --window 16 --length 64 --batch 4 --micro-batch 2 --learning-rate 1e-4 --ramp-steps 10"
        " --final-steps 4 --save-every 10 --log-every 5 --export 1.5 --minutes 1",
    ),
    "evaluate": Command(
        evaluate.main, f"--model {ABSENT} --out {FOLDER}/out",
        "--tasks lines,needle --methods h2o,mikv+low_store=int4 --budgets 10%,20% --samples 2 --lengths 128"
        " --set needle.depths=3 --batch 2 --seed 1",
    ),
    "serve": Command(
        serve.main, f"--model {ABSENT} --port 0",
        "--method h2o --budget 20% --store int8 --seats 2 --max-length 256 --max-new-tokens 4 --cache 1GB --max-queue 4"
        " --stall 0.1 --drain 1 --watchdog 9 --max-body 1MB --alias a --dtype float32",
    ),
    "bench serve": Command(
        bench.main, f"serve --model {ABSENT}",
        "--methods full,h2o:20% --prompt-tokens 20-40 --new-tokens 4 --requests 2 --clients 1 --pool 1 --seats 2"
        " --loads 0.5 --stall 0.1 --seed 1 --rounds 1 --dtype float32",
    ),
    "report": Command(evaluate.main, "report", FOLDER),
    "bench": Command(
        bench.main, f"decode --model {ABSENT}",
        "--methods full,h2o:20% --contexts 64 --batch 1 --steps 2 --rounds 1 --memory 1GB --dtype float32",
    ),
}  # fmt: skip


@st.composite
def flags(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A command, and its flags of which some have other values, are gone, or stand elsewhere."""
    name = draw(st.sampled_from(sorted(COMMANDS)))
    given = COMMANDS[name].flags.split()
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(given) - 1))
        what = draw(st.sampled_from(["value", "value", "value", "gone", "twice", "moved"]))
        if what == "value":
            given[at] = draw(st.sampled_from(VALUES))
        elif what == "gone":
            given = given[:at] + given[at + 1 :] or [""]
        else:
            given.insert(draw(st.integers(0, len(given))), given[at] if what == "twice" else given.pop(at))
    return name, given


def flags_hold(case: tuple[str, list[str]], folder: Path) -> None:
    """Refused with one line and exit code 2, or what is printed is about what was asked for."""
    name, given = case
    how = COMMANDS[name]
    argv = [word.replace(FOLDER, str(folder)) for word in (*how.fixed.split(), *given)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            command.run(name, lambda: how.main(argv))
        except SystemExit as error:
            code = error.code
    if code == 2:
        line = err.getvalue().removeprefix(f"loading {ABSENT}\n").removesuffix("\n")  # what a server begins with
        assert line.isprintable() and 0 < len(line) < LONGEST + len(name), line
        return
    assert code == 0 and how.says, (code, err.getvalue())
    said = json.loads(out.getvalue())
    assert finite(said)
    for key in how.says:
        (asked,) = [after for before, after in itertools.pairwise(given) if before == f"--{key}"][-1:] or [""]
        assert not asked or said[key] == int(asked), (key, said[key])


def finite(said: Any) -> bool:
    """Whether every number of a document is one."""
    if isinstance(said, dict | list):
        return all(map(finite, said.values() if isinstance(said, dict) else said))
    return not isinstance(said, float) or math.isfinite(said)


# The line of an error comes alone, before any progress bar; `--` is no value.
KNOWN = [
    ("retrofit", COMMANDS["retrofit"].flags.split()),
    *((name, [f"{flag}=--"]) for name, flag in (("generate", "--set"), ("plan", "--method"), ("evaluate", "--set"))),
    *((name, ["--batch", "999999999999"]) for name in ("inspect", "plan", "evaluate", "bench")),
    ("evaluate", ["--samples", "999999999999"]),
    ("convert", ["a" * 300]),
    ("evaluate", ["--tasks", "a" * 300]),
    ("generate", ["--prompt", "hi", "--repetition-penalty", "1e-50"]),
    ("generate", ["--prompt-file", "a" * 300]),
    ("report", ["a" * 300]),
]
KINDS = {"flags": Kind(flags(), flags_hold, KNOWN)}
