"""Columns of rollouts: row by row what verl's agent loop writes, and what of it goes to the queue when."""

from __future__ import annotations

import numpy as np
import torch

from verl_recast.groups import response_fields
from verl_recast.rollout.columns import Columns, answer_columns, prompt_columns

PROMPTS = [[7, 8, 9], [4]]
ANSWERS = torch.tensor([[1, 2], [3, 4], [5, 6]])  # of the first prompt, of the first, of the second


def test_columns_are_the_fields_of_each_row() -> None:
    rewards = np.array([0.0, 1.0, 0.0])
    rows = [PROMPTS[0], PROMPTS[0], PROMPTS[1]]
    columns = {**answer_columns(ANSWERS, rewards), **prompt_columns(rows, ANSWERS)}
    for n, (prompt, answer) in enumerate(zip(rows, ANSWERS, strict=True)):
        expected = {
            "prompts": torch.tensor(prompt),
            **response_fields(torch.tensor(prompt), answer, rewards[n]),
        }
        assert expected.keys() == columns.keys()
        for name, value in expected.items():
            found = columns[name].unbind()[n]
            assert found.dtype == value.dtype and torch.equal(found, value), name


def test_some_rows_of_columns() -> None:
    columns = Columns(3, {"uid": ["a", "b", "c"], "responses": ANSWERS})
    taken = columns.take([2, 0])
    assert taken["uid"] == ["c", "a"] and taken["responses"].tolist() == [[5, 6], [1, 2]]
    assert taken.batch_size == (2,) and columns.batch_size == (3,)


def test_columns_without_some() -> None:
    columns = Columns(3, {"uid": ["a", "b", "c"], "responses": ANSWERS, "index": [0, 0, 1]})
    left = columns.without(["index", "x"])
    assert list(left) == ["uid", "responses"] and left.batch_size == (3,)
