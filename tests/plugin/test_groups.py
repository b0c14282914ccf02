"""Between verl's rows and groups: their order, their index, and the fields of a row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from verl_recast.groups import _group_rows, require_own_index, response_fields


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
