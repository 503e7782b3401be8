"""The interface carries what the five papers need: five throw-away policies in the real prefill and decode loop.

Each needs something that one of the papers needs, is compared with a brute-force decoder, and compiles decode once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import layout, quantize
from kvjax.cache import tier as tiers_
from kvjax.cache.store import KVStore, Store
from kvjax.cache.tier import Slots
from kvjax.generation import decode, prefill, sampling
from kvjax.generation.allocate import init_cache
from kvjax.policies import score
from kvjax.policies.base import CachePolicy, PrefillOutput, Recipe
from kvjax.policies.budgets import budget as budgets
from kvjax.policies.select import retain
from kvjax.spec import Lengths
from tests.lib.oracle import Entry, Oracle, entries, random_model

PROMPTS, NEW = (41, 29), 20


class Run(NamedTuple):
    """What a policy did with a batch."""

    prompts: list[list[int]]
    tokens: np.ndarray  # [B NEW]
    prefilled: layout.Cache  # a copy of the cache after prefill
    cache: layout.Cache


@pytest.fixture(scope="module")
def model():
    return random_model(0)


def run(model, recipe: Recipe, seed: int = 0) -> Run:
    """Greedy generation for two prompts of different lengths through the jitted loop, in two chunks."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, model.spec.vocab_size, n).tolist() for n in PROMPTS]
    lengths = Lengths(PROMPTS, NEW, prefill.padded_length(max(PROMPTS)))
    padded = np.zeros((len(prompts), lengths.padded), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    length, ends = jnp.asarray(PROMPTS, jnp.int32), decode.ends((), NEW, len(prompts))
    cache = init_cache(model, recipe, lengths)
    logits, cache = prefill.prefill(model, recipe, jnp.asarray(padded), length, cache)
    prefilled = jax.tree.map(jnp.copy, cache)
    chooser = sampling.chooser(sampling.Sampling(), len(prompts))
    state = decode.first_token(logits, cache, length, chooser, ends, jnp.zeros(logits.shape, bool))
    tokens = [np.asarray(state.token)[:, None]]
    for _ in range(2):
        state, out, _ = decode.decode_loop(model, state, chooser, ends, recipe=recipe, chunk=16)
        tokens.append(np.asarray(out))
    chosen = np.concatenate(tokens, axis=1)
    return Run(prompts, chosen[:, :NEW], prefilled, state.cache)


def check_row(tier: tiers_.Tier, layer: int, b: int, k: int, row: list[Entry], decode_codes=None, raw=False):
    """A row holds the same tokens as the oracle's, wherever they stand.

    Numbers halfway between two codes, which `decode_codes` turns back, are rounded to either, to the bits of bfloat16.
    """
    view = tiers_.layer(tier, layer)
    n = int(view.length[b, k])
    slots = tiers_.take(view, jnp.broadcast_to(jnp.arange(view.capacity), (*view.length.shape, view.capacity)))
    pos, order = np.asarray(slots.pos)[b, k, :n], np.argsort(np.asarray(slots.pos)[b, k, :n])
    row = sorted(row, key=lambda entry: entry.pos)
    assert pos[order].tolist() == [entry.pos for entry in row]
    for got, want in ((slots.k, "raw" if raw else "key"), (slots.v, "value")):
        stored = np.asarray(got if decode_codes is None else decode_codes(got)).astype(np.float64)[b, k, :n][order]
        rtol = 1e-7 if decode_codes is None else 2.0**-7
        np.testing.assert_allclose(stored, np.stack([getattr(entry, want) for entry in row]), rtol=rtol, atol=2e-4)


class Counted:
    """Counts how often a function of a policy is traced."""

    def __init__(self):
        self.calls = 0

    def __call__(self, function):
        def counted(*args):
            self.calls += 1
            return function(*args)

        return counted


def uniform_tier(spec, layers, lengths, dtype, *, row: int, codec: KVStore, scores: bool = False) -> tiers_.Tier:
    """A tier with room for `row` slots in every row."""
    rows = len(layers.index) * len(lengths.prompt) * spec.num_kv_heads
    return tiers_.init(
        layers=len(layers.index), batch=len(lengths.prompt), heads=spec.num_kv_heads, row=row,
        slots=rows * -(-row // 8) * 8, widths=layers.widths, store=codec, dtype=dtype, scores=scores,
    )  # fmt: skip


def keep_all(tier: tiers_.Tier, prompt) -> tiers_.Tier:
    """Every prompt token in a slot of its own."""
    n = min(prompt.key.shape[1], tier.capacity)
    slot = jnp.broadcast_to(jnp.arange(n), (*tier.length.shape, n))
    k, v = (jnp.moveaxis(x, 2, 1)[:, :, :n] for x in (prompt.key, prompt.value))
    tier = tiers_.reserve(tier, jnp.broadcast_to(prompt.length[:, None], tier.length.shape), n)
    return tiers_.put(tier, slot, Slots(k, v, slot), slot < prompt.length[:, None, None])


def one(token) -> tuple[jax.Array, Slots]:
    """A decoded token as one slot per row, and where it may be written."""
    rows = token.key.shape[:2]
    pos = jnp.broadcast_to(token.pos[:, None, None], (*rows, 1))
    slots = Slots(token.key[:, :, None], token.value[:, :, None], pos, jnp.zeros(pos.shape, jnp.float32))
    return jnp.broadcast_to(token.active[:, None, None], pos.shape), slots


def test_a_recipe_cannot_contradict_its_policy():
    keep, store = budgets.uniform(), quantize.named("int4")
    recipe = Recipe("own", retain(score.accumulated(0.5), keep, store=store, evict="after"))
    assert recipe.budget is keep and recipe.stores == (store,)
    assert not {"budget", "stores"} & set(Recipe._fields)


def test_budgets_per_layer_are_decided_after_the_prompt_inside_jit(model):
    """D2O and DynamicKV: a fixed sum is split over layers by what the prompt's attention looked like."""
    counted, spec = Counted(), model.spec
    base = retain(score.window(4, 3, "avg"), budgets.uniform(), evict="never")

    def prefill(tiers, prompt):
        tiers, _ = base.prefill(tiers, prompt)
        real = jnp.arange(prompt.lse.shape[-1]) < prompt.length[:, None, None]
        return tiers, PrefillOutput(jnp.std(prompt.lse, axis=(1, 2), where=real))

    def allocate(infos, seen, length, held, given):
        share = jax.nn.softmax(jnp.stack(infos), axis=0)  # L B
        slots = jnp.clip((share * 10 * len(infos)).astype(jnp.int32), 4, 24)
        return jnp.broadcast_to(slots[..., None], (*slots.shape, spec.num_kv_heads))

    budget = budgets.Budget(slots=budgets.uniform().slots, allocate=allocate)
    policy = base._replace(prefill=prefill, insert=counted(base.insert), budget=budget)
    recipe = Recipe("budgets", policy, amounts=budgets.amounts(24))
    splits = set()
    for seed in range(3):
        got = run(model, recipe, seed)
        (tier,), (before,) = got.cache[0], got.prefilled[0]
        slots = np.asarray(before.budget)[..., 0]  # L B
        splits.add(slots.tobytes())
        assert (np.asarray(before.length) == slots[..., None]).all()
        assert (np.asarray(tier.length) == slots[..., None] + NEW - 1).all()
        held = -(-np.asarray(before.length) // before.page)
        assert int(before.num_free[0]) == before.free.shape[0] - held.sum()  # what was trimmed is free again
        for b, prompt in enumerate(got.prompts):
            oracle = Oracle(model)
            oracle.prefill(prompt, lambda layer, p, n=slots[:, b]: _window_choice(p, n[layer]))
            for step, token in enumerate(got.tokens[b][:-1]):
                logits = oracle.decode(int(token), len(prompt) + step, _append)
                assert int(logits.argmax()) == got.tokens[b][step + 1]
            for layer in range(spec.num_layers):
                for k in range(spec.num_kv_heads):
                    check_row(tier, layer, b, k, oracle.rows[layer][k])
    assert len(splits) > 1
    assert counted.calls == 1  # equal layers are a loop on CPUs


def _window_choice(prompt, n: int) -> list[list[Entry]]:
    """The last 4 tokens and the best of the others by pooled window attention, n in all."""
    t, heads = prompt.key.shape[0], prompt.key.shape[1]
    votes = prompt.probs[:, -4:].sum(axis=1).reshape(heads, -1, t).mean(axis=1)
    votes[:, t - 4 :] = 0
    votes = np.pad(votes, ((0, 0), (1, 1)))
    pooled = (votes[:, :-2] + votes[:, 1:-1] + votes[:, 2:]) / 3
    rows = []
    for k in range(heads):
        best = sorted(range(t - 4), key=lambda j, k=k: (-pooled[k, j], j))[: n - 4]
        rows.append(entries(prompt, k, [*best, *range(t - 4, t)]))
    return rows


def _append(layer, rows, new, q):
    for row, entry in zip(rows, new, strict=True):
        row.append(entry)


def test_rows_of_one_layer_grow_at_different_rates(model):
    """DMC: each head decides at each step whether to append or to accumulate into its last slot."""
    counted, spec = Counted(), model.spec

    def init(spec, layers, lengths, dtype, amounts):
        row = max(lengths.prompt) + lengths.new
        return (uniform_tier(spec, layers, lengths, dtype, row=row, codec=KVStore()),)

    @counted
    def insert(tiers, token):
        (tier,) = tiers
        where, new = one(token)
        top = jnp.maximum(tier.length - 1, 0)[..., None]
        old = tiers_.take(tier, top)
        merge = (token.k[..., -1] > 0)[..., None]
        k, v = (jnp.where(merge[..., None], (a + b) / 2, b) for a, b in ((old.k, new.k), (old.v, new.v)))
        return (tiers_.put(tier, jnp.where(merge, top, tier.length[..., None]), new._replace(k=k, v=v), where),)

    def mirror(layer, rows, new, q):
        for row, entry in zip(rows, new, strict=True):
            if entry.raw[-1] > 0:
                old = row.pop()
                entry.key, entry.value = (old.key + entry.key) / 2, (old.value + entry.value) / 2
            row.append(entry)

    policy = CachePolicy(
        (KVStore(),), init, lambda tiers, prompt: ((keep_all(tiers[0], prompt),), PrefillOutput()), insert
    )
    got = run(model, Recipe("accumulate", policy))
    (tier,) = got.cache[0]
    grown = np.asarray(tier.length) - np.asarray(PROMPTS)[:, None]
    assert len(np.unique(grown)) > 3 and grown.max() < NEW  # rows differ, within a layer too
    assert any(len(np.unique(grown[layer, b])) > 1 for layer in range(spec.num_layers) for b in range(2))
    _compare(model, got, mirror, lambda oracle, layer, b, k: check_row(tier, layer, b, k, oracle.rows[layer][k]))
    assert counted.calls == 1  # equal layers are a loop on CPUs


def _everything(layer, prompt) -> list[list[Entry]]:
    return [entries(prompt, k, range(prompt.key.shape[0])) for k in range(prompt.key.shape[1])]


def _compare(model, got: Run, insert, check, select=_everything, **how) -> None:
    """The oracle chooses the same tokens, and its rows pass `check`."""
    for b, prompt in enumerate(got.prompts):
        oracle = Oracle(model)
        logits = oracle.prefill(prompt, select)
        assert int(logits.argmax()) == got.tokens[b][0]
        for step, token in enumerate(got.tokens[b][:-1]):
            logits = oracle.decode(int(token), len(prompt) + step, insert, **how)
            assert int(logits.argmax()) == got.tokens[b][step + 1]
        for layer in range(model.spec.num_layers):
            for k in range(model.spec.num_kv_heads):
                check(oracle, layer, b, k)


def test_a_victim_is_merged_into_another_slot_before_it_is_overwritten(model):
    """D2O: the oldest token is averaged into its most similar slot, then its own slot takes the new token."""
    counted, keep = Counted(), 24

    def init(spec, layers, lengths, dtype, amounts):
        return (uniform_tier(spec, layers, lengths, dtype, row=keep, codec=KVStore()),)

    def prefill(tiers, prompt):
        (tier,) = tiers
        start = jnp.maximum(prompt.length - keep, 0)[:, None, None]
        at = start + jnp.broadcast_to(jnp.arange(keep), (*tier.length.shape, keep))
        k, v = (jnp.take_along_axis(jnp.moveaxis(x, 2, 1), at[..., None], axis=2) for x in (prompt.key, prompt.value))
        tier = tiers_.reserve(tier, jnp.full(tier.length.shape, keep), keep)
        return (tiers_.put(tier, at - start, Slots(k, v, at), at < prompt.length[:, None, None]),), PrefillOutput()

    @counted
    def insert(tiers, token):
        (tier,) = tiers
        where, new = one(token)
        pos = tiers_.positions(tier)
        victim = jnp.argmin(jnp.where(pos < 0, 10**6, pos), axis=-1)[..., None]
        slots = tiers_.take(tier, jnp.broadcast_to(jnp.arange(keep), pos.shape))
        gone = tiers_.take(tier, victim)
        norm = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
        alike = jnp.sum(norm(slots.k) * norm(gone.k), axis=-1)
        target = jnp.argmax(jnp.where(jnp.arange(keep) == victim, -2.0, alike), axis=-1)[..., None]
        kept = tiers_.take(tier, target)
        tier = tiers_.put(tier, target, kept._replace(k=(kept.k + gone.k) / 2, v=(kept.v + gone.v) / 2), where)
        return (tiers_.put(tier, victim, new, where),)

    def mirror(layer, rows, new, q):
        for row, entry in zip(rows, new, strict=True):
            victim = row.pop(min(range(len(row)), key=lambda i: row[i].pos))
            alike = [e.key @ victim.key / np.linalg.norm(e.key) / np.linalg.norm(victim.key) for e in row]
            target = row[int(np.argmax(alike))]
            target.key, target.value = (target.key + victim.key) / 2, (target.value + victim.value) / 2
            row.append(entry)

    def newest(layer, prompt):
        t = prompt.key.shape[0]
        return [entries(prompt, k, range(t - keep, t)) for k in range(prompt.key.shape[1])]

    got = run(model, Recipe("merge", CachePolicy((KVStore(),), init, prefill, insert)))
    (tier,) = got.cache[0]
    assert (np.asarray(tier.length) == keep).all()
    check = lambda oracle, layer, b, k: check_row(tier, layer, b, k, oracle.rows[layer][k])
    _compare(model, got, mirror, check, select=newest)
    assert counted.calls == 1  # equal layers are a loop on CPUs


def test_a_second_tier_receives_what_the_first_gives_up(model):
    """MiKV: when the exact tier is full, the token with the least attention moves to the bfloat16 tier."""
    counted, keep = Counted(), 24
    rounding = Store(
        init=lambda pages, page, width, dtype: jnp.zeros((pages, page, width), jnp.bfloat16),
        encode=lambda x: x.astype(jnp.bfloat16),
        decode=lambda codes, dtype: codes.astype(dtype),
        name="bfloat16",
    )
    low = KVStore(rounding, rounding)

    def init(spec, layers, lengths, dtype, amounts):
        row = max(lengths.prompt) + lengths.new
        high = uniform_tier(spec, layers, lengths, dtype, row=keep + 1, codec=KVStore(), scores=True)
        return high, uniform_tier(spec, layers, lengths, dtype, row=row, codec=low)

    def prefill(tiers, prompt):
        high, second = tiers
        t = prompt.key.shape[1]
        pos = jnp.broadcast_to(jnp.arange(t), (*high.length.shape, t))
        start = (prompt.length - keep)[:, None, None]
        k, v = (jnp.moveaxis(x, 2, 1) for x in (prompt.key, prompt.value))
        inside = pos < prompt.length[:, None, None]
        exact = Slots(k, v, pos, jnp.zeros(pos.shape, jnp.float32))
        high = tiers_.reserve(high, jnp.full(high.length.shape, keep), keep)
        second = tiers_.reserve(second, jnp.broadcast_to(start[..., 0], second.length.shape), t)
        high = tiers_.put(high, jnp.maximum(pos - start, 0), exact, inside & (pos >= start))
        codes = Slots(*low.encode(k, v, ()), pos)
        return (high, tiers_.put(second, pos, codes, inside & (pos < start))), PrefillOutput()

    def insert(tiers, token):
        where, new = one(token)
        return tiers_.put(tiers[0], tiers[0].length[..., None], new, where), tiers[1]

    @counted
    def observe(tiers, token, probs):
        high, second = tiers
        stat = tiers_.scores(high) + probs[0].sum(axis=2)
        high = tiers_.with_scores(high, stat)
        over = token.active[:, None] & (high.length > keep)
        victim = jnp.argmin(jnp.where(tiers_.positions(high) < 0, jnp.inf, stat), axis=-1)
        moved = tiers_.take(high, victim[..., None])
        codes = Slots(*low.encode(moved.k, moved.v, ()), moved.pos)
        second = tiers_.put(second, second.length[..., None], codes, over[..., None])
        return tiers_.remove(high, victim, over)[0], second

    rounded = lambda x: np.asarray(jnp.asarray(x, jnp.float32).astype(jnp.bfloat16).astype(jnp.float32), np.float64)

    def demote(entry: Entry) -> Entry:
        return Entry(entry.pos, rounded(entry.key), entry.raw, rounded(entry.value), stat=np.inf)

    def select(layer, prompt):
        t = prompt.key.shape[0]
        rows = [entries(prompt, k, range(t)) for k in range(prompt.key.shape[1])]
        return [[demote(e) if e.pos < t - keep else e for e in row] for row in rows]

    def learn(layer, rows, probs):
        for row, p in zip(rows, probs, strict=True):
            for entry, mass in zip(row, p.sum(axis=0), strict=True):
                entry.stat += mass
            if sum(np.isfinite(e.stat) for e in row) > keep:
                worst = min(range(len(row)), key=lambda i: row[i].stat)
                row[worst] = demote(row[worst])

    policy = CachePolicy((KVStore(), low), init, prefill, insert, observe)
    got = run(model, Recipe("demote", policy))
    high, second = got.cache[0]
    seen = np.asarray(PROMPTS)[:, None] + NEW - 1
    assert (np.asarray(high.length) + np.asarray(second.length) == seen).all()
    assert jax.tree.leaves(second.k)[0].dtype == jnp.bfloat16

    def check(oracle, layer, b, k):
        row = oracle.rows[layer][k]
        check_row(high, layer, b, k, [e for e in row if np.isfinite(e.stat)])
        check_row(second, layer, b, k, [e for e in row if np.isinf(e.stat)], lambda x: x.astype(jnp.float32))

    _compare(model, got, _append, check, select=select, observe=learn)
    assert counted.calls == 1  # equal layers are a loop on CPUs


def _rotate(spec, x: np.ndarray, pos: int) -> np.ndarray:
    half = spec.head_dim // 2
    angle = pos * spec.rope.theta ** (-np.arange(half) / half)
    a, b = x[:half], x[half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)])
