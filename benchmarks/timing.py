"""Arms that take turns, and how they compare."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

wall = time.perf_counter  # for arms with threads of their own; processor seconds else


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


def compared(seconds: Mapping[str, Sequence[float]], ours: str = "recast") -> dict[str, dict[str, Any]]:
    """Median, extremes and ratio of medians over one arm, with the extremes of the turns' own ratios."""
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    rows: dict[str, dict[str, Any]] = {}
    for name, found in seconds.items():
        turns = [theirs / ours for theirs, ours in zip(found, seconds[ours], strict=True)]
        rows[name] = {
            "median_s": medians[name],
            "min_s": min(found),
            "max_s": max(found),
            "ratio": medians[name] / medians[ours],
            "ratio_range": [min(turns), max(turns)],
        }
    return rows


def show(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Print what `compared` found."""
    for name, row in rows.items():
        seconds = f"{row['median_s']:.2f} s ({row['min_s']:.2f} to {row['max_s']:.2f})"
        print(f"{name:10} {seconds} {row['ratio']:.2f}x", flush=True)
