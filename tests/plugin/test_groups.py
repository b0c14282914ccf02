"""Between verl's rows and groups: order of rows, and the layout of PPO mini-batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from verl_recast.groups import (
    _group_rows,
    minibatch_order,
    require_own_index,
    response_fields,
    share_without_hit,
)


def test_interleaved_keys_become_groups_in_the_order_of_their_index() -> None:
    keys = ["u9_1_0", "u2_0_0", "u9_0_0", "u5_1_0", "u2_1_0", "u5_0_0"]
    index = {"u9": 3, "u2": 8, "u5": 1}
    index_N = np.array([index[key.split("_")[0]] for key in keys])
    # u5 (index 1), u9 (3), u2 (8); inside a group by rollout number
    assert _group_rows(keys, index_N) == [[5, 3], [2, 0], [1, 4]]


def test_rollout_numbers_are_numbers_and_uids_may_hold_underscores() -> None:
    keys = ["a_b_10_0", "a_b_9_0", "a_b_2_0"]
    assert _group_rows(keys, np.zeros(3, dtype=int)) == [[2, 1, 0]]


def test_groups_of_one_index_stay_apart() -> None:
    # a prompt drawn twice in one step: one index, two uids
    keys = ["u2_0_0", "u1_0_0", "u2_1_0", "u1_1_0"]
    assert _group_rows(keys, np.array([4, 4, 4, 4])) == [[1, 3], [0, 2]]


def test_one_index_for_different_rows_is_refused_and_for_one_row_twice_is_not() -> None:
    prompt, other, target = (5, 6), (5, 7), [(1, 2)]
    require_own_index([(4, (prompt, target)), (4, (prompt, target)), (5, (other, target))])
    with pytest.raises(ValueError, match=r"2 of 3 prompts have extra_info\.index 0, each row needs its own"):
        require_own_index([(0, (prompt, target)), (7, (prompt, target)), (0, (prompt, [(1, 3)]))])
    with pytest.raises(ValueError, match=r"2 of 2 prompts have extra_info\.index 0"):
        require_own_index([(0, (prompt, target)), (0, (other, target))])


def test_one_rank_one_minibatch_keeps_the_order() -> None:
    assert minibatch_order([0, 1, 2], 3, 3, 2, 1) == ([0, 1, 2, 3, 4, 5], 0)


def test_skipped_groups_leave_holes_that_padding_fills_in_their_own_minibatch() -> None:
    # 4 prompts in mini-batches of 2; groups 0, 2, 3 kept: rows 0,1 | 2,3 and 4,5
    order, num_padding = minibatch_order([0, 2, 3], 4, 2, 2, 1)
    assert num_padding == 2
    assert order == [0, 1, 6, 7, 2, 3, 4, 5]  # rows 6, 7 are padding


def test_two_ranks_are_laid_out_rank_major() -> None:
    # mini-batch 0 holds rows 0..3, mini-batch 1 rows 4..7; each rank takes half of each
    order, num_padding = minibatch_order([0, 1, 2, 3], 4, 2, 2, 2)
    assert num_padding == 0
    assert order == [0, 1, 4, 5, 2, 3, 6, 7]


def test_two_ranks_with_a_skipped_group() -> None:
    order, num_padding = minibatch_order([1, 2, 3], 4, 2, 2, 2)
    assert num_padding == 2
    # mini-batch 0: rows 0, 1 and padding 6, 7; mini-batch 1: rows 2..5
    assert order == [0, 1, 2, 3, 6, 7, 4, 5]


def test_a_minibatch_without_signal_is_left_out() -> None:
    order, num_padding = minibatch_order([4, 5], 6, 2, 2, 1)
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
        order, num_padding = minibatch_order(groups, num_groups, minibatch, 2, dp_size)
        assert sorted(order) == list(range(2 * len(groups) + num_padding))
        share = minibatch * 2 // dp_size
        used = sorted({group // minibatch for group in groups})
        assert len(order) == len(used) * minibatch * 2
        # what verl does with it: rank k takes the k-th block, its i-th slice is its share of mini-batch i
        for place, number in enumerate(used):
            rows = [
                row
                for rank in range(dp_size)
                for row in order[rank * len(used) * share :][place * share : (place + 1) * share]
            ]
            real = {groups[row // 2] for row in rows if row < 2 * len(groups)}
            assert real == {group for group in groups if group // minibatch == number}


def test_rows_that_ranks_cannot_share_are_refused() -> None:
    with pytest.raises(ValueError, match=r"keeps 2 rows, which 4 .*ppo_mini_batch_size to a multiple of 4"):
        minibatch_order([0, 1], 2, 1, 2, 4)


def test_the_fields_of_a_response_are_those_the_actor_reads() -> None:
    fields = response_fields(torch.tensor([7, 8]), torch.tensor([4, 5, 6]), 1.0)
    assert {name: value.tolist() for name, value in fields.items()} == {
        "responses": [4, 5, 6],
        "response_mask": [1, 1, 1],
        "loss_mask": [1, 1, 1],
        "input_ids": [7, 8, 4, 5, 6],
        "position_ids": [0, 1, 2, 3, 4],
        "rm_scores": [0.0, 0.0, 1.0],
    }


def test_groups_without_a_hit_are_counted() -> None:
    assert share_without_hit([[0, 1], [2, 3], [4], [5, 6]], {1, 5, 6}) == 0.5
    assert share_without_hit([[0, 1], [2, 3]], {0, 3}) == 0.0
