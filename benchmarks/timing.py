"""Arms that take turns, and how they compare."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def in_turns(
    arms: Mapping[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Seconds of each arm's repeats, which take turns; a first one is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + 1):
        for name, arm in arms.items():
            start = clock()
            arm()
            if repeat:
                seconds[name].append(clock() - start)
    return seconds


def compared(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Median, extremes and the ratio of medians over arm `recast`."""
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    return {
        name: {
            "median_s": medians[name],
            "min_s": min(found),
            "max_s": max(found),
            "ratio": medians[name] / medians["recast"],
        }
        for name, found in seconds.items()
    }
