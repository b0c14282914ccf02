"""Which rows of a step are kept, and where they go in the PPO mini-batches."""

from __future__ import annotations

import numpy as np
import pytest

from recast_cli.core.contrast import select_pairs
from verl_recast.layout import kept_rows, minibatch_order


def pairs(*groups: int) -> dict[int, int]:
    return dict.fromkeys(groups, 2)


def test_contrast_keeps_the_positive_and_the_negative_and_else_every_rollout_stays() -> None:
    # group 0: rollout 1 hits, 2 is nearest; group 1 hits everywhere; group 2 lacks a rollout and has no hit
    rows = np.array([[4, 0, 7], [1, 5, 2], [3, -1, 6]])
    rewards = np.array([[0, 1, 0], [1, 1, 1], [0, 0, 0]])
    scores = np.array([[0.01, 1, 0.1], [1, 1, 1], [0.1, 0, 0.01]])
    keys = np.arange(9, dtype=np.uint64).reshape(3, 3)
    selection = select_pairs(rewards, scores, keys, present_BG=rows >= 0)
    assert kept_rows(selection, rows, contrast=True) == {0: [0, 7], 2: [6, 3]}
    assert kept_rows(selection, rows, contrast=False) == {0: [4, 0, 7], 1: [1, 5, 2], 2: [3, 6]}


def test_ragged_groups_are_filled_up_in_their_own_minibatch() -> None:
    # whole groups of 3: group 1 lost one rollout, so mini-batch 0 holds rows 0..4 and one of padding
    order, num_padding = minibatch_order({0: 3, 1: 2, 2: 3, 3: 3}, 4, 2, 3, 1)
    assert (order, num_padding) == ([0, 1, 2, 3, 4, 11, 5, 6, 7, 8, 9, 10], 1)
    # two ranks: each gets half of each mini-batch
    order, _ = minibatch_order({0: 3, 1: 2, 2: 3, 3: 3}, 4, 2, 3, 2)
    assert order == [0, 1, 2, 5, 6, 7, 3, 4, 11, 8, 9, 10]
    # a ragged group before a whole one: its padding keeps the next group on one rank
    order, _ = minibatch_order({0: 1, 1: 3}, 2, 2, 3, 2)
    assert order == [0, 4, 5, 1, 2, 3]
    # a skipped group before both: the hole is at the end
    order, num_padding = minibatch_order({1: 2, 2: 3}, 4, 4, 3, 2)
    assert (order, num_padding) == ([0, 1, 5, 2, 3, 4, 6, 7, 8, 9, 10, 11], 7)


def test_more_rows_than_rollouts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a group has 4 rows, rollout\.n is 3"):
        minibatch_order({0: 3, 1: 4}, 2, 2, 3, 1)


def test_one_rank_one_minibatch_keeps_the_order() -> None:
    assert minibatch_order(pairs(0, 1, 2), 3, 3, 2, 1) == ([0, 1, 2, 3, 4, 5], 0)


def test_skipped_groups_leave_holes_that_padding_fills_in_their_own_minibatch() -> None:
    # 4 prompts in mini-batches of 2; groups 0, 2, 3 kept: rows 0,1 | 2,3 and 4,5
    order, num_padding = minibatch_order(pairs(0, 2, 3), 4, 2, 2, 1)
    assert num_padding == 2
    assert order == [0, 1, 6, 7, 2, 3, 4, 5]  # rows 6, 7 are padding


def test_two_ranks_are_laid_out_rank_major() -> None:
    # mini-batch 0 holds rows 0..3, mini-batch 1 rows 4..7; each rank takes half of each
    order, num_padding = minibatch_order(pairs(0, 1, 2, 3), 4, 2, 2, 2)
    assert num_padding == 0
    assert order == [0, 1, 4, 5, 2, 3, 6, 7]


def test_two_ranks_with_a_skipped_group() -> None:
    order, num_padding = minibatch_order(pairs(1, 2, 3), 4, 2, 2, 2)
    assert num_padding == 2
    # mini-batch 0: rows 0, 1 and padding 6, 7; mini-batch 1: rows 2..5
    assert order == [0, 1, 2, 3, 6, 7, 4, 5]


def test_a_minibatch_without_signal_is_left_out() -> None:
    order, num_padding = minibatch_order(pairs(4, 5), 6, 2, 2, 1)
    assert (order, num_padding) == ([0, 1, 2, 3], 0)


@pytest.mark.parametrize(
    ("num_groups", "minibatch", "dp_size"), [(12, 4, 4), (8, 8, 2), (6, 3, 3), (5, 2, 1)]
)
def test_every_row_is_used_once_and_each_rank_gets_its_share_of_every_minibatch(
    num_groups: int, minibatch: int, dp_size: int
) -> None:
    rng = np.random.default_rng(num_groups)
    for _ in range(20):
        groups = sorted(rng.choice(num_groups, rng.integers(1, num_groups + 1), replace=False).tolist())
        width = int(rng.integers(1, 5))
        counts = {group: int(rng.integers(1, width + 1)) for group in groups}
        group_of = [group for group, count in counts.items() for _ in range(count)]
        order, num_padding = minibatch_order(counts, num_groups, minibatch, width, dp_size)
        assert sorted(order) == list(range(len(group_of) + num_padding))
        share = minibatch * width // dp_size
        used = sorted({group // minibatch for group in groups})
        assert len(order) == len(used) * minibatch * width
        rank_of: dict[int, set[int]] = {}
        for place, row in enumerate(order):
            if row < len(group_of):
                rank_of.setdefault(group_of[row], set()).add(place // (len(used) * share))
        assert all(len(ranks) == 1 for ranks in rank_of.values()), "groups stay whole across ranks"
        # what verl does with it: rank k takes the k-th block, its i-th slice is its share of mini-batch i
        for place, number in enumerate(used):
            rows = [
                row
                for rank in range(dp_size)
                for row in order[rank * len(used) * share :][place * share : (place + 1) * share]
            ]
            real = {group_of[row] for row in rows if row < len(group_of)}
            assert real == {group for group in groups if group // minibatch == number}


def test_rows_that_ranks_cannot_share_are_refused() -> None:
    with pytest.raises(ValueError, match=r"has 1 prompts, which 4 .*ppo_mini_batch_size to a multiple of 4"):
        minibatch_order(pairs(0, 1), 2, 1, 2, 4)
