"""`recast profile`: record once, replay through both arms, each job in a fresh process, then summarise."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recast_cli.core.cost import ModelShape
from recast_cli.errors import EnvironmentFault
from recast_cli.outputs import atomic_text
from recast_cli.profiling.collect import (
    Run,
    arm_cost,
    in_turns,
    measured_steps,
    ratio_ranges,
    ratios,
    read_run,
    worker_ratios,
)
from recast_cli.profiling.record import Recording

ARMS = {"stock": "grpo", "recast": "recast"}  # arm -> method of the recipe
MANAGER = "verl_recast.rollout.replay.ReplayLoopManager"


@dataclass(frozen=True)
class Job:
    """One verl job to launch: what it needs on top of a normal run of `method`."""

    arm: str
    repeat: int
    folder: Path
    custom: dict[str, str]
    environment: dict[str, str]

    @property
    def method(self) -> str:
        return ARMS[self.arm]


Launch = Callable[[Job], list[dict[str, Any]]]  # runs it to its end and returns verl's metrics


def replay(
    recording: Recording, launch: Launch, folder: Path, *, steps: int, repeats: int, traced: int = 0
) -> list[Run]:
    """Run every arm `repeats` times, arms in turns.

    Args:
        traced: 1 adds a step that torch's profiler watches, written to `folder`/ARM-REPEAT/trace.

    Raises:
        EnvironmentFault: two jobs did not see the same rollouts.
    """
    runs = []
    for repeat, arm in in_turns(ARMS, repeats):
        job = _job(recording, arm, repeat, folder / f"{arm}-{repeat + 1}", steps, traced)
        metrics = launch(job)
        measured, replayed = job.environment["RECAST_MEASURE"], job.custom["log"]
        runs.append(read_run(arm, metrics, Path(measured), Path(replayed), steps, traced))
    digests = frozenset().union(*(run.rollouts for run in runs))
    if len(digests) != 1:
        raise EnvironmentFault(
            f"the jobs replayed {len(digests)} different sets of rollouts, needed one", f"see {folder}"
        )
    return runs


def _job(recording: Recording, arm: str, repeat: int, folder: Path, steps: int, traced: int) -> Job:
    folder.mkdir(parents=True)
    folder = folder.resolve()
    return Job(
        arm,
        repeat,
        folder,
        custom={"replay": str(recording.path.resolve()), "log": str(folder / "replayed.jsonl")},
        environment=measured_steps(folder, steps, traced),
    )


def summarise(
    runs: list[Run],
    recording: Recording,
    config: Mapping[str, Any],
    *,
    peak_flops: float,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """The result: `cost` for a summary, `arms` with everything, and `setting`, what it was run on.

    Args:
        config: The model's `config.json`.
        peak_flops: Operations per second of this machine, see `matmul_peak`.
        facts: Settings and versions, recorded as they are.
    """
    shape = ModelShape.from_config(config)
    arms = {arm: arm_cost([run for run in runs if run.arm == arm], shape, peak_flops) for arm in ARMS}
    stock, recast = arms["stock"], arms["recast"]
    signal = next(run.signal for run in runs if run.arm == "recast")
    num_groups = len(recording.prompt_tokens)
    return {
        "cost": {
            "ratio": ratios(stock, recast),
            "ratio_range": ratio_ranges(stock, recast),
            "worker_ratio": worker_ratios(stock, recast),
            "tokens": {arm: cost["tokens"] for arm, cost in arms.items()},
            "mfu": {arm: cost["mfu"] for arm, cost in arms.items()},
            "kept": {
                "samples": int(signal["signal/kept_samples"]),
                "trainable_groups": num_groups - int(signal["signal/skipped_groups"]),
                "rollouts": int(signal["signal/rollouts"]),
            },
        },
        "arms": arms,
        "setting": {
            "prompts": num_groups,
            "prompt_tokens_mean": float(np.mean(recording.prompt_tokens)),
            "prompt_tokens_max": max(recording.prompt_tokens),
            "parameters": recording.parameters,
            "matmul_parameters": shape.matmul_parameters,
            "peak_flops": peak_flops,
            "rollouts_sha256": next(iter(runs[0].rollouts)),
            **machine(),
            **facts,
        },
    }


def machine() -> dict[str, Any]:
    """Processor, cores, and how busy the machine is while this is asked."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux, or an ARM kernel that names no model
    return {"cpu": name, "cores": os.cpu_count(), "load_average": list(os.getloadavg())}


def save(result: dict[str, Any], folder: Path) -> None:
    """Write profile.json."""
    atomic_text(folder / "profile.json", json.dumps(result, indent=2) + "\n")
