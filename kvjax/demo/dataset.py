"""Write the demo model's training documents to a file: `python -m kvjax.demo.dataset FILE.jsonl`.

A line per document, `{"tokens": [...]}`, as `python -m kvjax.retrofit --data` reads them. A document is a function of
the seed and its number; its length is one of several, each being equally likely.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kvjax.cli import command
from kvjax.corpus import data
from kvjax.files import output

LENGTHS = (256, 512, 1024, 2048)


def documents(seed: int) -> Iterator[list[int]]:
    """Token ids of documents without end, all of other seeds than the demo model's own training."""
    kinds, shares = list(data.KINDS), np.array([kind.share for kind in data.KINDS.values()])
    number = 0
    while True:
        rng = np.random.default_rng([data.TRAINING, seed, number, 2])
        size = int(rng.choice(LENGTHS))
        room = int(size * 0.95 * (1 - 0.75 * rng.random() ** 2)) - 8
        ids, _ = data.one(str(rng.choice(kinds, p=shares / shares.sum())), rng, room, size)
        yield ids.tolist()
        number += 1


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = command.Parser(prog="kvjax.demo.dataset", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--tokens", type=int, default=8_000_000, help="stop after so many (default: 8000000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    output.check_writable(args.file)
    written = 0
    with args.file.open("w", encoding="utf-8") as file:
        for ids in documents(args.seed):
            file.write(json.dumps({"tokens": ids}) + "\n")
            written += len(ids)
            if written >= args.tokens:
                break
    print(f"{args.file}: {written} tokens")


if __name__ == "__main__":
    command.run("kvjax.demo.dataset", main)
