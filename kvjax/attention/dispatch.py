"""Which kernels run: those of this platform, and XLA with a line that says so where there is none."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

from kvjax.errors import InputError, say_once
from pallas_kernels.decode_attention import cpu
from pallas_kernels.implementation import Implementation, resolve

T = TypeVar("T")
DECODE = "decode attention"
ON_XLA = " on XLA, not in a kernel: "


def check(kernels: Implementation | None) -> None:
    """Raise `InputError` for kernels of another platform; say, before a text begins, that one cannot be compiled."""
    if kernels in ("tpu", "gpu") and kernels != jax.default_backend():
        raise InputError(f"kernels={kernels} cannot run on {jax.default_backend()}: use auto, xla or interpret")
    if resolve(kernels, cpu=True) == "cpu":
        try:
            cpu.register()
        except NotImplementedError as error:
            say_once(f"{DECODE}{ON_XLA}{error}")


def kernel_or_xla(name: str, run: Callable[..., T], kernels: Implementation | None, *args: Any, **kwargs: Any) -> T:
    """What a kernel computes, or plain XLA with a line that says why; `cpu` asks for one where there is one."""
    try:
        return run(*args, implementation=kernels, **kwargs)
    except NotImplementedError as error:
        if kernels != "cpu":
            say_once(f"{name}{ON_XLA}{error}")
        return run(*args, implementation="xla", **kwargs)
