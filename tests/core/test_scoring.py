"""Hit reward and structural score: worked out by hand, and against plain loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recast_cli.core.scoring import matched_levels, prefix_value, score_rollouts, score_sets


@pytest.mark.parametrize(
    ("matched", "num_levels", "expected"),
    [
        (3, 3, 1.0),
        (2, 3, 0.1),
        (1, 3, 0.01),
        (0, 3, 0.0),
        (4, 4, 1.0),
        (1, 4, 0.001),
        (1, 1, 1.0),
        (0, 1, 0.0),
    ],
)
def test_prefix_value_is_a_power_of_ten_of_the_missing_levels(matched, num_levels, expected):
    assert prefix_value(np.int64(matched), num_levels) == pytest.approx(expected, rel=1e-12)


def test_prefix_stops_at_the_first_difference():
    # the third code agrees, but only behind a difference
    assert matched_levels(np.array([[[1, 9, 3]]]), np.array([[[1, 2, 3]]])).tolist() == [[[1]]]


def test_rollouts_are_scored_against_their_best_target():
    codes_BGL = np.array([[[1, 2, 3], [1, 2, 9], [1, 9, 9], [9, 2, 3]]])
    targets_BTL = np.array([[[1, 2, 3], [9, 9, 9]]])
    rewards, scores = score_rollouts(codes_BGL, targets_BTL, np.ones((1, 2), bool), np.ones((1, 4), bool))
    assert rewards.tolist() == [[1, 0, 0, 0]]
    # the last one shares one code with the second target and none with the first
    assert scores == pytest.approx(np.array([[1, 0.1, 0.01, 0.01]]))


def test_rollout_without_a_semantic_id_and_prompt_without_target_score_nothing():
    codes_BGL = np.array([[[1, 2, 3]], [[1, 2, 3]]])
    targets_BTL = np.array([[[1, 2, 3]], [[1, 2, 3]]])
    rewards, scores = score_rollouts(
        codes_BGL, targets_BTL, np.array([[True], [False]]), np.array([[False], [True]])
    )
    assert rewards.tolist() == scores.tolist() == [[0], [0]]


def test_sets_collapse_duplicates_and_average_over_distinct_predictions():
    # distinct predictions: an exact hit (1) and one shared code (0.01)
    hit, score = score_sets([(1, 2, 3), (1, 2, 3), (1, 9, 9)], [(1, 2, 3)])
    assert hit == 1.0
    assert score == pytest.approx((1 + 0.01) / 2)
    assert score_sets([], [(1, 2, 3)]) == (0.0, 0.0)
    assert score_sets([(1, 2, 3)], []) == (0.0, 0.0)


def _phi(prediction, target):
    matched = 0
    for mine, wanted in zip(prediction, target, strict=True):
        if mine != wanted:
            break
        matched += 1
    return {0: 0.0}.get(matched, 10.0 ** (matched - len(target)))


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_scores_match_plain_loops(seed):
    rng = np.random.default_rng(seed)
    B, G, T, L = rng.integers(1, 5, size=4)
    codes = rng.integers(0, 3, size=(B, G, L))
    targets = rng.integers(0, 3, size=(B, T, L))
    mask = rng.random((B, T)) < 0.7
    valid = rng.random((B, G)) < 0.8
    rewards, scores = score_rollouts(codes, targets, mask, valid)
    for b in range(B):
        wanted = [tuple(t) for t, on in zip(targets[b], mask[b], strict=True) if on]
        for g in range(G):
            expected = max((_phi(codes[b, g], t) for t in wanted), default=0.0) if valid[b, g] else 0.0
            assert scores[b, g] == pytest.approx(expected)
            assert rewards[b, g] == (valid[b, g] and tuple(codes[b, g]) in wanted)
            predictions = [tuple(codes[b, g])] if valid[b, g] else []
            assert score_sets(predictions, wanted) == pytest.approx((rewards[b, g], expected))
