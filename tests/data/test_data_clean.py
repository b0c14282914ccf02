"""Dirty logs: each reason alone, all together, strict, and nothing left."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from recast_cli.data.clean import REASONS, clean, count_reasons
from recast_cli.data.source import RawTables
from recast_cli.errors import DataError

GOOD = [("u", "a", 1.0), ("u", "b", 2.0), ("u", "c", 3.0)]
ITEMS = [("a", "A"), ("b", "B"), ("c", "C")]
Tables = Callable[..., RawTables]


@pytest.mark.parametrize(
    ("events", "items", "reason"),
    [
        ([(None, "a", 4.0)], [], "missing_user_id"),
        ([("u", None, 4.0)], [], "missing_item_id"),
        ([("u", "a", 1.0)], [], "duplicate_event"),
        ([("u", "zz", 4.0)], [], "unknown_item"),
        ([("short", "a", 4.0)], [], "short_user"),
        ([], [(None, "No id")], "item_without_id"),
        ([], [("a", "A again")], "duplicate_item"),
        ([], [("d", None)], "item_without_text"),
    ],
)
def test_each_reason_is_counted_listed_and_an_error_under_strict(
    raw_tables: Tables, events: list, items: list, reason: str
) -> None:
    tables = raw_tables(GOOD + events, ITEMS + items)
    cleaned = clean(tables)
    assert count_reasons(cleaned.dropped) == {reason: 1}
    table, row = ("interactions", len(GOOD) + 1) if events else ("items", len(ITEMS) + 1)
    assert cleaned.dropped.row(0)[:3] == (table, row, reason)
    assert cleaned.interactions.select("user_id", "item_id", "timestamp").rows() == GOOD
    assert cleaned.items.select("item_id", "title").rows() == ITEMS
    with pytest.raises(DataError, match=rf"--strict and 1 .*first: {table} row {row}") as caught:
        clean(tables, strict=True)
    assert REASONS[reason] in caught.value.message and "\n" not in caught.value.message


def test_clean_data_passes_strict(raw_tables: Tables) -> None:
    assert clean(raw_tables(GOOD, ITEMS), strict=True).dropped.height == 0


def test_event_of_item_without_text_is_told_from_unknown_item(raw_tables: Tables) -> None:
    events = [*GOOD, ("u", "mute", 4.0), ("u", "zz", 5.0)]
    cleaned = clean(raw_tables(events, [*ITEMS, ("mute", None)]))
    assert count_reasons(cleaned.dropped) == {
        "unknown_item": 1,
        "event_of_item_without_text": 1,
        "item_without_text": 1,
    }


def test_short_users_are_judged_after_everything_else(raw_tables: Tables) -> None:
    # v has four rows, but one is a repeat and one is of an unknown item: two usable ones are left.
    events = [*GOOD, ("v", "a", 1.0), ("v", "a", 1.0), ("v", "zz", 2.0), ("v", "b", 3.0)]
    cleaned = clean(raw_tables(events, ITEMS))
    assert count_reasons(cleaned.dropped) == {"duplicate_event": 1, "unknown_item": 1, "short_user": 2}
    assert cleaned.dropped["row"].to_list() == [4, 5, 6, 7]
    assert cleaned.interactions["user_id"].unique().to_list() == ["u"]


def test_same_item_at_another_time_is_no_duplicate(raw_tables: Tables) -> None:
    assert clean(raw_tables([*GOOD, ("u", "a", 9.0)], ITEMS)).interactions.height == 4


def test_bad_timestamps_are_an_error_unless_dropped(raw_tables: Tables) -> None:
    tables = raw_tables([*GOOD, ("u", "a", None), ("u", "b", None)], ITEMS)
    with pytest.raises(DataError, match=r"^2 interactions have no readable timestamp \(row 4: missing\)"):
        clean(tables)
    cleaned = clean(tables, drop_bad_timestamps=True)
    assert count_reasons(cleaned.dropped) == {"bad_timestamp": 2}
    assert cleaned.interactions.height == 3
    with pytest.raises(DataError, match="--strict and 2 interactions without a readable timestamp"):
        clean(tables, strict=True, drop_bad_timestamps=True)


def test_nothing_left_is_an_error(raw_tables: Tables) -> None:
    with pytest.raises(
        DataError, match="none of 2 interactions is usable: 2 interactions of users with fewer"
    ):
        clean(raw_tables(GOOD[:2], ITEMS))
    with pytest.raises(DataError, match=r"speak of item 'a', the catalogue of '1'"):
        clean(raw_tables(GOOD, [("1", "A"), ("2", "B")]))
