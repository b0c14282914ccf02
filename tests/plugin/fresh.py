"""Run a program in a fresh process and get back what it wrote as JSON to the file named by `sys.argv[1]`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any


def run_fresh(program: str, **env: str) -> tuple[Any, subprocess.CompletedProcess[str]]:
    """(JSON the program wrote, the finished process); variables of verl in our environment are left out."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith("VERL_")}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        process = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program), str(out)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={**plain, "OMP_NUM_THREADS": "1", **env},
        )
        return (json.loads(out.read_text()) if out.exists() else None), process
