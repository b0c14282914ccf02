"""Times of a user's log, in whatever form."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta

import polars as pl
import pytest

from recast_cli.data.timestamps import parse_timestamps
from recast_cli.errors import DataError

NEW_YEAR_2024 = 19_723 * 86_400.0  # 54 years of 365 days and 13 leap days after 1970


def test_only_iso_is_read_as_a_time() -> None:
    odd = pl.Series("t", ["2024-01-31x10:00:00", "2024-01-31_10:00", "2024-13-01"])
    assert parse_timestamps(odd, "t")[0].to_list() == [None] * 3


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2024-01-01", NEW_YEAR_2024),
        ("2024-01-01T00:00:01", NEW_YEAR_2024 + 1),
        ("2024-01-01 00:01", NEW_YEAR_2024 + 60),
        ("2024-01-01T01:00:00Z", NEW_YEAR_2024 + 3600),
        ("2024-01-01T01:00:00+01:00", NEW_YEAR_2024),
        ("2024-01-01T01:00-0100", NEW_YEAR_2024 + 7200),
        ("2024-01-01 00:00:00.25", NEW_YEAR_2024 + 0.25),
        ("2024-W01-1", NEW_YEAR_2024),  # the first week of 2024 begins on New Year's Day
        ("20240101T000001Z", NEW_YEAR_2024 + 1),
        ("2024-01-01 02:00+01", NEW_YEAR_2024 + 3600),
        ("2024-01-01t00:00:00z", NEW_YEAR_2024),
        ("20240101", 20240101.0),  # a number is a number
        (" 12.5 ", 12.5),
        ("1e9", 1e9),
        ("NaN", None),
        ("inf", None),
        ("yesterday", None),
        ("2024-13-01", None),
        ("", None),
    ],
)
def test_timestamps(text: str, seconds: float | None) -> None:
    found, as_found = parse_timestamps(pl.Series("timestamp", [text]), "log.csv")
    assert found.to_list() == [seconds]
    assert as_found.to_list() == [text]


def test_typed_timestamps() -> None:
    for values in ([date(2024, 1, 1)], [datetime(2024, 1, 1)], [datetime(2024, 1, 1, tzinfo=UTC)]):
        assert parse_timestamps(pl.Series(values), "t")[0].to_list() == [NEW_YEAR_2024]
    floats = pl.Series([1.5, float("nan"), float("inf"), None])
    assert parse_timestamps(floats, "t")[0].to_list() == [1.5, None, None, None]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([True], "Boolean"),
        ([b"1"], "Binary"),
        ([timedelta(days=1)], r"Duration\(.*\)"),
        ([time(1, 2)], "Time"),
        ([[1]], r"List\(Int64\)"),
        ([{"a": 1}], r"Struct\(.*\)"),
    ],
)
def test_a_column_that_is_no_time(values: list[object], kind: str) -> None:
    with pytest.raises(DataError, match=f"column 'when' holds {kind}, needed numbers, dates or ISO 8601"):
        parse_timestamps(pl.Series("when", values), "log.parquet")


def test_numbers_and_dates_cannot_be_mixed() -> None:
    with pytest.raises(DataError, match=r"mixes numbers \(17\) and dates \(2024-01-01\)"):
        parse_timestamps(pl.Series("timestamp", ["2024-01-01", "17"]), "log.csv")
