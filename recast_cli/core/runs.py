"""Runs of consecutive places, as rows of different lengths have them in one flat array."""

from __future__ import annotations

import numpy as np


def runs(starts_R: np.ndarray | int, sizes_R: np.ndarray) -> np.ndarray:
    """`start, start + 1, ...`, as many as `size` says, one run after the other.

    Args:
        starts_R: Where each of the R runs starts; one number for all of them to start there.
        sizes_R: Length of each, 0 or more.
    """
    ends_R = np.cumsum(sizes_R)
    return np.arange(ends_R[-1] if len(ends_R) else 0) + np.repeat(starts_R - (ends_R - sizes_R), sizes_R)
