"""A prompt that is read again behind its end: scores by the papers' definitions in numpy, and what is kept by them."""

import functools

import jax
import numpy as np
import pytest

from kvjax import methods
from kvjax.errors import InputError
from kvjax.generation.model import Model
from kvjax.policies.base import Recipe
from kvjax.spec import Prompt
from tests.lib import oracle
from tests.lib.matrix import assert_close, text
from tests.lib.oracle import LayerPrompt, Oracle

PLUS = pytest.mark.parametrize("method", ["kvzip", "kvzip_plus"])
MODELS = {
    "gqa": dict(),
    "mqa": dict(num_kv_heads=1, qk_norm=True, sinks=True),
    "mha": dict(num_kv_heads=4, score_cap=2.0, score_scale=0.5, qkv_bias=True),
    "windowed": dict(windows=(12, None, 40)),
}
PROMPTS = (text(75, 0), text(16, 0), text(33, 0), text(1, 0))
CHUNK, SINKS = 32, 3


class Replayed(Oracle):
    """A decoder that reads a prompt again, chunk by chunk, and scores its tokens."""

    def scores(self, tokens: list[int], chunk: int, sinks: int, plus: bool) -> list[np.ndarray]:
        """`[L][K T]`, the most attention that any query of a token's chunk gives it when it is read again."""
        read: list[LayerPrompt] = []
        self.prefill(tokens, lambda layer, prompt: read.append(prompt) or [])
        found = [np.zeros((self.spec.num_kv_heads, len(tokens))) for _ in read]
        for start in range(0, len(tokens), chunk):
            copied = range(start, min(start + chunk, len(tokens)))
            x, pos = self.weights["embedding"][[tokens[j] for j in copied]], len(tokens) + np.arange(len(copied))
            for layer, prompt in enumerate(read):
                x = self._again(layer, prompt, x, pos, copied, sinks, plus, found[layer])
        return found

    def _again(self, layer, prompt, x, pos, copied, sinks, plus, found) -> np.ndarray:
        t, spec, heads = len(prompt.key), self.spec, []
        q, key, value = self._project(layer, x)
        q, key = self.rotate(q, pos), self.rotate(key, pos)
        size = np.linalg.norm(self._norm(self.weights["layers"][layer]["attention_norm"], x), axis=-1)
        out = self.weights["layers"][layer]["attention"]["o"]["kernel"].reshape(spec.num_heads, spec.head_dim, -1)
        where = np.concatenate([np.arange(t), pos])
        near = pos[:, None] - where < (spec.window(layer) or len(where))
        counted = np.isin(where, [*range(sinks), *copied, *pos])
        for n in range(spec.num_heads):
            k = n // spec.group_size
            keys, values = (np.concatenate([a[:, k], b[:, k]]) for a, b in ((prompt.key, key), (prompt.value, value)))
            logits = np.where(where <= pos[:, None], self.logits(q[:, n] @ keys.T), -np.inf)
            sink = self.sinks(layer)[n]
            heads.append(oracle.softmax(np.where(near, logits, -np.inf), sink) @ values)
            weights = oracle.softmax(np.where(counted, logits, -np.inf), sink)[:, list(copied)]
            if plus:
                weights = weights * np.linalg.norm(values[list(copied)] @ out[n], axis=-1) / size[:, None]
            found[k, list(copied)] = np.maximum(found[k, list(copied)], weights.max(axis=0))
        return self._finish(layer, x, np.stack(heads, axis=1))


def scored(model, recipe: Recipe, prompts, padded=None) -> list[np.ndarray]:
    """What kvjax's prefill says of prompts, `[L][B K T]`, in layers without a sliding window."""
    found: list[np.ndarray] = []
    policy, select = recipe.policy, recipe.policy.prefill.args[0]  # pyright: ignore

    def prefill(tiers, prompt: Prompt):
        jax.debug.callback(lambda x: found.append(np.asarray(x)), select.score.prompt(prompt), ordered=True)
        return policy.prefill(tiers, prompt)

    oracle.start(model, recipe._replace(policy=policy._replace(prefill=prefill)), prompts, 1, padded)
    jax.effects_barrier()
    return found


@functools.cache
def model_of(name: str):
    return oracle.random_model(11, **MODELS[name])


@PLUS
@pytest.mark.parametrize(("chunk", "padded"), [(CHUNK, 256), (20, 80), (2048, 75)])
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_the_definition(name, chunk, padded, method):
    """Of prompts of several lengths side by side, of whole chunks and of parts."""
    model = model_of(name)
    got = scored(model, methods.make(method, 8, {"chunk": chunk, "sinks": SINKS, "split": "row"}), PROMPTS, padded)
    layers = [i for i in range(model.spec.num_layers) if model.spec.window(i) is None]
    assert len(got) == len(layers)
    for b, prompt in enumerate(PROMPTS):
        want = Replayed(model).scores(prompt, chunk, SINKS, method == "kvzip_plus")
        for layer, all_ in zip(layers, got, strict=True):
            np.testing.assert_allclose(all_[b, :, : len(prompt)], want[layer], rtol=1e-5)


@PLUS
def test_the_best_of_all_layers_and_heads_are_kept(method):
    """Those with the largest scores of all, beside the first and the newest tokens."""
    model, keep, ends = model_of("gqa"), 12, 4
    recipe = methods.make(method, keep, {"chunk": CHUNK, "sinks": ends, "recent": ends})
    for prompt in (text(75, 0), text(33, 0)):
        _, cache = oracle.start(model, recipe, [prompt], 1)
        kept, n = oracle.kept_positions(model, cache)[0], len(prompt)
        scores = np.stack(Replayed(model).scores(prompt, CHUNK, ends, method == "kvzip_plus"))[..., ends : n - ends]
        best = np.argsort(-scores, axis=None)[: scores[..., 0].size * (keep - 2 * ends)]
        chosen = np.isin(np.arange(scores.size), best).reshape(scores.shape)
        own = [[(ends + np.flatnonzero(row)).tolist() for row in layer] for layer in chosen]
        assert kept == [[[*range(ends), *row, *range(n - ends, n)] for row in layer] for layer in own]
        assert len({len(row) for layer in kept for row in layer}) > 2


@PLUS
def test_a_question_goes_on_where_the_prompt_ends(method):
    """What was read again is in no row and moves no position: a context of everything answers as the full cache."""
    model = Model(model_of("gqa"), None, (), "random")
    recipe = methods.make(method, "100%", {"chunk": CHUNK})
    got, want = (model.read(PROMPTS[0], each) for each in (recipe, methods.full()))
    assert got.bytes.payload <= 1.1 * want.bytes.payload
    got, want = (context.ask([[5, 6, 7]], max_new_tokens=8) for context in (got, want))
    assert got.sequences[0].tokens == want.sequences[0].tokens
    assert_close(np.asarray(got.logits), np.asarray(want.logits), 1e-5)


def test_a_prompt_that_cannot_be_read_again_is_refused():
    model = Model(oracle.random_model(5, num_layers=1, max_position=64), None, (), "short")
    recipe = methods.kvzip(chunk=16)
    model.read(text(48, 0), recipe)
    for read in (model.read, lambda prompt, recipe: model.generate([prompt], recipe, max_new_tokens=1)):
        with pytest.raises(InputError, match=r"49 tokens of a prompt again.* 16 at a time.* limit .64"):
            read(text(49, 0), recipe)


@pytest.mark.parametrize(("name", "value"), [("chunk", 0), ("sinks", -1), ("recent", -1), ("split", "column")])
def test_wrong_arguments_are_refused(name, value):
    with pytest.raises(InputError, match=f"{name}='?{value}"):
        methods.kvzip(**{name: value})


@PLUS
def test_chunks_can_be_cut_into_equal_blocks(method):
    """From 64 tokens on they are a multiple of it: a prime number would be read one by one."""
    sizes = {given: methods.make(method, "20%", {"chunk": given}).replay for given in (1, 61, 64, 127, 1009, 2048)}
    assert sizes == {1: 1, 61: 61, 64: 64, 127: 64, 1009: 960, 2048: 2048}


def test_what_is_far_behind_a_window_is_a_number():
    """No query of a second reading, however far behind the prompt's end, may see nothing at all."""
    model = Model(oracle.random_model(5, num_layers=2, windows=(16, None), max_position=1024), None, (), "random")
    with jax.debug_nans(True):
        context = model.read(np.random.default_rng(0).integers(0, 97, 400).tolist(), methods.kvzip("20%"))
    assert sum(context.kept) > 0
