"""Generate on one device and on a mesh of those that this process has; a JSON line for each method.

python -m tests.lib.on_mesh data=2,model=4 h2o full@demo data=1,model=8 count:tova
"""

import collections
import functools
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from kvjax.cache.layout import Cache
from kvjax.generation import decode, sampling
from kvjax.generation.allocate import init_cache
from kvjax.generation.generate import check_recipe
from kvjax.generation.model import Model
from kvjax.generation.results import Generation
from kvjax.models.decoder import Decoder
from kvjax.models.stack import stacked
from kvjax.parallel import mesh
from kvjax.policies.base import Recipe
from kvjax.spec import GateSpec, Lengths
from tests.lib import matrix, oracle

jax.config.update("jax_numpy_dtype_promotion", "strict")
HEADS = dict(vocab_size=104, num_layers=2, num_heads=16, num_kv_heads=8, max_position=512)
GATES = {
    "dmc": GateSpec("dmc", rate=1.5, window=3, offset=0.5),
    "dms": GateSpec("dms", rate=1.5, window=3, offset=-1.0),
}
BUDGET, NEW, PROMPTS = 24, 12, (90, 61, 77, 85, 90, 70, 66, 88)


@functools.cache
def models(of: str, gate: str, size: str) -> tuple[Decoder, Decoder]:
    """A model on one device, and on a mesh."""
    fields = HEADS | ({"gate": GATES[gate]} if gate else {})
    one = kvjax.load().decoder if of == "demo" else oracle.random_model(5, **fields)
    if of == "stacked":
        return one, stacked(matrix.on_mesh(oracle.random_model(5, **fields), size))
    return one, matrix.on_mesh(one, size)


def generate(model: Decoder, recipe: Recipe) -> Generation:
    prompts = [np.random.default_rng(n).integers(0, 97, n).tolist() for n in PROMPTS]
    return Model(model, None, (), "m").generate(prompts, recipe, max_new_tokens=NEW)


def judge(decoder: Decoder, recipe: Recipe) -> list[float]:
    """Log-probabilities of given continuations, and how far they are from the full cache's."""
    model, rng = Model(decoder, None, (), "m"), np.random.default_rng(1)
    prompts, after = ([rng.integers(0, 97, n).tolist() for n in lengths] for lengths in ((50, 31, 44), (5, 2, 4)))
    check_recipe(model, recipe)
    judged, _ = model.log_likelihood(prompts, after, recipe)
    far, _ = model.divergence(prompts, after, recipe, reference=model.references(prompts, after))
    return np.concatenate([*(j.logprobs for j in judged), *far]).tolist()


def fullest(cache: Cache) -> float:
    """The largest part of all slots in filled pages that one device holds."""
    held = collections.Counter()
    for tier in (tier for tiers in cache for tier in tiers):
        for shard in tier.length.addressable_shards:
            held[shard.device.id] += int((-(-np.asarray(shard.data) // tier.page)).sum()) * tier.page
    return max(held.values()) / sum(held.values())


def collectives(model: Decoder, recipe: Recipe) -> dict[str, int]:
    """What a step of one sequence tells other devices, in the compiled program."""
    cache = init_cache(model, recipe, Lengths((40,), 8, 64))
    state = decode.first_token(
        jnp.zeros((1, model.spec.vocab_size)), cache, jnp.asarray([40]), sampling.chooser(sampling.Sampling(), 1),
        decode.ends((), 9, 1), jnp.zeros((1, model.spec.vocab_size), bool),
    )  # fmt: skip
    with mesh.on(mesh.of(model)):
        step = jax.jit(decode.decode_step, static_argnames=("recipe",), donate_argnames=("cache",))
        text = step.lower(model, recipe, state.cache, state.token, state.pos).compile().as_text()
    found = re.findall(r" = (.*?) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", text)
    counts = collections.Counter()
    for made, kind in found:  # XLA sends several arrays at once
        counts[kind] += made.count("[")
    return dict(counts)


def main() -> None:
    size = ""
    for entry in sys.argv[1:]:
        if entry.startswith("data="):
            size = entry
            continue
        task, _, rest = entry.rpartition(":")
        method, _, of = rest.partition("@")
        one, many = models(of, method if method in GATES else "", size)
        recipe = matrix.recipe_of(method, BUDGET)
        if task == "count":
            print(json.dumps({"method": entry, "collectives": collectives(many, recipe)}))
            continue
        if task == "judge":
            print(json.dumps({"method": entry, "one": judge(one, recipe), "many": judge(many, recipe)}))
            continue
        want, got = generate(one, recipe), generate(many, recipe)
        arrays = collections.Counter()
        for leaf in jax.tree.leaves(got.cache):
            for shard in leaf.addressable_shards:
                arrays[shard.device.id] += shard.data.nbytes
        tokens = lambda out: [sequence.tokens for sequence in out.sequences]
        found = {
            "method": entry, "tokens": tokens(got), "expected": tokens(want), "slots": got.slots,
            "expected_slots": want.slots, "bytes": want.bytes.total, "device_bytes": got.device_bytes,
            "arrays": list(arrays.values()), "fullest": fullest(got.cache),
        }  # fmt: skip
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
