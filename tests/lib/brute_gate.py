"""DMC and DMS token by token, as the papers' algorithms read: lists of slots, float64, loops.

A prompt is read layer by layer, so that what a full cache forces can be chosen over a whole layer; within a layer every
token first changes its rows and then attends to them, as in decoding. Nothing is computed at once for all tokens.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from kvjax.cache.layout import Tiers
from kvjax.models.decoder import Decoder
from kvjax.policies.base import Recipe
from kvjax.spec import GateSpec
from tests.lib.oracle import Entry, Oracle, random_model, run


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@dataclasses.dataclass
class Row:
    """One row's slots, and what it remembers beside them."""

    slots: list[Entry] = dataclasses.field(default_factory=list)
    segment: list[tuple[float, np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)  # dmc
    flags: dict[int, bool] = dataclasses.field(default_factory=dict)  # dms: by position
    forced: int = 0


class Gated(Oracle):
    """The decoder of one sequence with a learned gate that borrows the last coordinate; `kept` is its cache, `[L][K]`.

    Args:
      model: the decoder.
      room: slots that all rows may fill together; None = as many as they ask for.
      new: tokens that will follow the prompt: half of their even share is left to them.
    """

    def __init__(self, model: Decoder, room: int | None = None, new: int = 0):
        super().__init__(model)
        assert self.spec.gate is not None and self.spec.gate.neuron == -1
        self.gate, self.room, self.new = self.spec.gate, room, new
        self.kept = [[Row() for _ in range(self.spec.num_kv_heads)] for _ in range(self.spec.num_layers)]
        self.closest = np.inf  # the smallest distance of a logit from its threshold
        self.tokens = 0

    def gated(self, layer: int, x: np.ndarray) -> tuple[np.ndarray, ...]:
        """Queries, keys and values without the borrowed coordinate; logits and weights `[... K]`."""
        q, k, v = self._project(layer, x)
        gate, group = self.gate, self.spec.group_size
        asked = q[..., -1].reshape(*q.shape[:-2], -1, group)
        q, k = q.copy(), k.copy()
        if gate.objective == "dmc":
            logit = gate.scale * k[..., -1] - gate.offset
            weight = sigmoid(asked.mean(axis=-1) + gate.offset) + np.finfo(np.float32).eps
            q[..., -1] = k[..., -1] = 0
        else:
            logit = gate.scale * asked[..., 0] - gate.offset
            weight = np.ones(logit.shape)
            q[..., ::group, -1] = 0
        self.closest = min(self.closest, np.abs(logit).min())
        return q, k, v, logit, weight

    def silent(self, q: np.ndarray) -> np.ndarray:
        """Rotated queries without the borrowed coordinate."""
        q = q.copy()
        q[..., :: 1 if self.gate.objective == "dmc" else self.spec.group_size, -1] = 0
        return q

    def prompt(self, tokens: Sequence[int]) -> np.ndarray:
        """Read a prompt; logits after its last token [V]."""
        x, n = self.weights["embedding"][np.asarray(tokens)], len(tokens)
        left = self._allowances(n)
        for layer in range(self.spec.num_layers):
            q, k, v, logit, weight = self.gated(layer, x)
            forced = self._forced(logit, n, next(left))
            heads = np.zeros(q.shape)
            for t in range(n):
                for h, row in enumerate(self.kept[layer]):
                    self._change(row, t, k[t, h], v[t, h], logit[t, h] > 0, forced[t, h], weight[t, h])
                heads[t] = self._attend_rows(layer, q[t], t)
            x = self._finish(layer, x, heads)
        self.tokens = n
        return self._logits(x[-1])

    def read(self, token: int) -> np.ndarray:
        """Read one more token; logits after it [V]."""
        x, t = self.weights["embedding"][token], self.tokens
        rows = [row for layer in self.kept for row in layer]
        free = np.inf if self.room is None else self.room - sum(len(row.slots) for row in rows)
        may = {id(row): i < free for i, row in enumerate(rows)}
        for layer, kept in enumerate(self.kept):
            q, k, v, logit, weight = self.gated(layer, x)
            for h, row in enumerate(kept):
                self._change(row, t, k[h], v[h], logit[h] > 0, not may[id(row)], weight[h])
            x = self._finish(layer, x, self._attend_rows(layer, q, t))
        self.tokens += 1
        return self._logits(x)

    def _allowances(self, n: int):
        """Slots that each layer of the prompt may fill, one after the other."""
        layers, heads = self.spec.num_layers, self.spec.num_kv_heads
        if self.room is None:
            while True:
                yield None
        least = heads * min(n, self._least())
        first = max(self.room - self.room * self.new // (2 * (n + self.new)), layers * least)
        floor = max(first // (2 * layers), least)
        left = first - (layers - 1) * floor
        for layer in range(layers):
            yield left
            left += floor - sum(len(row.slots) for row in self.kept[layer])

    def _least(self) -> int:
        return 1 if self.gate.objective == "dmc" else self.gate.window + 1

    def _forced(self, logit: np.ndarray, n: int, allowed: int | None) -> np.ndarray:
        """`[T K]`: which tokens get no slot although they ask, or have to take one that would have stayed."""
        forced = np.zeros(logit.shape, bool)
        if allowed is None:
            return forced
        delay = 0 if self.gate.objective == "dmc" else self.gate.window
        # dmc: token t asks at t. dms: token t - window - 1 asks to stay at t, by the logit of the token after it.
        asking = [(t, h) for t in range(1 + delay, n) for h in range(logit.shape[1]) if logit[t - delay, h] <= 0]
        asking.sort(key=lambda at: (logit[at[0] - delay, at[1]], at[1], at[0]))
        for at in asking[max(allowed - logit.shape[1] * min(n, self._least()), 0) :]:
            forced[at] = True
        return forced

    def _change(self, row: Row, t: int, k, v, decision: bool, forced: bool, weight: float) -> None:
        """What a token does to its row. Where it asks for nothing, `forced` changes nothing."""
        if self.gate.objective == "dms":
            self._delay(row, t, k, v, decision, forced)
            return
        if forced and not decision:
            row.forced += 1
        if t > 0 and (decision or forced):
            row.slots.pop()
        else:
            row.segment = []
        row.segment.append((weight, k, v))
        newest = row.segment[-self.gate.window :]  # all of them if the window is 0
        total = sum(w for w, _, _ in newest)
        mean_k, mean_v = (sum(part[0] * part[i] for part in newest) / total for i in (1, 2))
        row.slots.append(Entry(t, self.rotate(mean_k[None], t)[0], mean_k, mean_v))

    def _delay(self, row: Row, t: int, k, v, decision: bool, forced: bool) -> None:
        row.flags[t - 1] = decision
        old = t - self.gate.window - 1
        if old >= 0 and (row.flags[old] or forced):
            row.forced += not row.flags[old]
            row.slots = [entry for entry in row.slots if entry.pos != old]
        row.slots.append(Entry(t, self.rotate(k[None], t)[0], k, v))

    def _attend_rows(self, layer: int, q: np.ndarray, t: int) -> np.ndarray:
        rows = [row.slots for row in self.kept[layer]]
        q = self.silent(self.rotate(q, t)).reshape(self.spec.num_kv_heads, self.spec.group_size, -1)
        window, out = self.spec.window(layer) or t + 1, []
        for row, group in zip(rows, q, strict=True):
            seen = [entry for entry in row if entry.pos > t - window]
            logits = group @ np.stack([entry.key for entry in seen]).T / np.sqrt(self.spec.head_dim)
            weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
            out.append(weights / weights.sum(axis=-1, keepdims=True) @ np.stack([entry.value for entry in seen]))
        return np.concatenate(out)


@functools.cache
def gated_model(objective: str, window: int, heads: int, offset: float, **fields) -> Decoder:
    """A random model whose gate closes the more, the larger the offset; its cache has room for everything."""
    gate = GateSpec(objective, 1.0, window, offset=offset)
    return random_model(1, num_layers=2, num_kv_heads=heads, gate=gate, **fields)


def tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
    """Random token ids `[batch length]`."""
    return np.random.default_rng((length, seed)).integers(0, 97, (batch, length))


def compare(model: Decoder, recipe: Recipe, lengths: Sequence[int], new: int) -> tuple[Tiers, list[Gated]]:
    """kvjax and the plain decoder over a batch: the same positions in every row after every token, the same logits.

    Returns:
      kvjax's tiers in the end, and a decoder per sequence.
    """
    prompts, after = [tokens(1, n)[0].tolist() for n in lengths], tokens(len(lengths), new, seed=1)
    logits, positions, (tiers, *others) = run(model, recipe, prompts, after)
    room = np.asarray(tiers[0].state.max_slots)[0, :, 0]
    oldest = lambda layer, now: now + 1 - (model.spec.window(layer) or now + 1)  # that the next token can read
    oracles = []
    for b, prompt in enumerate(prompts):
        one = Gated(model, None if others else int(room[b]), new)  # layers with other windows have a room of their own
        for step in range(new + 1):
            want = one.read(after[b, step - 1]) if step else one.prompt(prompt)
            assert np.abs(logits[step, b] - want).max() <= 1e-5 * np.abs(want).max()
            for layer, rows in enumerate(one.kept):
                first = oldest(layer, len(prompt) + step)
                kept = [sorted(entry.pos for entry in row.slots if entry.pos >= first) for row in rows]
                assert [[pos for pos in row if pos >= first] for row in positions[step][b][layer]] == kept
        assert one.closest > 1e-5, "a logit is too close to its threshold: try other seeds"
        oracles.append(one)
    return tiers, oracles


def compression(oracles: Sequence[Gated]) -> float:
    """Tokens per slot, over all sequences."""
    rows = [(one.tokens, len(row.slots)) for one in oracles for layer in one.kept for row in layer]
    seen, slots = map(sum, zip(*rows, strict=True))
    return seen / slots


def forced(tiers: Tiers, oracles: Sequence[Gated]) -> int:
    """How many tokens were refused a slot; raises if the plain decoders have others."""
    counted = np.asarray(tiers[0].state.forced)
    for b, one in enumerate(oracles):
        assert counted[:, b].tolist() == [[row.forced for row in layer] for layer in one.kept]
    return int(counted.sum())
