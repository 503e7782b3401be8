"""The flags of every command; a function's docstring is what its help begins with."""

import argparse
from pathlib import Path

from kvjax.bench.shapes import ATTENTION, DEFAULT, KERNELS, LARGE, PEERS, SHAPES, SMALL, STAGES, STORES
from kvjax.checkpoint.header import DTYPES as STORED_DTYPES
from kvjax.cli import command
from kvjax.cli.flags import DTYPES
from kvjax.methods import KERNELS as IMPLEMENTATIONS
from kvjax.spec import WEIGHT_BITS

AGAINST = ("full", *PEERS)
STORED = "stored"  # weights as they are
ROUNDS = {"serve": 2, "peers": 5}  # that are usual, where they are not 7


def decode(p: argparse.ArgumentParser) -> None:
    """Decode speed: methods against the full cache, against transformers, and against the machine's limit.

    --methods full,h2o:20%+store=int4   budgets and arguments of each; the first is what the others are compared with
    --model llama-3-8b                  random weights of that shape; or a checkpoint
    --against full,transformers         compare with these
    --batch max                         as many sequences as fit; then one method after the other, not in turns
    --impose-cr 8                       give dmc and dms a gate with random decisions at that rate
    """
    _model(p)
    p.add_argument("--batch", default="1", metavar="N", help="sequences, or max = as many as fit (default: 1)")
    p.add_argument("--memory", metavar="SIZE", help="of the device, for --batch max (default: what the device says)")
    p.add_argument("--steps", type=int, default=16, help="tokens per turn (default: 16)")
    p.add_argument(
        "--prefill",
        choices=("real", "cheap"),
        default="real",
        help="what fills the cache: the model, or a narrow one of the same cache, in a fraction of the time",
    )
    command.add_mesh_flag(p)
    p.add_argument(
        "--weights", default=STORED, metavar="A,B", help=f"{STORED}, {', '.join(WEIGHT_BITS)}: several take turns"
    )
    p.add_argument("--impose-cr", type=float, metavar="CR", help="tokens per slot of dmc and dms on random weights")
    p.add_argument("--against", default="", metavar="A,B", help=f"compare with: {', '.join(AGAINST)}")
    p.add_argument("--transformers", action="store_true", help="short for --against transformers")
    p.add_argument("--compile", type=int, metavar="LAYERS", help="only time the compilation of so many tiny layers")


def prefill(p: argparse.ArgumentParser) -> None:
    """Prompts: tokens per second, and what a method's scores and compression add to attention's own time.

    The full cache and attention alone always take part: `added` is (time - the full cache's) over attention's, of all
    layers.
    """
    _model(p, contexts="4096")
    p.add_argument("--batch", type=int, default=1, help="sequences (default: 1)")
    p.add_argument("--against", default="", metavar="A,B", help=f"compare with: {', '.join(PEERS)}")


def peers(p: argparse.ArgumentParser) -> None:
    """Methods beside transformers and llama.cpp: the same weights and prompts, decoding and reading, in turns.

    --methods full,full+store=int8          budgets and arguments of each
    --against transformers,llama.cpp+q8_0   compare with these, where they can run (default: with all)
    --measure decode --prefill cheap        only decoding, behind prompts that a narrow model reads

    llama.cpp runs through node-llama-cpp (npm install node-llama-cpp) in a folder that KVJAX_LLAMA_CPP names; + says
    its cache's format (default: f16). It is given our weights in float32, and reads each prompt itself.
    """
    _model(p, contexts="1024,4096", methods="full")
    p.add_argument("--steps", type=int, default=16, help="tokens per turn of decoding (default: 16)")
    p.add_argument("--measure", default="prefill,decode", metavar="A,B", help="(default: prefill,decode)")
    p.add_argument("--prefill", choices=("real", "cheap"), default="real", help="what fills caches, as for decode")
    p.add_argument("--against", default=",".join(PEERS), metavar="A,B", help=f"(default: {','.join(PEERS)})")


def kernels(p: argparse.ArgumentParser) -> None:
    """Kernels: time, share of the machine's limit, how many times as fast as plain XLA and other libraries.

    --shapes llama-3-8b:32768:16        model, context [tokens] and batch; several with commas
    --all                               every kernel and store at the shapes of three models, 4,096 to 131,072 tokens

    What a kernel cannot do is said, and other libraries take part where they are installed.
    """
    _cases(p)
    p.add_argument("--all", action="store_true", help="every kernel, store and shape")
    p.add_argument(
        "--implementations",
        default="xla,auto",
        metavar="A,B",
        help=f"{', '.join(IMPLEMENTATIONS)}; the first is what others are compared with (default: xla,auto)",
    )
    p.add_argument("--check", action="store_true", help="only compare results with the reference's")
    names = ", ".join([*ATTENTION, "attention"])
    p.add_argument("--against", metavar="A,B", help=f"{names}, or none (default: all that can run here)")


def tune(p: argparse.ArgumentParser) -> None:
    """Block sizes: the kernels with each of several, and the fastest into the table that the kernels read.

    --shapes llama-3-8b:32768:16 --stores dense,int4     what is tried; a kernel takes the nearest entry of its kind
    --table FILE                                         (default: pallas_kernels/tuning.json)

    A kernel reads FILE if the environment variable PALLAS_KERNELS_TUNING names it. Entries note device, date and
    command.
    """
    _cases(p)
    p.add_argument("--implementation", choices=tuple(IMPLEMENTATIONS), default="auto", help="(default: the platform's)")
    p.add_argument("--table", type=Path, metavar="FILE", help="(default: what the kernels read)")


def convert(p: argparse.ArgumentParser) -> None:
    """Conversion: bytes per second and peak memory, of a checkpoint with random weights that is written first.

    Each conversion runs in a process of its own, beside a copy of the same files, which is what the disk can do.
    """
    p.add_argument("--model", default=DEFAULT, metavar="M", help=f"random: {', '.join(SHAPES)}")
    p.add_argument("--dtypes", default="bfloat16", metavar="A,B", help=f"to convert to: {', '.join(STORED_DTYPES)}")
    p.add_argument("--folder", type=Path, metavar="DIR", help="for the checkpoints (default: a temporary one)")


def serve(p: argparse.ArgumentParser) -> None:
    """Requests that come and go: what methods make of the same bytes of cache, and transformers' continuous batching.

    --methods full,h2o:20%,full+store=int4   budgets and arguments of each; the others are compared with the first
    --prompt-tokens 2000-3000 --new-tokens 512-1024   of each request, drawn evenly
    --pool 4       the cache of all has the bytes of so many longest requests in full
    --clients 8    closed loop: so many ask, one request after the other (default: all requests at once)
    --loads 0.5,1  open loop, too: requests arrive at random, at so many times the first method's closed loop's rate
    --against transformers   its continuous batching, in pages of the same bytes

    Each method has as many seats as these bytes have room for, --seats at most. "reading" is the share of busy time
    that prompts take, which no method shortens: where it nears 100%, more compression gains nothing. Latencies count
    from the moment at which a request was to arrive; a gap is the time between two pieces of a text.
    """
    p.add_argument("--model", default="demo", metavar="M", help=f"a checkpoint, or random: {', '.join(SHAPES)}")
    p.add_argument(
        "--methods", default="full,h2o:20%,h2o:5%", metavar="A,B:20%", help="(default: full,h2o:20%%,h2o:5%%)"
    )
    command.add_store_flags(p)
    p.add_argument("--dtype", choices=DTYPES, help="(default: float32 on CPU, else bfloat16)")
    p.add_argument("--prompt-tokens", default="200-400", metavar="N-M", help="(default: 200-400)")
    p.add_argument("--new-tokens", default="32-64", metavar="N-M", help="(default: 32-64)")
    p.add_argument("--requests", type=int, default=12, metavar="N", help="of a round (default: 12)")
    p.add_argument("--clients", type=int, metavar="N", help="that ask in a closed loop (default: as many as requests)")
    p.add_argument("--loads", default="", metavar="X,Y", help="of open loops, in rates of the first")
    p.add_argument("--pool", type=int, default=2, metavar="N", help="longest requests of the cache (default: 2)")
    p.add_argument("--seats", type=int, default=16, metavar="N", help="most of a method (default: 16)")
    p.add_argument("--stall", type=float, default=0.1, metavar="S", help="as for kvjax.serve (default: 0.1)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the requests (default: 0)")
    p.add_argument("--against", default="", choices=("", "transformers"), help="compare with this, too")


def device(p: argparse.ArgumentParser) -> None:
    """All that decides on a GPU or TPU in one call: other commands of bench, each in a process of its own.

    In order of importance: results of every kernel against the reference's, decode attention of each store at 4k to
    128k, whole steps of a model with eight billion parameters, as many sequences as fit into equal bytes, kernels of
    prompts, prompts.
    Each has its share of the minutes. What fails, hangs or is killed is said, and the next stage begins; what it had
    measured stays.

    Writes DIR/device.json and DIR/device.md, a page for docs/results, after every stage.
    """
    p.add_argument("--minutes", type=float, default=8.0, metavar="N", help="in all (default: 8)")
    p.add_argument("--sizes", choices=("tiny", "full"), help="(default: tiny on CPU, else full)")
    p.add_argument("--stages", metavar="A,B", help=f"{', '.join(STAGES)} (default: all)")
    p.set_defaults(out=Path("device"))


def _model(p: argparse.ArgumentParser, contexts: str = "4096,16384", methods: str = "full,snapkv:10%") -> None:
    """Which model, which methods, how long."""
    p.add_argument("--model", default=DEFAULT, metavar="M", help=f"a checkpoint, or random: {', '.join(SHAPES)}")
    p.add_argument(
        "--methods", default=methods, metavar="A,B:20%", help="such as h2o:20%%+store=int4: a budget and arguments"
    )
    command.add_store_flags(p)
    p.add_argument("--contexts", default=contexts, metavar="N,M", help=f"prompt tokens (default: {contexts})")
    p.add_argument("--dtype", choices=DTYPES, help="(default: float32 on CPU, else bfloat16)")


def _cases(p: argparse.ArgumentParser) -> None:
    """Which kernels, stores, shapes."""
    p.add_argument("--kernels", metavar="A,B", help=f"{', '.join(KERNELS)} (default: all)")
    p.add_argument("--stores", metavar="A,B", help=f"of decode_attention: {', '.join(STORES)} (default: all)")
    p.add_argument(
        "--shapes", metavar="M:N:B,..", help=f"model:context:batch (default: {SMALL} on CPU, else {LARGE}; see below)"
    )
    p.add_argument("--dtype", choices=DTYPES, help="(default: float32 on CPU, else bfloat16)")
    p.epilog = f"models: {', '.join(SHAPES)}; kernels of prompts take a batch of one"
