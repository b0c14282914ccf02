"""What a rollout brings along, by hand."""

from __future__ import annotations

from math import log

import numpy as np
import pytest

from verl_recast.rollout.sampled import (
    mean_catalogue_mass,
    require_histories,
    sampled_fields,
    take_histories,
)


def test_histories_leave_the_records_and_stay_with_the_rows() -> None:
    stored = {"index": 5, "history": [3, 1, 3]}
    rows = [{"index": 5, "extra_info": stored}, {"index": 6, "extra_info": {"history": np.array([0])}}]
    take_histories(rows)
    assert rows[0]["extra_info"] == {"index": 5} and rows[1]["extra_info"] == {}
    assert require_histories(rows) == [[3, 1, 3], [0]]
    assert stored["history"] == [3, 1, 3]  # the data set's own


def test_an_empty_history_is_one_and_a_missing_one_is_an_error() -> None:
    rows = [{"index": 1, "extra_info": {"history": []}}, {"index": 7}]
    take_histories(rows)
    assert require_histories(rows[:1]) == [[]]
    with pytest.raises(ValueError, match=r"row with extra_info\.index 7 has no extra_info\.history"):
        require_histories(rows)


def test_catalogue_mass_is_what_the_mask_left_in() -> None:
    # the codes had 0.2 and 0.3 of everything, 0.4 and 0.5 of what is allowed: 0.5 and 0.6 were allowed
    full, trie, unknown = np.log([0.2, 0.3]), np.log([0.4, 0.5]), np.array([np.nan, np.nan])
    fields, masked, codes_only = sampled_fields(
        np.array([full, full, unknown]), np.array([trie, [np.nan, 0.0], trie])
    )
    assert fields["catalogue_mass"] == pytest.approx(0.5 * 0.6)
    assert fields["trie_log_probs"] == pytest.approx([log(0.4), log(0.5)])
    assert masked == {}
    assert codes_only == {"trie_log_probs": fields["trie_log_probs"]}
    assert mean_catalogue_mass([fields, {}, {"catalogue_mass": 0.5}]) == {
        "catalogue_mass": pytest.approx(0.4)
    }
    assert mean_catalogue_mass([{}]) == {}
