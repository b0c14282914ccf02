"""What a result was made with: versions of the packages that decide numbers, and the state of the code."""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("verl-recast", "verl", "torch", "transformers", "ray", "tensordict", "TransferQueue", "numpy")


def versions() -> dict[str, str]:
    """Installed versions of what decides a result's numbers."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def git_state() -> str | None:
    """Commit of the checkout that recast runs from, marked `+` if it has changes; None if it is installed."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        if not git("ls-files", Path(__file__).name):  # an environment inside somebody else's repository
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
