"""The decode loop compiles for a TPU without one, and updates the page pool in place. Needs `pip install '.[aot]'`."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from kvjax import decode, sampling
from kvjax.methods import METHODS, make
from kvjax.models.decoder import Decoder
from kvjax.spec import Lengths, ModelSpec

pytest.importorskip("libtpu")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # libtpu's own warnings

SPEC = ModelSpec(
    vocab_size=1024, embed_dim=512, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=128, mlp_dim=1024,
    max_position=32768,
)  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_the_decode_loop_compiles_for_tpu_and_copies_no_pool(method, monkeypatch):
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    sharding = NamedSharding(Mesh([device], ("x",)), PartitionSpec())
    place = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
    scalar = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    recipe = make(method, None if method == "full" else 2048)
    model = nnx.eval_shape(lambda: Decoder(SPEC, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    cache = jax.eval_shape(lambda: decode.init_cache(model, recipe, Lengths((16000, 9000), 64, 16384)))
    chooser = jax.eval_shape(lambda: sampling.chooser(sampling.Sampling(), 2))
    state = decode.State(
        cache, scalar((2,), jnp.int32), scalar((2,), jnp.int32), scalar((2,), jnp.bool), scalar((), jnp.int32), None
    )  # fmt: skip
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=AbstractDevice(device.device_kind, 1, "tpu"))
    with use_abstract_mesh(mesh):
        traced = decode.decode_loop.trace(
            place(model), place(state), place(chooser), scalar((1,), jnp.int32), scalar((), jnp.int32),
            recipe=recipe, mode="greedy", chunk=16,
        )  # fmt: skip
        memory = traced.lower(lowering_platforms=("tpu",)).compile().memory_analysis()
    pool = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes >= pool
    # The pools have 17 to 110 MB. XLA pads the two scales of a low-bit slot to 128 lanes where it copies them.
    assert memory.temp_size_in_bytes < (140e6 if method == "mikv" else 6e6)
