"""Kernels in C++ for CPUs: compiled for this machine at first use, and kept on disk.

The system's compiler (`$CXX`, `c++`, `g++` or `clang++`) makes a library of a source in `kvjax/kernels` in
`$XDG_CACHE_HOME` or `~/.cache`. Its name says what it was made of: the sources, jaxlib, the processor, the compiler.
"""

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jaxlib.version

FLAGS = ("-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", "-w")
COMPILERS = ("c++", "g++", "clang++")
SHARED = Path(__file__).with_name("native.h")


def register(name: str, source: Path, symbol: str) -> None:
    """Make a function of a source what XLA calls by a name; raises `NotImplementedError` where that cannot be."""
    reason = _registered(name, source, symbol)
    if reason:
        raise NotImplementedError(reason)


@functools.cache
def _registered(name: str, source: Path, symbol: str) -> str:
    """Why it could not be registered; empty where it was. It is tried once."""
    compiler = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CXX"), *COMPILERS)))), None)
    if compiler is None:
        return "there is no C++ compiler: install g++ or clang++"
    texts = (x.read_text(encoding="utf-8") for x in (source, *sorted(source.parent.glob("*.h")), SHARED))
    made_of = (*texts, jaxlib.version.__version__, _processor(), compiler, *FLAGS)
    key = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    place = Path("kvjax", "kernels", f"{source.parent.name}-{key}.so")
    try:
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / place
        if not path.exists():
            _compile(compiler, source, path)
        found = getattr(ctypes.CDLL(str(path)), symbol)
    except (OSError, RuntimeError, AttributeError) as error:  # no home; no such symbol
        return f"{place} cannot be made or read: {error}"
    except subprocess.CalledProcessError as error:
        why = next((line for line in error.stderr.splitlines() if "error" in line), f"status {error.returncode}")
        return f"{compiler} cannot compile {source.name}: {why}"
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(found), platform="cpu")
    return ""


def _compile(compiler: str, source: Path, path: Path) -> None:
    """Make a library; processes that do so at once each put a whole file in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        headers = "-I", jax.ffi.include_dir(), "-I", str(SHARED.parent)
        command = [compiler, *FLAGS, *headers, str(source), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
        with made.open("rb") as file:
            os.fsync(file.fileno())  # whole, or not there: half a library ends a process
        made.replace(path)


def _processor() -> str:
    """What the compiler's -march=native depends on."""
    try:
        known = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return " ".join(platform.uname())
    return " ".join(sorted(set(re.findall(r"(?m)^(?:model name|flags|Features|CPU part)\s*:.*", known))))
