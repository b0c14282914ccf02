"""Run `recast train` and kill all of it at once, Ray's daemons included, when a condition holds."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

PROGRAM = "import sys; from recast_cli.main import main; sys.argv[0] = 'recast'; main()"
Child = subprocess.Popen[str]


def start(cwd: Path, *arguments: str) -> Child:
    """Start `recast ARGUMENTS`."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=cwd,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(
    when: Callable[[], bool], child: Child, look: Callable[[], None] = lambda: None, timeout: float = 400
) -> None:
    """Wait until `when()` is true or the child ended; `look()` is called once a second."""
    deadline, looked = time.monotonic() + timeout, 0.0
    while child.poll() is None and not when():
        assert time.monotonic() < deadline, f"nothing happened within {timeout} s"
        if time.monotonic() > looked + 1:
            look()
            looked = time.monotonic()
        time.sleep(0.001)


def train_until(when: Callable[[], bool], arguments: list[str], cwd: Path) -> Child:
    """Start `recast train ARGUMENTS` and SIGKILL it and every process below it once `when()` is true.

    Returns:
        The dead process; `returncode` is -9, or its own if it ended before `when()` held.
    """
    child = start(cwd, "train", *arguments)
    below: list[psutil.Process] = []

    def look() -> None:  # now and not at the end: a checkpoint is written in no time
        with contextlib.suppress(psutil.NoSuchProcess):
            below[:] = psutil.Process(child.pid).children(recursive=True)

    try:
        wait_for(when, child, look)
    finally:
        kill_all(child, below)
    child.communicate()
    return child


def kill_all(child: Child, below: list[psutil.Process] | None = None) -> None:
    """SIGKILL a process and its descendants, `below` if they are known, the parents first."""
    if child.poll() is not None:
        return
    below = psutil.Process(child.pid).children(recursive=True) if below is None else below
    child.kill()
    for process in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    child.wait()
    psutil.wait_procs(below, timeout=20)
