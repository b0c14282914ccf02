"""What this machine has: cores, memory, disks."""

from __future__ import annotations

import os
from pathlib import Path

from recast_cli.errors import RecipeError


def cpu_count() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def require_threads(threads: int) -> None:
    """Refuse a number of threads that torch cannot start or that would only get in each other's way.

    Raises:
        RecipeError: naming the most.
    """
    cores = cpu_count()
    if not 1 <= threads <= 4 * cores:
        raise RecipeError(f"threads is {threads}, needed 1 to {4 * cores} on {cores} cores", "leave it out")


def memory_bytes() -> int | None:
    """Memory this process may use: the machine's, or the container's limit where that is lower."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):  # no such file, or the word "max"
            continue
    return total


def nearest_parent(path: Path) -> Path:
    """`path` itself if it exists, else the nearest thing above it that does."""
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
