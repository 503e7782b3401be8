"""However many equal layers a model has, one is compiled; and the product that lets CPUs do so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.bench.decode import weight_bytes
from kvjax.checkpoint import hf, identity
from kvjax.generation import decode, sampling
from kvjax.methods import make
from kvjax.models.decoder import Decoder
from kvjax.models.quantized import Quantized, numbers
from kvjax.models.quantized import chosen_product as chosen_codes
from kvjax.models.stack import modules, stacked
from kvjax.retrofit.weights import of_model
from kvjax.spec import LatentSpec
from pallas_kernels import native
from pallas_kernels.chosen_product import chosen_product, cpu, reference
from tests.lib import oracle
from tests.test_loop import traced_functions


@pytest.fixture
def library():
    try:
        native.register(cpu.NAME, cpu.SOURCE, cpu.SYMBOL)
    except NotImplementedError as error:
        pytest.skip(str(error))


def lowered(layers: int, method: str, **fields) -> str:
    """The decode loop of a tiny model with so many layers, as JAX hands it to the compiler."""
    model = oracle.random_model(0, num_layers=layers, **fields)
    recipe, lengths = make(method, None if method == "full" else 16), kvjax.Lengths((20,), 12, 64)
    cache = kvjax.init_cache(model, recipe, lengths)
    chooser, ends = sampling.chooser(sampling.Sampling(), 1), decode.ends((), 12, 1)
    logits = jnp.zeros((1, model.spec.vocab_size))
    state = decode.first_token(logits, cache, jnp.asarray([20]), chooser, ends, jnp.zeros(logits.shape, bool))
    return decode.decode_loop.lower(model, state, chooser, ends, recipe=recipe, chunk=4).as_text()


@pytest.mark.parametrize("method", ["full", "h2o", "mikv"])
def test_a_loop_of_more_layers_is_no_longer_text(method, library):
    few, many = (lowered(layers, method) for layers in (4, 24))
    assert abs(many.count("\n") - few.count("\n")) <= 20  # of 20 layers more, the numbers of bytes
    assert many.count("custom_call @pallas_kernels.chosen_product") == few.count("@pallas_kernels.chosen_product") == 7


def test_layers_of_two_windows_are_two_loops(library):
    windows = lambda layers: (*(8,) * layers, *(None,) * layers)
    few, many = (lowered(2 * half, "full", windows=windows(half)) for half in (2, 12))
    assert abs(many.count("\n") - few.count("\n")) <= 20
    assert many.count("custom_call @pallas_kernels.chosen_product") == 14


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 16), (100, 37), (65, 1500)], ids=str)
@pytest.mark.parametrize("rows", [1, cpu.MOST])
def test_the_product_is_that_of_the_matrix_that_is_named(rows, shape, dtype, library):
    rng = np.random.default_rng(rows)
    options = [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(3)]
    x = jnp.asarray(rng.normal(size=(rows, shape[0])), dtype)
    run = jax.jit(chosen_product)
    for index, option in enumerate(options):
        got = np.asarray(run(x, options, jnp.asarray(index)), np.float64)
        want = np.asarray(x, np.float64) @ np.asarray(option, np.float64)
        size = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(option, np.float64))
        assert np.all(
            np.abs(got - want) <= shape[0] * 2.0**-24 * size + (0 if dtype == jnp.float32 else 2.0**-8) * np.abs(want)
        )


@pytest.mark.parametrize("outer", [37, 512])
def test_a_row_is_the_same_whatever_is_beside_it(outer, library):
    rng = np.random.default_rng(outer)
    options = [jnp.asarray(rng.normal(size=(300, outer)), jnp.float32)] * 2
    x = jnp.asarray(rng.normal(size=(cpu.MOST, 300)), jnp.float32)
    run, one = jax.jit(chosen_product), jnp.asarray(1)
    together = run(x, options, one)
    for rows in (1, 2, 5):
        np.testing.assert_array_equal(run(x[:rows], options, one), together[:rows])


@pytest.mark.parametrize("rows, dtype", [(cpu.MOST + 1, jnp.float32), (2, jnp.float16)])
def test_what_the_kernel_does_not_do_is_done_by_xla(rows, dtype, library):
    rng = np.random.default_rng(0)
    options = [jnp.asarray(rng.normal(size=(5, 6)), dtype) for _ in range(2)]
    x = jnp.asarray(rng.normal(size=(rows, 5)), dtype)
    with pytest.raises(NotImplementedError, match="for xla"):
        cpu.chosen_product(x, options, jnp.asarray(0))
    for index in (0, 1):
        got = chosen_product(x, options, jnp.asarray(index))
        np.testing.assert_array_equal(got, reference.chosen_product(x, options, jnp.asarray(index)))
        np.testing.assert_array_equal(got, x @ options[index])


def test_without_kernels_the_decoder_says_the_same(library):
    model = oracle.random_model(3, num_layers=4)
    assert isinstance(model, Decoder)
    prompts = [[5, 6, 7, 8] * 4, [1, 2, 3]]
    tokens = np.asarray([[3, 1, 4, 1], [5, 9, 2, 6]])
    kernel, plain = (
        oracle.run(model, kvjax.methods.make("full", arguments={"kernels": kernels}), prompts, tokens)[0]
        for kernels in ("cpu", "xla")
    )
    np.testing.assert_allclose(np.asarray(kernel), np.asarray(plain), atol=1e-4)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("rows, shape", [(1, (32, 37)), (3, (96, 1500)), (cpu.MOST, (64, 16))])
def test_the_product_with_codes_is_that_of_their_numbers(rows, shape, weights, library):
    rng = np.random.default_rng(rows)
    options = [Quantized(jnp.asarray(rng.normal(size=shape), jnp.float32), weights, -2) for _ in range(3)]
    x = jnp.asarray(rng.normal(size=(rows, shape[0])), jnp.float32)
    run = jax.jit(lambda x, index: chosen_codes(x, options, index, "cpu"))
    for index, option in enumerate(options):
        matrix = np.asarray(numbers(option, jnp.float32), np.float64)
        want, size = (np.asarray(each(x), np.float64) @ each(matrix) for each in (lambda y: y, np.abs))
        assert np.all(np.abs(np.asarray(run(x, jnp.asarray(index))) - want) <= 4e-6 * size + 1e-6)


WINDOWS = (8, 8, None, 8, None)


@pytest.mark.parametrize("method", ["full", "h2o"])
def test_layers_in_stacks_are_those_that_lie_apart(method):
    """Bit by bit: a prompt of several lengths, tokens of a loop over each run."""
    prompts, tokens = [[5, 6, 7, 8] * 4, [1, 2, 3]], np.asarray([[3, 1], [5, 9]])
    recipe = make(method, None if method == "full" else 8, {"kernels": "xla"})
    make_model = lambda: oracle.random_model(3, num_layers=5, windows=WINDOWS)
    together = stacked(make_model())
    assert len(together.layers) == len(list(together.layers)) == 5 and len(together.layers.stacks) == 1
    assert identity.of_model(together) == identity.of_model(make_model())
    got, want = (oracle.run(model, recipe, prompts, tokens)[0] for model in (together, make_model()))
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@pytest.mark.parametrize("windows, programs", [((), 1), ((8, None) * 3, 2)], ids=["full", "windows"])
def test_a_prompt_compiles_a_layer_of_each_window(windows, programs):
    """Whatever the layers' own budgets are, and in stacks, too."""
    recipe = make("pyramidkv", 9, {"kernels": "xla"})
    for layers_in in (lambda model: model, stacked):
        model = layers_in(oracle.random_model(1, num_layers=6, windows=windows, vocab_size=89))
        with traced_functions() as names:
            oracle.start(model, recipe, [[5, 6, 7, 8] * 4], 2)
        assert names.count("_prefill_layer") == programs


def test_a_stack_takes_the_place_of_its_layers():
    model = oracle.random_model(0, num_layers=6)
    apart, size = [jax.tree.leaves(layer) for layer in model.layers], sum(x.nbytes for x in jax.tree.leaves(model))
    values = [[np.array(x) for x in layer] for layer in apart]
    made = stacked(model)
    assert all(x.is_deleted() for layer in apart for x in layer)
    assert sum(x.nbytes for x in jax.tree.leaves(made)) == size
    for layer in modules(made):
        layer.residual_scale = 0.5
    assert [layer.residual_scale for layer in made.layers] == [0.5] * 6
    for layer, kept in zip(made.layers, values, strict=True):
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(layer), kept)


def test_parameters_have_their_paths_wherever_layers_lie_and_gates_are_none_of_them():
    model = kvjax.load().decoder
    assert all(layer.keep is not None for layer in model.layers)
    apart = {path: np.array(x) for path, x in hf.parameters(model)}
    assert apart.keys() == hf.abstract(model.spec, model.dtype)[0].keys()
    together = stacked(model)
    assert together.layers.stacks[0].stack.keep is not None
    for found in (dict(hf.parameters(together)), of_model(together)):
        assert found.keys() == apart.keys()
        jax.tree.map(np.testing.assert_array_equal, found, apart)
    gates = sum(x.nbytes for x in jax.tree.leaves([layer.keep for layer in together.layers]))
    assert gates and weight_bytes(together) == sum(x.nbytes for x in jax.tree.leaves(together)) - gates


def test_layers_of_other_shapes_have_a_stack_of_their_own():
    """Latents of two ranks, as LoRC may leave them."""
    ranks = ((6, 8), (6, 8), (5, 8), (6, 8))
    model = stacked(oracle.random_model(0, num_layers=4, latent=LatentSpec(2, ranks)))
    assert [stack.size for stack in model.layers.stacks] == [2, 1, 1]
    assert [model.layers[i].attention.k.up.shape[1] for i in range(4)] == [6, 6, 5, 6]
