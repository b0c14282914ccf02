"""A small workspace for `recast profile`, and the command."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

RECIPE = """
data: data
tokenizer: tokenizer
out: run
seed: 3
device: cpu
threads: 1
ray_cpus: 8
rl: {kl_coef: 0.001, learning_rate: 1.0e-4}
"""


PHASES = ("old_log_prob", "ref_log_prob", "actor_update", "optimizer")


def traced(path: Path) -> list[str]:
    """Phases of a Chrome trace in the order in which they ran; all but the optimiser multiply matrices."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    slices = [event for event in events if event.get("ph") == "X" and event.get("cat") == "user_annotation"]
    phases = sorted(
        (event for event in slices if event["name"] in PHASES), key=lambda event: float(event["ts"])
    )
    products = [float(event["ts"]) for event in events if event.get("name") in ("aten::mm", "aten::addmm")]
    for phase in phases:
        begin, end = float(phase["ts"]), float(phase["ts"]) + float(phase["dur"])
        assert phase["name"] == "optimizer" or any(begin < ts < end for ts in products), phase["name"]
    return [event["name"] for event in phases]


def recast(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = "import sys; from recast_cli.main import main; sys.argv[0] = 'recast'; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
