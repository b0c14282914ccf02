"""What the tests that start real verl jobs share: one recipe, `recast` and verl in child processes, kills.

The learning rate is far too high on purpose: weights that did not reach the rollout server show at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

SEED, PROMPTS, GROUP, STEPS = 3, 4, 4, 2
RECIPE = f"""
seed: {SEED}
device: cpu
threads: 1
ray_cpus: 8
data: {{data}}
tokenizer: {{tokenizer}}
warm_start: {{{{out: warm_start, epochs: 2, batch_size: 32, learning_rate: 3.0e-3}}}}
rl:
  steps: {STEPS}
  prompts_per_step: {PROMPTS}
  group_size: {GROUP}
  learning_rate: 0.01
  warmup_steps: 0
  save_every: 1
"""


@dataclass(frozen=True)
class Job:
    """A finished `recast train`."""

    code: int
    stdout: str
    stderr: str
    out: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        lines = (self.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["data"] for line in lines]

    def dump(self, step: int) -> list[dict[str, Any]]:
        """verl's own record of the rollouts that reached the end of a step."""
        path = self.out.parent / f"{self.out.name}-rollouts" / f"{step}.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


PROGRAM = "import sys; from recast_cli.main import main; sys.argv[0] = 'recast'; main()"
Child = subprocess.Popen[str]


def start(cwd: Path, *arguments: str, **env: str) -> Child:
    """Start `recast ARGUMENTS`."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=cwd,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def recast(workspace: Path, *arguments: str, timeout: float = 420, path: str = "") -> tuple[int, str, str]:
    """Run `recast` to its end, and end all of it if it takes too long."""
    child = start(workspace, *arguments, PYTHONPATH=path)
    try:
        stdout, stderr = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGINT)  # `recast` ends verl's process group
        stdout, stderr = child.communicate(timeout=60)
        pytest.fail(f"recast {' '.join(arguments)} took over {timeout} s\n{stdout[-2000:]}{stderr[-2000:]}")
    return child.returncode, stdout, stderr


def train(workspace: Path, name: str, *overrides: str) -> Job:
    out = workspace / name
    arguments = ["train", "recipe.yaml", f"out={name}", *overrides]
    if "method.name=sft-continued" not in overrides:
        arguments.append(f"verl.trainer.rollout_data_dir={workspace / f'{name}-rollouts'}")
    return Job(*recast(workspace, *arguments), out)


def succeed(job: Job) -> Job:
    assert job.code == 0, job.stdout[-2000:] + job.stderr[-2000:]
    return job


def main_ppo(arguments: Sequence[str], cwd: Path, **env: str) -> list[dict[str, Any]]:
    """Run verl's own entry point on the CPU as a launch script does; the metrics of its steps."""
    metrics = cwd / "metrics.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "verl.trainer.main_ppo", *arguments],
        cwd=cwd,
        env={
            **os.environ,
            "VERL_PLATFORM": "cpu",
            "VERL_FILE_LOGGER_PATH": str(metrics),
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            **env,
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=420,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return [json.loads(line)["data"] for line in metrics.read_text(encoding="utf-8").splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


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
