"""Split arithmetic against hand-made examples, slow loops and properties."""

from __future__ import annotations

from collections import Counter

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recast_cli.data import split

LENGTHS = st.lists(st.integers(3, 90), min_size=1, max_size=6)
HISTORY = st.integers(1, 25)


def events_of(lengths: list[int]) -> pl.DataFrame:
    """Ordered events of users 0, 1, ...; every event is an item of its own, named user:position."""
    rows = [(str(u), f"{u}:{p}", float(p), p) for u, n in enumerate(lengths) for p in range(n)]
    schema = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Float64, "position": pl.Int32}
    return pl.DataFrame(rows, schema=schema, orient="row")


def slow_k_core(pairs: list[tuple[int, int]], min_user: int, min_item: int) -> list[tuple[int, int]]:
    """Drop one offending row at a time until there is none."""
    left = list(pairs)
    while True:
        users, items = Counter(u for u, _ in left), Counter(i for _, i in left)
        bad = [row for row, (u, i) in enumerate(left) if users[u] < min_user or items[i] < min_item]
        if not bad:
            return left
        del left[bad[0]]


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=50),
    st.integers(1, 4),
    st.integers(0, 4),
)
def test_k_core_equals_slow_loop(pairs: list[tuple[int, int]], min_user: int, min_item: int) -> None:
    frame = pl.DataFrame(pairs, schema={"user_id": pl.Int64, "item_id": pl.Int64}, orient="row")
    assert split.k_core(frame, min_user=min_user, min_item=min_item).rows() == slow_k_core(
        pairs, min_user, min_item
    )


def test_k_core_falls_like_dominoes() -> None:
    # u0 - i0 - u1 - i1 - ... - u4: only the ends have one event, but each removal makes a new end
    pairs = [(n, n) for n in range(4)] + [(n + 1, n) for n in range(4)]
    frame = pl.DataFrame(pairs, schema=["user_id", "item_id"], orient="row")
    assert split.k_core(frame, min_user=2, min_item=2).height == 0
    assert split.k_core(frame, min_user=1, min_item=2).height == 8


def test_ties_keep_source_order_and_ids_sort_as_numbers() -> None:
    frame = pl.DataFrame(
        {
            "row": [1, 2, 3, 4, 5, 6],
            "user_id": ["10", "9", "10", "10", "9", "10"],
            "item_id": ["z", "y", "a", "m", "b", "c"],
            "timestamp": [5.0, 1.0, 5.0, 4.0, 1.0, 5.0],
        }
    )
    ordered = split.order_events(frame)
    # user 9 before user 10; at time 5 user 10 has z (row 1), a (row 3), c (row 6)
    assert ordered["user_id"].to_list() == ["9", "9", "10", "10", "10", "10"]
    assert ordered["item_id"].to_list() == ["y", "b", "m", "z", "a", "c"]
    assert ordered["position"].to_list() == [0, 1, 0, 1, 2, 3]


def test_ids_that_are_not_all_integers_sort_as_text() -> None:
    frame = pl.DataFrame({"row": [1, 2, 3], "user_id": ["10", "9", "x"], "item_id": "a", "timestamp": 1.0})
    assert split.order_events(frame)["user_id"].to_list() == ["10", "9", "x"]


def test_tie_shares_by_hand() -> None:
    times = {"a": [1, 1, 2, 3], "b": [5, 5, 5], "c": [5, 6, 7, 7], "d": [1, 2, 2, 3]}
    rows = [(user, float(t), p) for user, ts in times.items() for p, t in enumerate(ts)]
    events = pl.DataFrame(rows, schema=["user_id", "timestamp", "position"], orient="row")
    # neighbours: a has 3 (1 tied), b has 2 (2 tied), c has 3 (1 tied), d has 3 (1 tied)
    assert split.tie_share(events) == (1 + 2 + 1 + 1) / (3 + 2 + 3 + 3)
    # neither target of a is tied with the event before it; b: both, c: test (7, 7), d: validation (2, 2)
    assert split.target_tie_share(events) == 3 / 4


def test_user_boundaries_are_no_ties() -> None:
    events = pl.DataFrame(
        {"user_id": ["a", "a", "b", "b"], "timestamp": [1.0, 2.0, 2.0, 3.0], "position": [0, 1, 0, 1]}
    )
    assert split.tie_share(events) == 0
    assert split.target_tie_share(events) == 0


def test_windows_by_hand() -> None:
    # 12 events: 10 training positions. History 4: windows of 5 that share one item with the one before.
    windows = split.sft_windows(split.layout(events_of([12])), history=4)
    assert windows.start_W.tolist() == [0, 4, 8]
    assert windows.stop_W.tolist() == [5, 9, 10]
    assert windows.learn_from_W.tolist() == [0, 1, 1]
    # position 4 is the last of the first window; 5 to 8 belong to the second, 9 to the last
    assert split.window_start(np.array([0, 4, 5, 8, 9]), 4).tolist() == [0, 0, 4, 4, 8]


@pytest.mark.parametrize(
    ("num_train", "share", "num_sft"),
    [
        (1, 0.1, 1),  # the only position stays with SFT
        (2, 0.1, 1),  # max(1, floor(.2))
        (29, 0.1, 27),
        (30, 0.1, 27),  # floor(3.0)
        (100, 0.29, 71),  # 0.29 * 100 is 28.999999999999996 in floating point
        (4, 0.99, 1),  # floor(3.96) = 3
    ],
)
def test_reserved_slice_by_hand(num_train: int, share: float, num_sft: int) -> None:
    users = split.layout(events_of([num_train + 2]), held_out_share=share)
    assert (users.num_train_U.tolist(), users.num_sft_U.tolist()) == ([num_train], [num_sft])


@given(LENGTHS, HISTORY, st.sampled_from([None, 0.1, 0.5]))
def test_every_training_position_is_learned_exactly_once(
    lengths: list[int], history: int, share: float | None
) -> None:
    users = split.layout(events_of(lengths), share)
    windows = split.sft_windows(users, history)
    learned: Counter[int] = Counter()
    for start, stop, learn_from in zip(windows.start_W, windows.stop_W, windows.learn_from_W, strict=True):
        assert 1 <= stop - start <= history + 1
        assert learn_from < stop - start, "a window that learns nothing is waste"
        learned.update(range(start + learn_from, stop))
    firsts = np.cumsum([0, *lengths])
    expected = {first + p for first, n in zip(firsts, users.num_sft_U, strict=False) for p in range(n)}
    assert learned == Counter(expected)


@given(LENGTHS, HISTORY, st.sampled_from([0.1, 0.5]))
def test_rl_rows_cover_what_the_mode_says(lengths: list[int], history: int, share: float) -> None:
    all_users, some_users = split.layout(events_of(lengths)), split.layout(events_of(lengths), share)
    both = split.rl_targets(all_users, history, held_out=False)
    held_out = split.rl_targets(some_users, history, held_out=True)
    learned = split.rl_targets(some_users, history, held_out=False)
    firsts = np.cumsum([0, *lengths])
    # mode sft: every training position but position 0
    expected = [first + p for first, n in zip(firsts, lengths, strict=False) for p in range(1, n - 2)]
    assert both.target_R.tolist() == expected
    # held-out and learned rows split them, with the very same prompts
    prompts = dict(zip(both.target_R.tolist(), both.start_R.tolist(), strict=True))
    parts = [dict(zip(t.target_R.tolist(), t.start_R.tolist(), strict=True)) for t in (held_out, learned)]
    assert not parts[0].keys() & parts[1].keys()
    assert parts[0] | parts[1] == prompts


@given(LENGTHS, HISTORY)
def test_rl_prompt_is_the_prefix_of_the_window_that_learns_it(lengths: list[int], history: int) -> None:
    users = split.layout(events_of(lengths))
    windows = split.sft_windows(users, history)
    home = {}
    for start, stop, learn_from in zip(windows.start_W, windows.stop_W, windows.learn_from_W, strict=True):
        home |= dict.fromkeys(range(start + learn_from, stop), start)
    rows = split.rl_targets(users, history, held_out=False)
    firsts = np.cumsum([0, *lengths])
    for user, start, target in zip(rows.user_R, rows.start_R, rows.target_R, strict=True):
        assert start == home[target]
        # a prompt never crosses into another user, never holds its target, and is neither empty nor too long
        assert firsts[user] <= start < target
        assert target - start <= history


@given(LENGTHS, HISTORY)
def test_evaluation_rows(lengths: list[int], history: int) -> None:
    users = split.layout(events_of(lengths))
    firsts = np.cumsum([0, *lengths])
    for from_end in (1, 2):
        rows = split.evaluation_targets(users, history, from_end=from_end)
        for user, n in enumerate(lengths):
            position = n - from_end
            assert rows.target_R[user] == firsts[user] + position
            assert rows.target_R[user] - rows.start_R[user] == min(history, position)
