"""A small workspace for `recast profile`, and the command."""

from __future__ import annotations

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
