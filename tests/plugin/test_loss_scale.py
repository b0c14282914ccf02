"""How many tokens a mini-batch lost, and the divisor that ragged answers need."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from verl_recast.loss_scale import dropped_tokens, require_one_divisor

# Four groups of three rollouts in mini-batches of two prompts; group 1 lacks one, group 2 was skipped.
ROWS = np.array([[0, 1, 2], [3, -1, 4], [5, 6, 7], [8, 9, 10]])
TOKENS = np.array([[3, 4, 5], [3, 0, 3], [7, 7, 7], [2, 9, 1]])


def test_each_minibatch_counts_the_tokens_that_it_lost_on_its_first_kept_row() -> None:
    kept = {0: [1, 2], 1: [4, 3], 3: [10, 8]}
    # mini-batch 0: 12 + 6 tokens, of which 4 + 5 + 3 + 3 are kept; mini-batch 1: 21 + 12, of which 1 + 2 are
    assert dropped_tokens(kept, TOKENS, ROWS, 2) == {1: 18 - 15, 10: 33 - 3}


def test_a_minibatch_that_kept_nothing_counts_nothing_and_whole_groups_lose_nothing() -> None:
    assert dropped_tokens({3: [10, 8]}, TOKENS, ROWS, 2) == {10: 33 - 3}
    whole = {b: [row for row in rows if row >= 0] for b, rows in enumerate(ROWS.tolist())}
    assert dropped_tokens(whole, TOKENS, ROWS, 2) == {0: 0, 5: 0}
    assert dropped_tokens({0: [2, 0]}, TOKENS, ROWS, 4) == {2: TOKENS.sum() - 8}


def test_ragged_answers_need_a_divisor_of_their_own() -> None:
    norm = SimpleNamespace(loss_agg_mode="seq-mean-token-sum-norm", loss_scale_factor=None)
    require_one_divisor(norm, [3, 3])
    with pytest.raises(ValueError, match=r"got answers of 3 to 7 tokens, .*actor\.loss_scale_factor"):
        require_one_divisor(norm, [3, 7, 5])
    norm.loss_scale_factor = 7
    require_one_divisor(norm, [3, 7, 5])
    require_one_divisor(SimpleNamespace(loss_agg_mode="token-mean", loss_scale_factor=None), [3, 7])
