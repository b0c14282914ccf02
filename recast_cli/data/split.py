"""From clean events to a leave-one-out split: k-core, time order, capped windows.

A user with n events in time order has positions 0 .. n-1. Position n-1 is the test target, n-2 the validation
target, the n-2 before them are training positions. Ties in time keep the order of the source.

Shape suffixes: U users, E events, W windows, R rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import polars as pl

from recast_cli.core.runs import runs

NUM_HELD_OUT_EVENTS = 2  # validation and test


def k_core(interactions: pl.DataFrame, *, min_user: int, min_item: int) -> pl.DataFrame:
    """Drop users with fewer than `min_user` and items with fewer than `min_item` events until none is left.

    The result is the unique largest such subset; row order is kept.
    """
    left = interactions
    while True:
        before = left.height
        left = left.filter(pl.len().over("item_id") >= min_item) if min_item > 1 else left
        left = left.filter(pl.len().over("user_id") >= min_user)
        if left.height in (before, 0):
            return left


def order_ids(column: str, ids: pl.Series) -> list[pl.Expr]:
    """Sort keys for ids: by number if all are integers, then (or else) by text."""
    if bool(ids.str.contains(r"^-?[0-9]{1,18}$").all()):
        return [pl.col(column).cast(pl.Int64), pl.col(column)]  # "7" and "07" are two ids
    return [pl.col(column)]


def order_events(interactions: pl.DataFrame) -> pl.DataFrame:
    """Events by user, time and source row, with `position` in the user's sequence (i32)."""
    keys = order_ids("user_id", interactions["user_id"])
    ordered = interactions.sort(*keys, "timestamp", "row")
    position = pl.int_range(pl.len(), dtype=pl.Int32).over("user_id").alias("position")
    return ordered.select("user_id", "item_id", "timestamp", position)


def tie_share(events: pl.DataFrame) -> float:
    """Share of neighbouring events of a user that have the same timestamp; 0 without neighbours.

    Args:
        events: As `order_events` gives them.
    """
    tied = _tied_with_previous(events).filter(events["position"] > 0)
    return float(tied.mean() or 0.0) if len(tied) else 0.0  # type: ignore[arg-type]


def target_tie_share(events: pl.DataFrame) -> float:
    """Share of users whose split rests on the tie rule: validation or test tied with the event before it."""
    from_end = events.select(pl.len().over("user_id") - pl.col("position")).to_series()
    touches_target = (
        _tied_with_previous(events) & (from_end <= NUM_HELD_OUT_EVENTS) & (events["position"] > 0)
    )
    by_user = (
        events.select("user_id", touches_target.alias("tied")).group_by("user_id").agg(pl.col("tied").any())
    )
    return float(by_user["tied"].mean() or 0.0)  # type: ignore[arg-type]


def _tied_with_previous(events: pl.DataFrame) -> pl.Series:
    return (events["timestamp"] == events["timestamp"].shift(1)).fill_null(False)


class Layout(NamedTuple):
    """Where the users lie in the ordered events, and how their training positions are used.

    Attributes:
        first_U: Event row of each user's position 0.
        num_train_U: Training positions of each user (events minus two).
        num_sft_U: The first so many of them are learned by SFT; the others are reserved for RL.
    """

    first_U: np.ndarray
    num_train_U: np.ndarray
    num_sft_U: np.ndarray


def layout(events: pl.DataFrame, held_out_share: float | None = None) -> Layout:
    """Users' places in the ordered events; `held_out_share` None means SFT learns every training position.

    With a share, each user's last max(1, floor(share * n)) of n training positions are reserved for RL, but
    at least one stays for SFT (so a user with a single training position reserves none).
    """
    first_U = np.flatnonzero(events["position"].to_numpy() == 0)
    num_train_U = np.diff(np.append(first_U, events.height)) - NUM_HELD_OUT_EVENTS
    assert num_train_U.min(initial=1) >= 1, "a user is too short for the split: clean() must drop it"
    reserved_U = np.zeros_like(num_train_U)
    if held_out_share is not None:
        # 1e-9: 0.1 * 30 is a hair above 3 in floating point, 0.29 * 100 a hair below 29
        reserved_U = np.maximum(1, np.floor(held_out_share * num_train_U + 1e-9).astype(np.int64))
        reserved_U = np.minimum(reserved_U, num_train_U - 1)
    return Layout(first_U, num_train_U, num_train_U - reserved_U)


def stride(history: int) -> int:
    """Distance between window starts: the history, so that neighbours share one item and an epoch is short.

    Closer windows would give every position a longer prompt, at as many more tokens for each learned item.
    """
    return history


def window_start(position_R: np.ndarray, history: int) -> np.ndarray:
    """Start of the window in which each position is learned.

    Windows of history + 1 items start at 0, s, 2s, ... (s the stride). A position is learned in the first
    window that holds it, so its prompt is the window's items before it: between history + 1 - s and history
    of them (all there are in the first window).
    """
    step = stride(history)
    window_R = -(-(position_R - history) // step)  # ceiling
    return np.maximum(window_R, 0) * step


class Windows(NamedTuple):
    """SFT windows: items at event rows start_W .. stop_W - 1, learned from place learn_from_W on."""

    user_W: np.ndarray
    start_W: np.ndarray
    stop_W: np.ndarray
    learn_from_W: np.ndarray


def sft_windows(users: Layout, history: int) -> Windows:
    """Windows that learn every SFT position exactly once, the first ones of a user from the empty prompt."""
    step, width = stride(history), history + 1
    num_windows_U = 1 + np.maximum(0, -(-(users.num_sft_U - width) // step))
    user_W = np.repeat(np.arange(len(num_windows_U)), num_windows_U)
    window_W = runs(0, num_windows_U)
    begin_W = window_W * step
    end_W = np.minimum(begin_W + width, users.num_sft_U[user_W])
    first_W = users.first_U[user_W]
    return Windows(user_W, first_W + begin_W, first_W + end_W, np.where(window_W == 0, 0, width - step))


class Targets(NamedTuple):
    """Rows with one target each: event row of the target, and of the first item of its prompt."""

    user_R: np.ndarray
    start_R: np.ndarray
    target_R: np.ndarray


def rl_targets(users: Layout, history: int, *, held_out: bool) -> Targets:
    """One row per training position with a non-empty prompt: all that SFT learns, or all that it must not.

    The prompt of a position is the same in both modes: the prefix of its window on the grid.
    """
    from_U = users.num_sft_U if held_out else np.zeros_like(users.num_sft_U)
    to_U = users.num_train_U if held_out else users.num_sft_U
    num_U = to_U - from_U
    user_R = np.repeat(np.arange(len(num_U)), num_U)
    position_R = runs(from_U, num_U)
    user_R, position_R = user_R[position_R > 0], position_R[position_R > 0]
    first_R = users.first_U[user_R]
    return Targets(user_R, first_R + window_start(position_R, history), first_R + position_R)


def evaluation_targets(users: Layout, history: int, *, from_end: int) -> Targets:
    """One row per user: target is the `from_end`-th event from the end, history the last items before it."""
    position_U = users.num_train_U + NUM_HELD_OUT_EVENTS - from_end
    start_U = users.first_U + np.maximum(0, position_U - history)
    return Targets(np.arange(len(position_U)), start_U, users.first_U + position_U)
