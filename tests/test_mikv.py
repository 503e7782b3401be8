"""MiKV's two tiers and KIVI's residual against their definitions in `brute_mikv`, and what else is promised of them."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import methods
from kvjax.cache import layout
from kvjax.cache import tier as tiers_
from tests.lib import brute_mikv, oracle
from tests.lib.brute_mikv import KIVI, MiKV, Moment, Theirs
from tests.lib.matrix import assert_close, slow, text
from tests.lib.oracle import Oracle

LENGTHS = (40, 32, 24, 5)  # one is a multiple of KIVI's residual; the last is shorter than the budgets
STEPS, KIVI_STEPS = 64, 40
SETTINGS = {
    "dense and int2": dict(),
    "int8 and int2": dict(store="int8"),
    "int4 and int3": dict(store="int4", low_store="int3"),
    "low int4/int2": dict(low_store="int4/int2"),
    "int8/int4 and int2/int3": dict(store="int8/int4", low_store="int2/int3"),
    "no balance": dict(balance=False),
    "no balance int8": dict(balance=False, store="int8"),
    "12 tokens": dict(budget=12),
    "12 tokens int4": dict(budget=12, store="int4"),
    "recent a quarter": dict(recent=0.25),
    "recent none": dict(recent=0.0, budget=9, store="int8"),
    "recent all": dict(recent=1.0),
}
QUICK = ("dense and int2", "int8 and int2", "low int4/int2", "12 tokens", "recent a quarter")
every_setting = pytest.mark.parametrize("setting", slow(SETTINGS, SETTINGS.keys() - QUICK))


class Run(NamedTuple):
    """The library over the batch."""

    prompts: list[list[int]]
    teacher: np.ndarray  # [B steps]
    logits: np.ndarray  # [steps + 1, B, V]
    moments: list[list[Moment]]  # [steps + 1][B]
    caches: list[layout.Cache]  # [steps + 1]


def model_of(head_dim: int, seed: int = 11):
    return oracle.random_model(seed, num_layers=2, head_dim=head_dim)


def prompts_of() -> list[list[int]]:
    return [text(n, 2) for n in LENGTHS]


@functools.partial(jax.jit, static_argnames=("recipe",))
def decoded(cache: layout.Cache, *, recipe) -> list[list[Theirs]]:
    """What each layer's tiers hold, `[B K S ...]`; slots that are empty have position -1."""

    def of(tier: tiers_.Tier, store) -> Theirs:
        slot = jnp.broadcast_to(jnp.arange(tier.capacity), (*tier.length.shape, tier.capacity))
        slots = tiers_.take(tier, slot)
        key, value = store.key.decode(slots.k, jnp.float32), store.value.decode(slots.v, jnp.float32)
        return Theirs(slot if isinstance(tier.pos, tuple) else slots.pos, key, value)

    (tiers,) = cache
    layers = range(tiers[0].length.shape[0])
    return [[of(tiers_.layer(t, i), s) for t, s in zip(tiers, recipe.stores, strict=True)] for i in layers]


def run(model, recipe, steps: int) -> Run:
    prompts = prompts_of()
    teacher = np.stack([text(steps, 100 + b) for b in range(len(prompts))]).astype(np.int32)
    last, cache = oracle.start(model, recipe, prompts, steps)
    pos, active = np.asarray([len(p) for p in prompts], np.int32), jnp.ones(len(prompts), bool)
    logits, moments, caches = [], [], []
    for i in range(steps + 1):
        logits.append(np.asarray(last))
        layers = jax.device_get(decoded(cache, recipe=recipe))
        moments.append([[[Theirs(*(x[b] for x in t)) for t in tiers] for tiers in layers] for b in range(len(prompts))])
        caches.append(jax.device_get(cache))
        if i < steps:
            now = jnp.asarray(teacher[:, i]), jnp.asarray(pos + i), active
            last, cache = oracle.step(model, cache, *now, recipe=recipe)
    return Run(prompts, teacher, np.stack(logits), moments, caches)


def mikv(setting: str):
    return methods.mikv(**{"budget": "20%", **SETTINGS[setting]})


@functools.cache
def mikv_run(setting: str) -> Run:
    return run(model_of(8), mikv(setting), STEPS)


def kept(theirs: Theirs) -> list[list[int]]:
    return [sorted(row[row >= 0].tolist()) for row in theirs.pos]


@every_setting
def test_mikv_keeps_its_definition(setting):
    ours, reference = mikv_run(setting), Oracle(model_of(8))
    for b, prompt in enumerate(ours.prompts):
        definition = MiKV(reference, **{"budget": "20%", **SETTINGS[setting]})
        theirs = [moment[b] for moment in ours.moments]
        followed = brute_mikv.follow(definition, prompt, ours.teacher[b], theirs)
        for step, (logits, rows) in enumerate(followed):
            for layer, tiers in enumerate(theirs[step]):
                for tier, name in enumerate(("high", "low")):
                    expected = [sorted(e.pos for e in getattr(row, name)) for row in rows[layer]]
                    assert kept(tiers[tier]) == expected, f"{len(prompt)} tokens, step {step}, {name} of layer {layer}"
            assert_close(ours.logits[step, b], logits, 1e-4)


@every_setting
def test_mikv_loses_no_token(setting):
    ours = mikv_run(setting)
    for step, ((high, low),) in enumerate(ours.caches):
        seen = np.asarray(LENGTHS) + step
        np.testing.assert_array_equal(high.length + low.length, np.broadcast_to(seen[:, None], high.length.shape))


@pytest.mark.parametrize("setting", ["dense and int2", "int8 and int2"])
def test_balance_is_its_formula_and_stays(setting):
    ours, reference = mikv_run(setting), Oracle(model_of(8))
    (tiers,), (later,) = ours.caches[0], ours.caches[-1]
    for tier, after in zip(tiers, later, strict=True):
        if not isinstance(tier.balance, tuple):
            np.testing.assert_array_equal(tier.balance, after.balance)
    for b, prompt in enumerate(ours.prompts):
        seen = brute_mikv.balances(reference, prompt)
        np.testing.assert_allclose(tiers[1].balance[:, b], seen, rtol=1e-5)


def test_balance_ignores_padding_and_batch_mates():
    model, recipe = model_of(8), mikv("dense and int2")
    (together,) = mikv_run("dense and int2").caches[0]
    for b, prompt in enumerate(prompts_of()[:2]):
        _, ((_, alone),) = oracle.start(model, recipe, [prompt], STEPS, padded=128)
        np.testing.assert_allclose(alone.balance[:, 0], together[1].balance[:, b], rtol=1e-5)


def test_balance_of_silent_channels_is_one_and_of_extreme_channels_is_bounded():
    """Channels c and c + H/2 of the first layer: no query, no key, tiny keys, tiny queries."""
    model = model_of(8)
    q, k = (np.array(getattr(model.layers[0].attention, name).kernel[...]) for name in "qk")
    q, k = q.reshape(*q.shape[:-1], -1, 2, 4), k.reshape(*k.shape[:-1], -1, 2, 4)
    q[..., 0], k[..., 1], k[..., 2], q[..., 3] = 0, 0, 1e-12 * k[..., 2], 1e-12 * q[..., 3]
    for name, x in (("q", q), ("k", k)):
        getattr(model.layers[0].attention, name).kernel[...] = jnp.asarray(x.reshape(x.shape[0], -1))
    _, ((_, low),) = oracle.start(model, mikv("dense and int2"), prompts_of(), STEPS)
    expected = np.broadcast_to(np.tile([1, 1, 1e4, 1e-4], 2).astype(np.float32), low.balance.shape[1:])
    np.testing.assert_array_equal(low.balance[0], expected)


@pytest.mark.parametrize("arguments", [dict(), dict(low_store="int4", recent=0.0), dict(balance=False)], ids=str)
def test_mikv_with_the_whole_budget_is_the_full_cache(arguments):
    model = model_of(8)
    ours, full = (run(model, r, 12) for r in (methods.mikv("100%", **arguments), methods.full()))
    assert_close(ours.logits, full.logits, 1e-5)


@pytest.mark.parametrize(("bits", "group", "head_dim"), [(2, 8, 16), (2, 16, 8), (4, 8, 8), (4, 16, 16)])
def test_kivi_keeps_its_definition(bits, group, head_dim):
    model = model_of(head_dim)
    ours, reference = run(model, methods.full(store=f"kivi{bits}:{group}:16"), KIVI_STEPS), Oracle(model)
    for b, prompt in enumerate(ours.prompts):
        theirs = [moment[b] for moment in ours.moments]
        followed = brute_mikv.follow(KIVI(reference, bits, group, 16), prompt, ours.teacher[b], theirs)
        for step, (logits, _) in enumerate(followed):
            assert_close(ours.logits[step, b], logits, 1e-4)
