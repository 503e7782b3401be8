"""Kill a training run again and again."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

CPU = {**os.environ, "JAX_PLATFORMS": "cpu"}


def kill(line: Sequence[str], log: Path, among: range, times: int = 5) -> None:
    """Start a command several times, and kill it when its log has some number of lines, larger every time."""
    for lines in np.sort(np.random.default_rng(0).choice(np.asarray(among), times, replace=False)).tolist():
        process = subprocess.Popen(line, env=CPU, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= lines):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
