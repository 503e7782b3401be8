"""Chips and their published figures: what a plan is held against.

Dense products, no sparsity; one JAX device each. Source: Google's TPU pages (cloud.google.com/tpu/docs, system
architecture of each generation), NVIDIA's data sheets of the SXM and PCIe parts named.
"""

from typing import Literal, NamedTuple

from kvjax.errors import unknown

GIB = 2**30
Platform = Literal["tpu", "gpu"]


class Chip(NamedTuple):
    """One device."""

    name: str
    memory: int  # bytes, as published
    usable: int  # bytes that a program may have
    bandwidth: int  # bytes / s
    flops: int  # products and sums of 16-bit numbers / s
    target: str | None  # what `kvjax.plan.aot` compiles for; None = it cannot
    note: str = ""

    @property
    def platform(self) -> Platform:
        """What programs are made for."""
        return "tpu" if self.name.startswith("TPU") else "gpu"


def _tpu(name: str, memory: float, usable: float, bandwidth: int, tflops: float, target: str, note: str = "") -> Chip:
    """A TPU [GiB, GB/s, TFLOP/s]; the compiler refuses programs that need more than is usable, and says so."""
    return Chip(name, int(memory * GIB), int(usable * GIB), bandwidth * 10**9, int(tflops * 10**12), target, note)


def _gpu(name: str, memory: int, bandwidth: int, tflops: int, target: str | None, note: str = "") -> Chip:
    """A GPU [GB, GB/s, TFLOP/s]; the driver, CUDA and cuBLAS take a twentieth."""
    size = memory * 10**9
    return Chip(name, size, size * 19 // 20, bandwidth * 10**9, tflops * 10**12, target, note)


_HALF = "JAX sees each of the two halves of a chip as a device: the figures are of one"
CHIPS = {
    "v4": _tpu("TPU v4", 32.0, 30.75, 1228, 275.0, "v4"),
    "v5e": _tpu("TPU v5e", 16.0, 15.75, 819, 197.0, "v5e"),
    "v5p": _tpu("TPU v5p", 95.74, 95.74, 2765, 459.0, "v5p"),
    "v6e": _tpu("TPU v6e", 32.0, 31.25, 1640, 918.0, "v6e"),
    "7x": _tpu("TPU7x", 96.0, 94.75, 3690, 1153.5, "tpu7x", _HALF),
    "a100": _gpu("A100 80 GB SXM", 80, 2039, 312, "sm_80"),
    "h100": _gpu("H100 80 GB SXM", 80, 3350, 989, "h100"),
    "h200": _gpu("H200 141 GB SXM", 141, 4800, 989, "sm_90"),
    "l4": _gpu("L4", 24, 300, 121, "sm_89"),
    "t4": _gpu("T4", 16, 320, 65, None, "it has no bfloat16 products: the figure is float16's, bfloat16 runs slower"),
}


def find(name: str) -> Chip:
    """A chip by name, in any case.

    >>> find("H100").bandwidth
    3350000000000
    """
    if name.lower() not in CHIPS:
        raise unknown("chip", name, CHIPS)
    return CHIPS[name.lower()]


def chosen(name: str | None, memory: int | None) -> Chip:
    """A chip, or as much memory [bytes] of it as is said; without a name, of one of which nothing else is known."""
    if name is None:
        assert memory is not None
        return Chip("a device", memory, memory, 0, 0, None)
    chip = find(name)
    return chip if memory is None else chip._replace(memory=memory, usable=memory)
