"""`recast` as a user calls it, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = "import sys; from recast_cli.main import main; sys.argv[0] = 'recast'; main()"


def recast(folder: Path, *arguments: str, **environment: str) -> str:
    """Run a command in a folder; what it printed."""
    command, env = [sys.executable, "-c", PROGRAM, *arguments], {**os.environ, **environment}
    done = subprocess.run(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout
