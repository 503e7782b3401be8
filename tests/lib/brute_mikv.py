"""MiKV (arXiv 2402.18096) and KIVI (arXiv 2402.02750): loops over float64 numbers, on top of `oracle`.

Rounding to a few bits is not continuous: numbers that differ by 1e-6 between float32 and float64 may get neighbouring
codes, scales or zero points, and a test rounds tens of thousands of numbers. No seed avoids all numbers that are that
close. Therefore `quantise` is told what the library made of the same numbers. Where its own, moved by no more than
`NEAR`, have several roundings, which is one number in fifty, it takes the library's; elsewhere the library has no say.

A choice of tokens that float32 could make differently is an error of the test ("too close"): choose another seed.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tests.lib.brute import exact, read
from tests.lib.oracle import Entry, LayerPrompt, Oracle, Rows, entries, softmax
from tests.test_methods import append, best, grouped, tokens

NEAR = 1e-5  # of a vector's largest number


class Theirs(NamedTuple):
    """What the library holds of one sequence in one tier of one layer, decoded (balanced keys as they are)."""

    pos: np.ndarray  # [K S]
    key: np.ndarray  # [K S H]
    value: np.ndarray  # [K S H]

    def at(self, k: int, positions: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values `[n H]` of tokens; nan for those that are not there."""
        slots = [np.flatnonzero(self.pos[k] == p) for p in positions]
        read = lambda x: np.array([x[k, s[0]] if len(s) else np.full(x.shape[-1], np.nan) for s in slots], np.float64)
        return read(self.key).reshape(-1, self.key.shape[-1]), read(self.value).reshape(-1, self.value.shape[-1])


Moment = list[list[Theirs]]  # [L][tiers]


# Numbers


def bfloat16(x: np.ndarray, toward: float) -> np.ndarray:
    """The nearest number of 8 significant bits that is not on the other side of x."""
    unit = 2.0 ** (np.frexp(x)[1] - 8)
    return (np.floor(x / unit) if toward < 0 else np.ceil(x / unit)) * unit


def round_trip(x: np.ndarray, bits: int, least: np.ndarray, most: np.ndarray, off: np.ndarray) -> np.ndarray:
    """Numbers `[... group]` that share a scale and a zero point, encoded and decoded.

    `least`, `most` and `off` are added to the smallest number, to the largest, and to all where codes are rounded.
    """
    zero = bfloat16(x.min(axis=-1, keepdims=True) + least, -np.inf)
    scale = bfloat16((x.max(axis=-1, keepdims=True) + most - zero) / (2**bits - 1), np.inf)
    codes = np.round((x + off - zero) / np.where(scale == 0, 1, scale))
    return zero + scale * np.clip(codes, 0, 2**bits - 1)


def quantise(x: np.ndarray, bits: int, group: int, theirs: np.ndarray, *, decoded: bool = False) -> np.ndarray:
    """Vectors `[... n]` after a round trip in groups of neighbours; of several possible roundings, `theirs`.

    `decoded`: the vectors were decoded from codes. Both sides have the same numbers and hence zero points, but a
    quotient may be exactly between two codes, and a scale exactly a bfloat16.
    """
    near = NEAR * np.abs(x).max(axis=-1)[..., None, None]
    groups, options = x.reshape(*x.shape[:-1], -1, group), []
    for of_range, off in itertools.product((0 * near, -near, near), repeat=2):
        least = 0 * near if decoded else of_range
        options.append(round_trip(groups, bits, least, of_range, off).reshape(x.shape))
    chosen = np.abs(np.stack(options) - theirs).argmin(axis=0)  # the first where all are the same, or theirs is nan
    return np.take_along_axis(np.stack(options), chosen[None], axis=0)[0]


def bits_of(store: str) -> tuple[int, int] | None:
    """Bits of keys and values; None = dense."""
    parts = store.split("/")
    return None if store == "dense" else (int(parts[0].removeprefix("int")), int(parts[-1].removeprefix("int")))


# MiKV


class Row(NamedTuple):
    """The cache of one key/value head."""

    high: list[Entry]  # keys are balanced where the tier is quantised
    low: list[Entry]  # keys are balanced


class MiKV:
    """The callbacks of `Oracle` for one sequence. `theirs` is what the library has after the same step."""

    def __init__(
        self,
        reference: Oracle,
        budget: int | str,
        *,
        recent: float = 0.5,
        store: str = "dense",
        low_store: str = "int2",
        balance: bool = True,
    ):
        self.reference, self.budget, self.recent, self.balanced = reference, budget, recent, balance
        spec = reference.spec
        self.bits = bits_of(store), bits_of(low_store)
        self.balance = np.ones((spec.num_layers, spec.num_kv_heads, spec.head_dim))
        self.theirs: Moment = []

    def slots(self, n: int) -> tuple[int, int]:
        """Tokens in the high tier when there are n, and how many of them are there because they are new."""
        allowed = tokens(self.budget, n)
        return allowed, int(allowed * exact(self.recent))

    def encode(self, tier: int, layer: int, k: int, entry: Entry, *, decoded: bool = False) -> Entry:
        """A token as a quantised tier has it; `decoded`: the other tier's codes were decoded, so it is balanced."""
        group, (key_bits, value_bits) = self.reference.spec.head_dim // 2, self.bits[tier]
        balanced = entry.key if decoded else entry.key * self.balance[layer, k]
        (key,), (value,) = self.theirs[layer][tier].at(k, [entry.pos])
        key = quantise(balanced, key_bits, group, key, decoded=decoded)
        value = quantise(entry.value, value_bits, group, value, decoded=decoded)
        return Entry(entry.pos, key, entry.raw, value, entry.stat)

    def arrive(self, layer: int, k: int, entry: Entry) -> Entry:
        """A token as the high tier has it."""
        return entry if self.bits[0] is None else self.encode(0, layer, k, entry)

    def select(self, layer: int, prompt: LayerPrompt) -> list[Row]:
        n, heads = prompt.key.shape[:2]
        allowed, recent = self.slots(n)
        if self.balanced:
            self.balance[layer] = balance(prompt)
        sums = grouped(prompt.probs.sum(axis=1), heads)
        rows = []
        for k in range(heads):
            row = entries(prompt, k, range(n))
            for entry, total in zip(row, sums[k], strict=True):
                entry.stat = float(total)
            newest = range(max(n - recent, 0), n)
            high = {*best(sums[k, : n - len(newest)], allowed - recent), *newest}
            low = [self.encode(1, layer, k, e) for e in row if e.pos not in high]  # from the exact numbers
            rows.append(Row([self.arrive(layer, k, e) for e in row if e.pos in high], low))
        return rows

    def insert(self, layer: int, rows: list[Row], new: list[Entry], q: np.ndarray) -> None:
        for k, (row, entry) in enumerate(zip(rows, new, strict=True)):
            row.high.append(self.arrive(layer, k, entry))

    def attend(self, layer: int, rows: list[Row], q: np.ndarray, pos: int) -> tuple[np.ndarray, list[np.ndarray]]:
        return attention(self.reference.rotate(q, pos), [self.read(layer, k, row) for k, row in enumerate(rows)])

    def read(self, layer: int, k: int, row: Row) -> tuple[np.ndarray, np.ndarray]:
        """Keys that an unbalanced query may meet, and values: those of the high tier come first."""
        undo = self.balance[layer, k]
        keys = [e.key if self.bits[0] is None else e.key / undo for e in row.high] + [e.key / undo for e in row.low]
        return np.stack(keys), np.stack([e.value for e in (*row.high, *row.low)])

    def observe(self, layer: int, rows: list[Row], probs: list[np.ndarray]) -> None:
        for k, row in enumerate(rows):
            weights = probs[k].mean(axis=0)[: len(row.high)]
            for entry, p in zip(row.high, weights, strict=True):
                entry.stat += float(p)
            now = 1 + max(e.pos for e in row.high)  # the token of this step is one of them
            allowed, recent = self.slots(now)
            if len(row.high) > allowed:
                old = [e for e in row.high if e.pos < now - recent]
                least = old[best(-np.array([e.stat for e in old]), 1)[0]]
                row.high[:] = [e for e in row.high if e is not least]
                row.low.append(self.encode(1, layer, k, least, decoded=self.bits[0] is not None))


def balance(prompt: LayerPrompt) -> np.ndarray:
    """`[K H]`: what makes the largest number of a key's channel that of the queries' channel."""
    _, heads, width = prompt.key.shape
    group, factor = prompt.q.shape[1] // heads, np.ones((heads, width))
    for k in range(heads):
        for c in range(width):
            q = np.abs(prompt.q[:, k * group : (k + 1) * group, c]).max()
            key = np.abs(prompt.key[:, k, c]).max()
            factor[k, c] = min(max(np.sqrt(q / key), 1e-4), 1e4) if q > 0 and key > 0 else 1.0
    return factor


def balances(reference: Oracle, prompt: Sequence[int]) -> np.ndarray:
    """`[L K H]`."""
    return np.stack([balance(layer) for layer in read(reference, prompt)[1]])


def attention(q: np.ndarray, rows: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Queries `[N H]` over the keys and values of the row of their group: outputs `[N H]`, weights `[K][G n]`."""
    queries = q.reshape(len(rows), -1, q.shape[-1])
    probs = [softmax(g @ keys.T / np.sqrt(q.shape[-1])) for g, (keys, _) in zip(queries, rows, strict=True)]
    return np.concatenate([p @ values for p, (_, values) in zip(probs, rows, strict=True)]), probs


# KIVI


class KIVI:
    """As `MiKV`; the rows are those of the full cache, and quantised when they are read."""

    insert, observe = staticmethod(append), None

    def __init__(self, reference: Oracle, bits: int, group: int, residual: int):
        self.reference, self.bits, self.group, self.residual = reference, bits, group, residual
        self.theirs: Moment = []

    def select(self, layer: int, prompt: LayerPrompt) -> Rows:
        return [entries(prompt, k, range(len(prompt.key))) for k in range(prompt.key.shape[1])]

    def attend(self, layer: int, rows: Rows, q: np.ndarray, pos: int) -> tuple[np.ndarray, list[np.ndarray]]:
        return attention(self.reference.rotate(q, pos), [self.read(layer, k, row, pos) for k, row in enumerate(rows)])

    def read(self, layer: int, k: int, row: list[Entry], pos: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values as the token at `pos` sees them."""
        keys, values = np.stack([e.key for e in row]), np.stack([e.value for e in row])
        their_keys, their_values = self.theirs[layer][0].at(k, range(pos))
        flushed, old, width = pos - pos % self.residual, max(pos - self.residual, 0), keys.shape[-1]
        for start in range(0, flushed, self.group):  # a channel's numbers in a run of tokens are a vector
            run = slice(start, start + self.group)
            keys[run] = quantise(keys[run].T, self.bits, self.group, their_keys[run].T).T
        if old:
            values[:old] = quantise(values[:old], self.bits, min(self.group, width), their_values[:old])
        return keys, values


def follow(
    method: MiKV | KIVI, prompt: Sequence[int], continuation: Sequence[int], theirs: Iterable[Moment]
) -> Iterator[tuple[np.ndarray, list]]:
    """Logits of a prompt and of each token of its continuation, and the rows of that moment, which the next changes."""
    reference, rest = method.reference, iter(theirs)
    method.theirs = next(rest)
    yield reference.prefill(prompt, method.select), reference.rows
    for pos, (token, method.theirs) in enumerate(zip(continuation, rest, strict=True), len(prompt)):
        yield reference.decode(int(token), pos, method.insert, method.observe, method.attend), reference.rows
