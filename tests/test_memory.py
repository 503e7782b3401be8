"""A long prompt is compressed layer by layer, and no T x T matrix is ever there."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
import kvjax
from flax import nnx
from kvjax.generation.model import Model
from kvjax.models.decoder import Decoder
from kvjax.spec import ModelSpec

small = {"vocab_size": 1172, "embed_dim": 128, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
spec = ModelSpec(**small, mlp_dim=352, max_position=32768)
model = Model(Decoder(spec, rngs=nnx.Rngs(0)), None, (), "random")
prompt = np.random.default_rng(0).integers(0, spec.vocab_size, 16384).tolist()
out = model.generate([prompt], kvjax.methods.h2o("20%"), max_new_tokens=4)
assert out.slots == [[3276] * 4], out.slots
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_h2o_reads_16384_tokens_in_less_than_2_gb():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2e9
