"""The paged tier against Python lists: random sequences of its operations, with pages to spare and with too few."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvjax.cache import tier as tiers_
from kvjax.cache.quantize import named
from kvjax.cache.store import KVStore
from kvjax.cache.tier import Slots, Tier

B, K, ROW, WIDTH, LAYERS = 2, 2, 32, 3, 2
BLOCK = 11  # most slots per write: more than a page, not a multiple of it
ROWS = B * K

Row = list[int]  # what each slot of a row holds; keys, values, positions and scores all derive from this number


def contents(tags: np.ndarray) -> Slots:
    """Slots `[B K n ...]` that hold `tags`."""
    k = np.repeat(tags[..., None], WIDTH, axis=-1).astype(np.float32)
    return Slots(jnp.asarray(k), jnp.asarray(-k), jnp.asarray(tags, jnp.int32), jnp.asarray(k[..., 0] / 2))


def empty(pool: int) -> Tier:
    """A tier of `pool` pages of 8 slots."""
    widths, store = (WIDTH, WIDTH), KVStore()
    shape = dict(layers=LAYERS, batch=B, heads=K, row=ROW, slots=pool * 8)
    return tiers_.init(**shape, widths=widths, store=store, dtype=jnp.float32, scores=True)


@functools.partial(jax.jit, donate_argnums=0)
def append(tier: Tier, slot, slots: Slots, where) -> Tier:
    old = tiers_.layer(tier, 1)
    new = tiers_.reserve(old, old.length + where.sum(axis=-1, dtype=jnp.int32), BLOCK)
    return tiers_.with_layer(tier, 1, old, tiers_.put(new, slot, slots, where))


@functools.partial(jax.jit, donate_argnums=0)
def overwrite(tier: Tier, slot, slots: Slots, where) -> Tier:
    old = tiers_.layer(tier, 1)
    return tiers_.with_layer(tier, 1, old, tiers_.put(old, slot, slots, where))


@functools.partial(jax.jit, donate_argnums=0)
def trim(tier: Tier, n) -> Tier:
    old = tiers_.layer(tier, 1)
    return tiers_.with_layer(tier, 1, old, tiers_.trim(old, n))


@functools.partial(jax.jit, donate_argnums=0)
def remove(tier: Tier, slot, where) -> Tier:
    old = tiers_.layer(tier, 1)
    return tiers_.with_layer(tier, 1, old, tiers_.remove(old, slot, where)[0])


@jax.jit
def read(tier: Tier) -> tuple[Slots, jax.Array, jax.Array]:
    view = tiers_.layer(tier, 1)
    every = jnp.broadcast_to(jnp.arange(view.capacity), (B, K, view.capacity))
    return tiers_.take(view, every), tiers_.positions(view), tiers_.scores(view)


reserve, fill = jax.jit(tiers_.reserve, static_argnums=2), jax.jit(tiers_.fill)


def write_and_read(*given) -> tuple[Tier, Slots]:
    """A layer after a `put`, and what it has there; compiled anew."""

    def both(view: Tier, slot, slots: Slots, where):
        after = tiers_.put(view, slot, slots, where)
        return after, tiers_.take(after, slot)

    return jax.jit(both)(*given)


def pages_for(slots: int) -> int:
    return -(-slots // 8)


class Model:
    """Rows as lists, the pages that each row holds, and the numbers written so far."""

    def __init__(self, pool: int):
        self.rows: list[Row] = [[] for _ in range(ROWS)]
        self.held = [0] * ROWS
        self.pool = pool
        self.tag = 0

    def tags(self, n: int) -> np.ndarray:
        """Numbers `[B K n]` that were never written before."""
        self.tag += ROWS * n
        return np.arange(self.tag - ROWS * n, self.tag).reshape(B, K, n)

    def append(self, tags: np.ndarray, counts: list[int]) -> None:
        """Append to each row its first `counts` tags. Pages go to the rows in order; a row that gets none ends."""
        for i, (row, new, count) in enumerate(zip(self.rows, tags.reshape(ROWS, -1), counts, strict=True)):
            want = min(len(row) + count, ROW)
            self.held[i] += min(max(pages_for(want) - self.held[i], 0), self.pool - sum(self.held))
            row += new[: min(want, 8 * self.held[i]) - len(row)].tolist()


def check(tier: Tier, model: Model) -> None:
    slots, pos, score = read(tier)
    shape = (ROWS, ROW)
    assert np.array_equal(np.asarray(slots.pos), np.asarray(pos))
    k, v = (np.asarray(x).reshape(*shape, WIDTH) for x in (slots.k, slots.v))
    pos, score, taken = (np.asarray(x).reshape(shape) for x in (pos, score, slots.score))
    length = np.asarray(tier.length[1]).reshape(ROWS)
    table = np.asarray(tier.table[1]).reshape(ROWS, -1)
    free, num_free = np.asarray(tier.free), int(tier.num_free[0])
    assert not np.asarray(tier.length[0]).any() and (np.asarray(tier.table[0]) == model.pool).all()  # other layers
    owned: list[int] = []
    for i, row in enumerate(model.rows):
        n = len(row)
        assert length[i] == n
        assert pos[i, :n].tolist() == row and (pos[i, n:] == -1).all()
        np.testing.assert_array_equal(k[i, :n], np.repeat(np.array(row)[:, None], WIDTH, 1).reshape(n, WIDTH))
        np.testing.assert_array_equal(v[i, :n], -k[i, :n])
        np.testing.assert_array_equal(score[i, :n], np.array(row) / 2)
        np.testing.assert_array_equal(taken[i, :n], score[i, :n])
        pages = model.held[i]
        assert (table[i, :pages] < model.pool).all() and (table[i, pages:] == model.pool).all()
        owned += table[i, :pages].tolist()
    assert num_free == model.pool - len(owned)
    assert sorted(owned + free[:num_free].tolist()) == list(range(model.pool))  # every page has one owner


COUNTS = st.lists(st.integers(0, BLOCK), min_size=ROWS, max_size=ROWS)
PLACES = st.lists(st.integers(0, ROW - 1), min_size=ROWS, max_size=ROWS)
CHOICE = st.lists(st.booleans(), min_size=ROWS, max_size=ROWS)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), COUNTS),
        st.tuples(st.just("overwrite"), PLACES, CHOICE),
        st.tuples(st.just("trim"), PLACES),
        st.tuples(st.just("remove"), PLACES, CHOICE),
    ),
    max_size=14,
)


@pytest.mark.parametrize("pool", [ROWS * ROW // 8, 7], ids=["ample", "scarce"])
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(operations=OPERATIONS)
def test_tier_is_a_list_per_row(pool, operations):
    tier = empty(pool)
    assert (tier.page, tier.capacity, tier.free.shape) == (8, ROW, (pool,))
    model = Model(pool)
    block = np.arange(BLOCK)
    for name, numbers, *rest in operations:
        lengths = np.array([len(row) for row in model.rows])
        chosen = np.array(rest[0] if rest else [True] * ROWS) & (lengths > 0)
        place = np.minimum(numbers, np.maximum(lengths - 1, 0))
        if name == "append":
            tags = model.tags(BLOCK)
            model.append(tags, numbers)
            slot = lengths.reshape(B, K, 1) + block
            where = (block < np.reshape(numbers, (B, K, 1))) & (slot < ROW)
            tier = append(tier, jnp.asarray(slot), contents(tags), jnp.asarray(where))
        elif name == "overwrite":
            tags = model.tags(1)
            for i in np.flatnonzero(chosen):
                model.rows[i][place[i]] = int(tags.flat[i])
            slot, where = place.reshape(B, K, 1), chosen.reshape(B, K, 1)
            tier = overwrite(tier, jnp.asarray(slot), contents(tags), jnp.asarray(where))
        elif name == "trim":
            for i, n in enumerate(numbers):
                del model.rows[i][n:]
                model.held[i] = pages_for(len(model.rows[i]))
            tier = trim(tier, jnp.asarray(numbers).reshape(B, K))
        else:  # the last slot fills the gap; the row keeps its pages
            for i in np.flatnonzero(chosen):
                model.rows[i][place[i]] = model.rows[i][-1]
                model.rows[i].pop()
            tier = remove(tier, jnp.asarray(place.reshape(B, K)), jnp.asarray(chosen.reshape(B, K)))
        check(tier, model)


def test_append_past_the_row_is_dropped():
    """A row never grows past its capacity, even when the caller writes there."""
    tier, model = empty(ROWS * ROW // 8), Model(ROWS * ROW // 8)
    for _ in range(4):
        slot, tags = np.asarray(tier.length[1])[..., None] + np.arange(BLOCK), model.tags(BLOCK)
        model.append(tags, [BLOCK] * ROWS)
        tier = append(tier, jnp.asarray(slot), contents(tags), jnp.ones(slot.shape, bool))
        check(tier, model)
    assert [len(row) for row in model.rows] == [ROW] * ROWS


def test_tier_without_positions_counts_slots():
    tier = tiers_.init(
        layers=1, batch=1, heads=1, row=8, slots=8, widths=(2, 2), store=KVStore(), dtype=jnp.float32, positions=False
    )
    view = tiers_.reserve(tiers_.layer(tier, 0), jnp.full((1, 1), 3), 3)
    zeros = jnp.zeros((1, 1, 3, 2))
    view = tiers_.put(view, jnp.arange(3)[None, None], Slots(zeros, zeros), jnp.ones((1, 1, 3), bool))
    assert tiers_.positions(view).tolist() == [[[0, 1, 2, -1, -1, -1, -1, -1]]]
    with pytest.raises(ValueError, match="keeps no scores"):
        tiers_.scores(view)


@pytest.mark.parametrize("n", [1, 5])
def test_tpus_write_and_read_slots_with_their_pages(n, monkeypatch):
    """Narrow vectors, across the border of pages, some dropped and a row without pages: the same pool either way."""
    rng = np.random.default_rng(n)
    store = named("int4:8")
    tier = tiers_.init(
        layers=1, batch=2, heads=3, row=256, page=128, slots=1280, widths=(16, 16), store=store, dtype=jnp.float32
    )
    tier = reserve(tier, jnp.asarray([[[256, 129, 1], [128, 256, 0]]], jnp.int32), 256)
    view = tiers_.layer(tier, 0)
    k, v = (jnp.asarray(rng.normal(size=(2, 3, n, 16)), jnp.float32) for _ in range(2))
    slots = Slots(*jax.jit(store.encode)(k, v, ()), jnp.asarray(rng.integers(0, 50, (2, 3, n)), jnp.int32))
    slot = jnp.asarray([[171, 124, 0], [123, 125, 5]])[..., None] + jnp.arange(n)  # the last row has no pages
    where = jnp.asarray([[True, True, False], [True, True, True]])[..., None] & (jnp.arange(n) != 3)
    expected = write_and_read(view, slot, slots, where)
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(expected[0].k))
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, tpu, default: tpu(*args))
    again = write_and_read(view, slot, slots, where)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("n", [1, 8, 21, 48])
@pytest.mark.parametrize("pages", [40, 7], ids=["ample", "scarce"])
def test_filling_rows_is_putting_their_first_slots(n, pages):
    """Also more than rows may hold, and where the pool runs dry."""
    rng, store = np.random.default_rng(n), named("int4:8")
    tier = tiers_.init(
        layers=1, batch=2, heads=3, row=32, page=8, slots=8 * pages, widths=(16, 16), store=store, dtype=jnp.float32
    )
    count = jnp.asarray([[0, 1, 8], [9, 21, 32]], jnp.int32)
    view = tiers_.layer(reserve(tier, count[None], 32), 0)
    k, v = (jnp.asarray(rng.normal(size=(2, 3, n, 16)), jnp.float32) for _ in range(2))
    slots = Slots(*jax.jit(store.encode)(k, v, ()), jnp.asarray(rng.integers(0, 50, (2, 3, n)), jnp.int32))
    slot = jnp.broadcast_to(jnp.arange(n), (2, 3, n))
    put, there = write_and_read(view, slot, slots, slot < count[..., None])
    filled = fill(view, slots, count)
    np.testing.assert_array_equal(filled.length, put.length)
    assert pages == 7 or (np.asarray(filled.length) == np.minimum(count, n)).all()
    real = np.asarray(slot) < np.asarray(put.length)[..., None]
    for a, b in zip(jax.tree.leaves(there), jax.tree.leaves(jax.jit(tiers_.take)(filled, slot)), strict=True):
        np.testing.assert_array_equal(np.asarray(a)[real], np.asarray(b)[real])


def test_marked_places_come_in_order():
    where = np.random.default_rng(0).random((2, 3, 40)) < np.array([0, 0.5, 1])[:, None]
    k, v = (jnp.asarray(np.random.default_rng(n).normal(size=(2, 3, 40, n)), jnp.float32) for n in (4, 5))
    found = tiers_.gather_masked(jnp.asarray(where), k, v)
    for b, head in np.ndindex(2, 3):
        places = np.flatnonzero(where[b, head]).tolist()
        places += [0] * (40 - len(places))
        rows = [np.asarray(x)[b, head] for x in (k, v, np.broadcast_to(np.arange(40), (2, 3, 40)))]
        for got, row in zip(found, rows, strict=True):
            np.testing.assert_array_equal(got[b, head], row[places])


@pytest.mark.parametrize("window", [1, 4, 9, None])
def test_the_next_token_takes_the_first_slot_that_has_left_the_window(window):
    """Of rows whose tokens are in any order, one row being empty; without a window it goes behind the last slot."""
    rng, now = np.random.default_rng(0), np.array([7, 12])
    rows = [[[int(p) for p in rng.permutation(now[b])[:n]] for n in (5, 0)] for b in range(B)]
    tier = empty(ROWS * ROW // 8)
    for n in range(5):
        tags = np.array([[row[n] if n < len(row) else 0 for row in heads] for heads in rows])[..., None]
        where = np.array([[n < len(row) for row in heads] for heads in rows])[..., None]
        tier = append(tier, np.asarray(tier.length[1])[..., None], contents(tags), where)
    gone, slot = tiers_.expired(tiers_.layer(tier, 1), jnp.asarray(now), window)
    for b, head in np.ndindex(B, K):
        row = rows[b][head]
        left = [i for i, pos in enumerate(row) if window is not None and pos <= now[b] - window]
        assert (bool(gone[b, head]), int(slot[b, head])) == (bool(left), left[0] if left else len(row))
