"""Signal statistics of a batch of groups, by hand."""

import numpy as np
import pytest

from recast_cli.core.signal import group_statistics


def test_hand_made_batch():
    rewards = np.array([[0, 0], [1, 0], [1, 1], [0, 0]], dtype=float)
    scores = np.array([[0.1, 0], [1, 0.01], [1, 1], [0, 0]])
    codes = np.array([[[1], [2]], [[3], [4]], [[5], [5]], [[6], [-1]]])
    valid = np.array([[1, 1], [1, 1], [1, 1], [1, 0]], dtype=bool)
    found = group_statistics(rewards, scores, codes, valid)
    assert found == pytest.approx(
        {
            "all_zero": 2 / 4,
            "single_hit": 1 / 4,
            "multi_hit": 1 / 4,
            "hit_rate": 3 / 8,
            "mean_score": (0.1 + 1 + 0.01 + 1 + 1) / 8,
            "invalid": 1 / 8,
            "duplicate": 1 / 7,  # 7 valid rollouts, the second 5 repeats the first
        }
    )


def test_no_groups_give_zeros():
    empty = group_statistics(np.zeros((0, 4)), np.zeros((0, 4)), np.zeros((0, 4, 3)), np.zeros((0, 4), bool))
    assert set(empty.values()) == {0.0}


def test_absent_rollouts_count_nowhere():
    rewards, scores = np.array([[1.0, 0.0, 9.0]]), np.array([[1.0, 0.1, 9.0]])
    codes, valid = np.array([[[1], [2], [1]]]), np.array([[True, False, True]])
    found = group_statistics(rewards, scores, codes, valid, np.array([[True, True, False]]))
    assert found["hit_rate"] == 1 / 2
    assert found["mean_score"] == pytest.approx((1.0 + 0.1) / 2)
    assert found["invalid"] == 1 / 2
    assert found["single_hit"] == 1.0
    assert found["duplicate"] == 0.0
