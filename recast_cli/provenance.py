"""What a result was made with: versions of the packages that decide numbers, and the state of the code."""

from __future__ import annotations

import subprocess
from importlib import metadata

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
    """Commit of the working directory's repository, marked `+` if it has changes; None outside of one."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if dirty else "")
