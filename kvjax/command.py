"""What the command lines share: one clear line for bad input, TOML configs, the persistent compilation cache."""

import argparse
import os
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from kvjax.errors import InputError


def run(prog: str, main: Callable[[], None]) -> None:
    """Run a command; bad input is one line on stderr and exit code 2."""
    try:
        main()
    except InputError as error:
        fail(prog, str(error))
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)


def fail(prog: str, message: str) -> None:
    """Exit with code 2 and one line on stderr."""
    print(f"{prog}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Exit with code 2."""
        fail(self.prog, f"{message} (see --help)")


def read_config(path: Path, options: set[str]) -> dict[str, Any]:
    """The options of a TOML file: long flag names with underscores, and a table `[arguments]` for the method.

    Args:
      path: the file.
      options: names that are accepted.
    """
    try:
        config = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML: {error}") from None
    for key in config:
        if key not in options:
            raise InputError(f"{path}: unknown option {key!r}: choose from {', '.join(sorted(options))}")
    if not isinstance(config.get("arguments", {}), dict):
        raise InputError(f"{path}: 'arguments' is a table: write [arguments] and one line per argument")
    return config


def read_settings(pairs: list[str]) -> dict[str, str]:
    """`--set key=value` flags as a dict."""
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InputError(f"--set {pair!r} is not key=value")
        settings[key] = value
    return settings


def use_compilation_cache() -> None:
    """Keep compiled programs on disk, so that the second run starts at once.

    They go to `$JAX_COMPILATION_CACHE_DIR`, or to `kvjax/` in the user's cache folder.
    """
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(base) / "kvjax" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
