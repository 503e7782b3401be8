"""Low-rank keys and values: a model with latents is the model whose projections are the products of the factors."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax import METHODS, methods
from kvjax.cache import layout
from kvjax.cache import tier as tiers_
from kvjax.errors import InputError, say_once
from kvjax.generation.allocate import init_cache
from kvjax.models.decoder import Decoder, forward
from kvjax.spec import LatentSpec, Lengths, RopeSpec
from tests.lib import oracle
from tests.lib.matrix import ARGUMENTS, BATCH, assert_close, slow, teacher, tiers_of

# Ranks of keys and values; heads of 8.
FAMILIES = {
    "llama": ({}, LatentSpec(2, ((12, 8), (8, 12)))),
    "qwen2": ({"qkv_bias": True}, LatentSpec(2, ((8, 16), (8, 16)))),
    "qwen3": ({"qk_norm": True}, LatentSpec(1, ((4, 8), (4, 8)))),
    "mistral": ({"windows": (12, 12)}, LatentSpec(2, ((4, 12), (4, 12)))),
    "phi3": ({"rope": RopeSpec(100.0, partial=0.75)}, LatentSpec(2, ((12, 8), (8, 12)))),
    "mha": ({"num_kv_heads": 4, "qkv_bias": True}, LatentSpec(2, ((12, 8), (16, 4)))),
    "mha joint": ({"num_kv_heads": 4}, LatentSpec(4, ((24, 16), (16, 24)))),
    "gemma3": ({"qk_norm": True, "norm": "rms+1", "windows": (12, None)}, LatentSpec(2, ((8, 12), (8, 12)))),
    "layer norm": ({"qk_norm": True, "norm": "layer", "qkv_bias": True}, LatentSpec(2, ((12, 8), (12, 8)))),
    "mqa": ({"num_kv_heads": 1}, LatentSpec(1, ((4, 8), (4, 8)))),
}
STEPS = 64


@functools.cache
def pair(name: str, **fields) -> tuple[Decoder, Decoder]:
    """A model with latents, and its dense twin."""
    base, latent = FAMILIES[name]
    narrow = oracle.random_model(5, num_layers=2, latent=latent, **base, **fields)
    dense = oracle.random_model(5, num_layers=2, **base, **fields)
    params = nnx.to_flat_state(nnx.state(narrow, nnx.Param))
    own = {path: leaf for path, leaf in params if path[-1] not in ("down", "up")}
    for path, leaf in params:
        if path[-1] == "down":
            up = dict(params)[(*path[:-1], "up")][...]
            kernel = jnp.einsum("dkr,krn->dkn", leaf[...], up).reshape(leaf.shape[0], -1)
            own[(*path[:-1], "kernel")] = leaf.replace(kernel)
    nnx.update(dense, nnx.from_flat_state(list(own.items())))
    return narrow, dense


@pytest.mark.parametrize("name", slow(FAMILIES, ("qwen3", "mha", "mqa", "layer norm")))
def test_latents_are_the_model_of_the_products(name):
    """Prefill and 64 decoded tokens, and without a cache."""
    narrow, dense = pair(name)
    given = np.random.default_rng(1).integers(0, 97, (len(BATCH), STEPS))
    got, positions, _ = oracle.run(narrow, methods.full(), BATCH, given)
    want, every, _ = oracle.run(dense, methods.full(), BATCH, given)
    assert_close(got, want, 1e-4)
    rows, heads = narrow.spec.num_rows, dense.spec.num_kv_heads
    assert rows == heads // FAMILIES[name][1].heads
    assert positions == [[[layer[:rows] for layer in sequence] for sequence in step] for step in every]
    tokens = jnp.asarray([BATCH[0]])
    assert_close(np.asarray(forward(narrow, tokens)), np.asarray(forward(dense, tokens)), 1e-5)


# Keys that are compared or scaled as they are cached make another choice.
SAME = [name for name in METHODS if name not in ("d2o", "mikv", *methods.LEARNED)]


@pytest.mark.parametrize("method", slow(SAME, ("full", "tova", "pyramidkv", "adakv", "oracle")))
def test_a_latent_per_head_changes_no_choice(method):
    narrow, dense = pair("qwen3")
    recipe = methods.make(method, None if method == "full" else 12, ARGUMENTS.get(method, {}))
    got, positions, _ = oracle.run(narrow, recipe, BATCH, teacher())
    want, kept, _ = oracle.run(dense, recipe, BATCH, teacher())
    assert positions == kept
    assert_close(got, want, 1e-4)


@pytest.mark.parametrize("method", ["h2o", "snapkv"])
def test_heads_that_share_a_latent_are_kept_by_their_mean_score(method):
    """The row's score is the mean over all its query heads, as if they were one group."""
    narrow, _ = pair("mha joint")
    layer, _ = oracle.run(narrow, methods.make(method, 12, ARGUMENTS.get(method, {})), BATCH, teacher())[1][0][0]
    twin = pair("mha joint")[1]
    reference = oracle.Oracle(twin)
    seen = []

    def select(index, prompt):
        t = prompt.probs.shape[1]
        probs = prompt.probs if method == "h2o" else prompt.probs[:, -ARGUMENTS[method]["window"] :]
        seen.append(probs.sum(axis=1).mean(axis=0))
        return [oracle.entries(prompt, k, range(t)) for k in range(twin.spec.num_kv_heads)]

    reference.prefill(BATCH[0], select)
    t = len(BATCH[0])
    if method == "h2o":
        recent = set(range(t - 6, t))
        heavy = sorted(range(t - 6), key=lambda i: -seen[0][i])[:6]
    else:
        window = ARGUMENTS[method]["window"]
        recent = set(range(t - window, t))
        pooled = np.convolve(np.pad(seen[0][: t - window], 2), np.ones(5) / 5, "valid")
        heavy = sorted(range(t - window), key=lambda i: -pooled[i])[: 12 - window]
    assert layer == [sorted(recent | set(heavy))]


def test_a_pool_per_pair_of_widths():
    narrow, _ = pair("llama")
    _, _, cache = oracle.run(narrow, methods.full(), BATCH, teacher())
    assert [(t.k.shape[-1], t.v.shape[-1], t.length.shape) for t in tiers_of(cache)] == [
        (12, 8, (1, 3, 1)),
        (8, 12, (1, 3, 1)),
    ]
    assert [group.index for group in layout.layer_groups(narrow.spec)] == [(0,), (1,)]


@pytest.mark.parametrize("name", ["mha joint", "qwen2"])
def test_payload_is_the_share_of_the_ranks(name):
    """Numbers of latents over numbers of heads, on the arrays."""
    narrow, dense = pair(name)
    payload = lambda model: sum(
        tiers_.nbytes(t).payload for t in tiers_of(oracle.run(model, methods.full(), BATCH, teacher())[2])
    )
    latent, spec = narrow.spec.latent, narrow.spec
    assert latent is not None
    share = sum(map(sum, latent.ranks)) * spec.num_rows / (2 * spec.num_layers * spec.num_kv_heads * spec.head_dim)
    assert payload(narrow) == pytest.approx(share * payload(dense), rel=0.02)


@pytest.mark.parametrize(
    ("name", "store"), [("qwen2", "int8"), ("qwen2", "int4"), ("llama", "kivi4:8:16"), ("llama", "int4:8")]
)
def test_low_bit_latents(name, store):
    """Close to the dense latents' logits, with pages of codes; groups of 8 do not divide the llama's latents."""
    narrow, _ = pair(name)
    got, _, cache = oracle.run(narrow, methods.full(store=store), BATCH, teacher())
    want, _, _ = oracle.run(narrow, methods.full(), BATCH, teacher())
    assert_close(got, want, 0.05 if store == "int8" else 0.6)
    assert tiers_of(cache)[0].k["codes"].dtype == jnp.uint8


@pytest.mark.parametrize("method", ["d2o", "mikv"])
def test_merged_and_demoted_latents(method):
    """A budget larger than the text is the full cache; a small one gives finite logits."""
    narrow, _ = pair("llama")
    arguments = {"balance": False, "low_store": "int8"} if method == "mikv" else {}
    want, _, _ = oracle.run(narrow, methods.full(), BATCH, teacher())
    got, _, _ = oracle.run(narrow, methods.make(method, 1000, arguments), BATCH, teacher())
    assert_close(got, want, 1e-4)
    got, positions, _ = oracle.run(narrow, methods.make(method, 12, arguments), BATCH, teacher())
    assert np.isfinite(got).all()
    assert method == "mikv" or max(len(row) for row in positions[-1][0][0]) <= 12
    if method == "mikv":
        assert_close(got, want, 0.1)


def test_a_balance_needs_rotated_keys():
    narrow, _ = pair("llama")
    with pytest.raises(InputError, match="set balance=false"):
        oracle.start(narrow, methods.mikv(), BATCH, 1)


def test_latents_are_a_part_of_the_spec():
    narrow, dense = pair("llama")
    assert dataclasses.replace(narrow.spec, latent=None) == dense.spec
    assert [narrow.spec.widths(i) for i in range(2)] == [(12, 8), (8, 12)]


@pytest.mark.parametrize("method", ["dynamickv", "d2o", "mikv dynamickv"])
def test_layers_share_slots_with_those_of_equal_widths_only(method):
    """Each pool holds what its layers were given: no row of the last sequence goes short."""
    narrow, _ = pair("llama")
    prompts = [np.random.default_rng(i).integers(0, 97, 250).tolist() for i in range(4)]
    arguments = {"importance": "window", "allocate": "from_scores", "balance": False} if method[0] == "m" else {}
    recipe = methods.make(method.split()[0], 100, arguments)
    _, cache = oracle.start(narrow, recipe, prompts, 1)
    kept = np.stack([np.asarray(tiers[0].length[0, :, 0]) for tiers in cache])  # layers, sequences
    assert (kept == 100).all()


PER_HEAD = {
    "adakv": {},
    "dynamickv": {"ada": True},
    "mikv": {"allocate": "per_head", "importance": "window", "balance": False},
}


@pytest.mark.parametrize("method", PER_HEAD)
def test_heads_that_share_a_latent_are_said_to_share_a_budget(method, capsys):
    recipe = methods.make(method, 12, PER_HEAD[method])
    say_once.cache_clear()
    for name in ("qwen3", "llama", "llama"):  # a latent for each head; for all, twice
        init_cache(pair(name)[0], recipe, Lengths((40,), 1, 64))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{method}: all heads of a layer share a latent") and "--lorc-groups 1" in line


def test_full_layers_need_layers_of_equal_widths():
    narrow, _ = pair("llama")
    with pytest.raises(InputError, match="rule=uniform"):
        oracle.start(narrow, methods.d2o(100, full_layers="0"), BATCH, 1)
