"""Runs of places, by hand."""

from __future__ import annotations

import numpy as np

from recast_cli.core.runs import runs


def test_runs_by_hand() -> None:
    assert runs(np.array([7, 0, 3]), np.array([2, 0, 3])).tolist() == [7, 8, 3, 4, 5]
    assert runs(0, np.array([2, 0, 3])).tolist() == [0, 1, 0, 1, 2]  # counts within each


def test_no_run_is_no_place() -> None:
    assert runs(0, np.array([], dtype=np.int64)).tolist() == []
    assert runs(np.array([5, 9]), np.array([0, 0])).tolist() == []
