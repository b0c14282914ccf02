"""Repair and contrast: hand-made groups, then a plain-loop reference over random ones."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from recast_cli.core.contrast import pair_advantages, select_pairs
from recast_cli.core.seeding import tie_keys


def _keys(*rows):
    return np.array(rows, dtype=np.uint64)


def test_group_with_a_hit_is_left_alone_and_gives_its_hardest_miss():
    selection = select_pairs(np.array([[0, 1, 0, 0]]), np.array([[0.01, 1, 0.1, 0]]), _keys([1, 2, 3, 4]))
    assert selection.anchor_B.tolist() == [-1]
    assert selection.positive_B.tolist() == [1]
    assert selection.negative_B.tolist() == [2]  # u = 0.1 is the miss nearest to the target
    assert selection.trainable_B.tolist() == [True]


def test_empty_group_is_repaired_at_its_lowest_score():
    selection = select_pairs(np.zeros((1, 4)), np.array([[0.01, 0.1, 0, 0.01]]), _keys([1, 2, 3, 4]))
    assert selection.all_zero_B.tolist() == [True]
    assert selection.anchor_B.tolist() == selection.positive_B.tolist() == [2]
    assert selection.negative_B.tolist() == [1]


def test_a_rollout_that_cannot_lend_leaves_the_anchor_to_the_next_lowest_score():
    lends = np.array([[True, True, False, True]])
    selection = select_pairs(
        np.zeros((1, 4)), np.array([[0.1, 0.01, 0, 0.1]]), _keys([1, 2, 3, 4]), lends_BG=lends
    )
    assert selection.anchor_B.tolist() == selection.positive_B.tolist() == [1]
    assert selection.negative_B.tolist() == [3]  # of the two at 0.1 the larger key
    # a natural hit needs no anchor, whoever could lend
    hit = select_pairs(
        np.array([[1, 0]]), np.array([[1, 0.1]]), _keys([1, 2]), lends_BG=np.array([[False, False]])
    )
    assert (hit.positive_B.tolist(), hit.negative_B.tolist()) == ([0], [1])


def test_an_empty_group_in_which_nobody_lends_is_skipped():
    nobody = np.zeros((1, 4), dtype=bool)
    selection = select_pairs(np.zeros((1, 4)), np.zeros((1, 4)), _keys([1, 2, 3, 4]), lends_BG=nobody)
    assert selection.anchor_B.tolist() == selection.positive_B.tolist() == [-1]
    assert selection.trainable_B.tolist() == [False]


def test_group_that_hits_everywhere_has_no_legal_negative():
    selection = select_pairs(np.ones((1, 3)), np.ones((1, 3)), _keys([1, 2, 3]))
    assert selection.negative_B.tolist() == [-1]
    assert selection.trainable_B.tolist() == [False]


def test_ties_go_to_the_larger_key_and_never_pick_the_anchor_as_negative():
    # all scores tie: the anchor takes the largest key, the negative the largest of the rest
    selection = select_pairs(np.zeros((1, 4)), np.zeros((1, 4)), _keys([7, 1, 9, 8]))
    assert selection.anchor_B.tolist() == [2]
    assert selection.negative_B.tolist() == [3]
    # equal hits: the positive goes to the larger key too
    selection = select_pairs(np.array([[1, 1, 0]]), np.array([[1, 1, 0]]), _keys([5, 6, 1]))
    assert selection.positive_B.tolist() == [1]


def test_rollout_without_semantic_id_is_replaced_first_and_negative_last():
    valid = np.array([[True, False, True]])
    selection = select_pairs(np.zeros((1, 3)), np.zeros((1, 3)), _keys([3, 1, 2]), valid_BG=valid)
    assert selection.anchor_B.tolist() == [1]
    assert selection.negative_B.tolist() == [0]
    # no valid miss is left: the one without a semantic ID is legal after all
    hit_and_nothing = select_pairs(
        np.array([[1, 0]]), np.array([[1, 0]]), _keys([1, 2]), valid_BG=np.array([[True, False]])
    )
    assert hit_and_nothing.negative_B.tolist() == [1]


def test_the_most_probable_of_equally_hard_negatives_is_the_most_confusable():
    scores, keys = np.array([[0.1, 0.1, 0.1, 0.01]]), _keys([1, 4, 3, 2])
    log_probs = np.array([[-2.0, -3.0, np.nan, -0.5]])
    # 3 is lowest and makes room for the anchor; of the three at 0.1 the likeliest, not the largest key
    selection = select_pairs(np.zeros((1, 4)), scores, keys, log_probs_BG=log_probs)
    assert (selection.anchor_B.tolist(), selection.negative_B.tolist()) == ([3], [0])
    # hardness comes first, an unknown log-prob last, and equal log-probs fall back on the key
    harder = np.array([[0.01, 0.1, 0.01, 0.0]])
    assert select_pairs(np.zeros((1, 4)), harder, keys, log_probs_BG=log_probs).negative_B.tolist() == [1]
    unknown = np.array([[np.nan, -700.0, np.nan, -0.5]])
    assert select_pairs(np.zeros((1, 4)), scores, keys, log_probs_BG=unknown).negative_B.tolist() == [1]
    equal = np.array([[-2.0, -2.0, -2.0, -0.5]])
    assert select_pairs(np.zeros((1, 4)), scores, keys, log_probs_BG=equal).negative_B.tolist() == [1]


def test_without_repair_an_empty_group_is_dropped_and_the_others_keep_their_pair():
    rewards, scores = np.array([[0, 0, 0], [0, 1, 0]]), np.array([[0.1, 0, 0.01], [0.01, 1, 0.1]])
    selection = select_pairs(rewards, scores, _keys([1, 2, 3], [1, 2, 3]), repair=False)
    assert selection.anchor_B.tolist() == [-1, -1]
    assert selection.trainable_B.tolist() == [False, True]
    assert (selection.positive_B[1], selection.negative_B[1]) == (1, 2)


def test_group_of_one_cannot_be_trained():
    selection = select_pairs(np.zeros((1, 1)), np.zeros((1, 1)), _keys([1]))
    assert selection.anchor_B.tolist() == [0]
    assert selection.trainable_B.tolist() == [False]


def test_advantages_are_plus_and_minus_w():
    assert pair_advantages(np.array([1.0, 0.0])).tolist() == [1.0, -1.0]
    assert pair_advantages(np.array([1.0, 0.0]), w_positive=2, w_negative=0.25).tolist() == [2.0, -0.25]


def _reference(rewards, scores, keys, present, valid, lends, log_probs, repair):
    """One group, in plain Python: (anchor, positive, negative)."""
    rows = [g for g in range(len(rewards)) if present[g]]
    anchor = -1
    lenders = [g for g in rows if lends[g] and repair]
    if lenders and not any(rewards[g] > 0 for g in rows):
        anchor = min(lenders, key=lambda g: (scores[g], valid[g], -int(keys[g])))
    hits = [g for g in rows if rewards[g] > 0]
    positive = anchor if anchor >= 0 else max(hits, key=lambda g: (rewards[g], keys[g]), default=-1)
    misses = [g for g in rows if rewards[g] <= 0 and g != anchor]

    def confusable(g):
        return -math.inf if math.isnan(log_probs[g]) else log_probs[g]

    negative = max(misses, key=lambda g: (valid[g], scores[g], confusable(g), keys[g]), default=-1)
    return anchor, positive, negative


@settings(max_examples=200)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.5, 1.0]), st.booleans(), st.booleans())
def test_matches_the_plain_loop_on_ragged_groups(seed, lending, by_log_prob, repair):
    rng = np.random.default_rng(seed)
    B, G = rng.integers(1, 6), rng.integers(1, 9)
    present = rng.random((B, G)) < 0.85
    valid = (rng.random((B, G)) < 0.8) & present
    hit = (rng.random((B, G)) < rng.choice([0.0, 0.1, 0.9])) & valid
    scores = np.where(hit, 1.0, np.where(valid, rng.choice([0.0, 0.01, 0.1], size=(B, G)), 0.0))
    lends = rng.random((B, G)) < lending
    keys = tie_keys(int(seed), 3, np.arange(B), G)
    log_probs = rng.choice([-3.0, -1.0, np.nan] if by_log_prob else [0.0], size=(B, G))
    found = select_pairs(
        hit.astype(float),
        scores,
        keys,
        present_BG=present,
        valid_BG=valid,
        lends_BG=lends,
        log_probs_BG=log_probs if by_log_prob else None,
        repair=repair,
    )
    for b in range(B):
        group = (present[b], valid[b], lends[b], log_probs[b])
        expected = _reference(hit[b].astype(float), scores[b], keys[b], *group, repair)
        assert (found.anchor_B[b], found.positive_B[b], found.negative_B[b]) == expected


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1))
def test_permuting_a_group_permutes_its_answer(seed):
    rng = np.random.default_rng(seed)
    G = int(rng.integers(2, 9))
    scores = rng.choice([0.0, 0.01, 0.1], size=(1, G))
    keys = tie_keys(int(seed), 0, np.array([5]), G)
    order = rng.permutation(G)
    plain = select_pairs(np.zeros((1, G)), scores, keys)
    moved = select_pairs(np.zeros((1, G)), scores[:, order], keys[:, order])
    assert order[moved.anchor_B[0]] == plain.anchor_B[0]
    assert order[moved.negative_B[0]] == plain.negative_B[0]
