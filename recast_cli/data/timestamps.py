"""Times of a user's log, in whatever form: numbers, dates, ISO 8601 text."""

from __future__ import annotations

import re
from datetime import UTC, datetime

import polars as pl

from recast_cli.errors import DataError

_ISO = re.compile(r"[-0-9W]+([T ][-+0-9:.,]+Z?)?")


def parse_timestamps(column: pl.Series, path: str) -> tuple[pl.Series, pl.Series]:
    """Seconds (or whatever unit the numbers have) as f64, null where unreadable, and the text as found.

    Numbers, ISO 8601 dates and times (no zone means UTC), and date-typed columns are understood.

    Raises:
        DataError: the column holds something else, or mixes numbers and dates, which have no common order.
    """
    kind = column.dtype
    known = (pl.String, pl.Categorical, pl.Enum, pl.Date, pl.Datetime, pl.Null)
    if not (kind.is_numeric() or isinstance(kind, known) or kind in known):
        raise DataError(
            f"{path} column {column.name!r} holds {kind}, needed numbers, dates or ISO 8601 text",
            "map another column with --columns timestamp=COLUMN",
        )
    text = column.cast(pl.String)
    if kind.is_temporal():
        return column.cast(pl.Datetime("us")).dt.epoch("us") / 1e6, text
    if kind.is_numeric():
        numbers = column.cast(pl.Float64)
    else:
        found = text.str.strip_chars()
        numbers = found.cast(pl.Float64, strict=False)
        dates = _parse_iso(found.set(numbers.is_not_null(), None))
        if dates.is_not_null().any():
            mixed = text.filter(numbers.is_finite().fill_null(False))
            if len(mixed):
                day = text.filter(dates.is_not_null())[0]
                raise DataError(
                    f"{path} column {column.name!r} mixes numbers ({mixed[0]}) and dates ({day}), "
                    "needed one kind",
                    "convert the column to one kind",
                )
            numbers = dates
    inexact = text.filter((numbers.is_finite() & (numbers.abs() >= 2**53)).fill_null(False))
    if len(inexact):
        raise DataError(
            f"{path} column {column.name!r} holds {inexact[0]}, needed numbers below 2^53, "
            "which floats tell apart",
            "write nanoseconds as microseconds, or as dates",
        )
    return pl.select(pl.when(numbers.is_finite()).then(numbers).alias("timestamp")).to_series(), text


def _parse_iso(text: pl.Series) -> pl.Series:
    """Seconds since 1970 of ISO 8601 text as f64, null where it is none.

    The common spellings at polars' speed; what is left over as Python reads it.
    """
    tidy = (
        text.str.replace(r"^(\d{4}-\d{2}-\d{2})$", "$1 00:00")
        .str.replace(r"^(\d{4}-\d{2}-\d{2})T", "$1 ")
        .str.replace(r"^(.{10} \d{2}:\d{2})($|Z$|[+-])", "$1:00$2")
        .str.replace(r"Z$", "+00:00")
        .str.replace(r"^(.{10} [\d:.]+)$", "$1+00:00")
    )
    parsed = tidy.str.to_datetime("%Y-%m-%d %H:%M:%S%.f%z", strict=False, time_unit="us")
    seconds = parsed.dt.epoch("us") / 1e6
    left = text.set(seconds.is_not_null(), None)
    if left.null_count() == len(left):
        return seconds
    return seconds.fill_null(left.map_elements(_python_iso, pl.Float64))


def _python_iso(text: str) -> float | None:
    """Seconds since 1970 of one date such as 2024-W05-3 or 20240131T101500+0100."""
    if not _ISO.fullmatch(text.upper()):  # Python takes any letter for the T
        return None
    try:
        found = datetime.fromisoformat(text.upper())
    except ValueError:
        return None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
