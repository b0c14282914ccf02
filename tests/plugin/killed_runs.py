"""Run `recast train` and kill all of it at once, Ray's daemons included, when a condition holds."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

PROGRAM = "import sys; from recast_cli.main import main; sys.argv[0] = 'recast'; main()"


def train_until(
    when: Callable[[], bool], arguments: Sequence[str], cwd: Path, timeout: float = 400
) -> subprocess.Popen[str]:
    """Start `recast train ARGUMENTS` and SIGKILL it and every process below it once `when()` is true.

    Returns:
        The dead process; `returncode` is -9, or its own if it ended before `when()` held.
    """
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "train", *arguments],
        cwd=cwd,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline, looked = time.monotonic() + timeout, 0.0
    below: list[psutil.Process] = []
    while child.poll() is None and not when():
        assert time.monotonic() < deadline, f"nothing to kill within {timeout} s"
        if time.monotonic() > looked + 1:  # now and not at the end: a checkpoint is written in no time
            below, looked = psutil.Process(child.pid).children(recursive=True), time.monotonic()
        time.sleep(0.001)
    child.kill()
    for process in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    child.wait()
    psutil.wait_procs(below, timeout=20)
    return child
