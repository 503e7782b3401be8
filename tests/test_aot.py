"""Kernels and decode loops compile for accelerators that are not there. Needs `pip install '.[aot]'`."""

import pytest

from kvjax.methods import METHODS
from kvjax.plan.aot import GPUS, TPUS, missing, run
from kvjax.plan.chips import find
from tests.lib import aot, whole_step

ONCE = ("segment_merge", "topk_retain")  # kernels that read nothing twice
TARGETS = (*TPUS, "sm_80", "sm_90")
LOOPS = [*METHODS, "full+store=int4", "full+store=kivi2", "h2o+store=int8"]


def installed(target: str) -> None:
    if reason := missing(target):
        pytest.skip(reason)


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_without_copies_and_spills(target):
    installed(target)
    found = run(target, "tests.lib.aot", dump=True)
    assert len(found) == len(list(aot.cases(target)))
    neither_copies_nor_spills(target, found)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_other_shapes_compile_without_copies_and_spills(target):
    installed(target)
    found = run(target, "tests.lib.aot", "more", dump=True)
    assert len(found) == len(list(aot.more(target)))
    neither_copies_nor_spills(target, found)


def neither_copies_nor_spills(target, lines):
    for line in lines:
        # The partial results of a GPU's splits, or logits; never a copy of a pool.
        least, share = aot.allowance(line)
        assert line["temp"] < max(least, share * line["arguments"]), line
        if target in GPUS:
            coded_latents = "latent" in line["options"] and line["store"] != "dense"
            assert line["asynchronous"] or coded_latents or line["kernel"] in ONCE, line
            # Known to spill: joint latents on an A100, which has no products of whole warp groups.
            joint = target == "sm_80" and line["options"].get("latent", [1])[0] > 1
            assert line["spilled"] == 0 or (joint and line["spilled"] < 1000), line


@pytest.mark.slow
@pytest.mark.parametrize(("target", "width"), [("v5e", 128), ("v5e", 64), ("sm_90", 128)])
def test_every_decode_loop_compiles_and_updates_its_pools_in_place(target, width):
    """Heads of 64 are narrower than a TPU's lanes."""
    installed(target)
    found = run(target, "tests.lib.aot", "loop", str(width), *LOOPS)
    assert len(found) == 2 * len(LOOPS)
    for line in found:
        assert line["aliased"] >= line["pool"]
        # The XLA path decodes blocks of slots, where a kernel needs none; a pool is larger than that.
        own = 4e6 if target in GPUS else 1.6e7
        on_xla = line["kernels"] == "xla" or line["method"] == "oracle"
        assert line["temp"] < (2e7 if on_xla else own) < line["pool"], line


def test_a_loop_over_stacked_layers_copies_little_however_many_there_are():
    """A layer's weights are 31 MB. For eight rows keys' and values' projections of all change their layout first."""
    installed("v5e")
    found = {(line["layers"], line["batch"]): line for line in run("v5e", "tests.lib.aot", "depth", "4", "40")}
    for batch, turned in ((1, 0), (8, 40 * 2 * 1024 * 512 * 2)):
        few, many = found[4, batch], found[40, batch]
        assert many["lines"] < 1.1 * few["lines"]
        assert many["temp"] - turned < min(1.5 * few["temp"], 0.01 * many["arguments"])


@pytest.mark.slow
@pytest.mark.parametrize("step", list(whole_step.stated()), ids=lambda step: "-".join(step[:3]))
def test_a_whole_step_of_a_large_model_takes_what_the_docs_state(step):
    """All layers of Llama-3-8B in 16 bits: the table's bytes, and nothing of weights or cache is copied."""
    installed(str(find(step.chip.split()[0]).target))
    found, there = whole_step.compile_step(*step[:3])
    assert found == step
    assert there <= found.arguments < 1.001 * there
    assert found.temporary < 0.05 * there
