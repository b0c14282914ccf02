"""Dirty logs: every row that cannot be used is dropped, counted and listed with its reason."""

from __future__ import annotations

from typing import NamedTuple

import polars as pl

from recast_cli.data.source import RawTables
from recast_cli.errors import DataError

MIN_EVENTS = 3  # one event to train on, one to validate, one to test

REASONS = {
    "missing_user_id": "interactions without a user id",
    "missing_item_id": "interactions without an item id",
    "bad_timestamp": "interactions without a readable timestamp",
    "duplicate_event": "repeats of the same user, item and timestamp",
    "unknown_item": "interactions with an item that the catalogue lacks",
    "event_of_item_without_text": "interactions with an item that has no text",
    "short_user": f"interactions of users with fewer than {MIN_EVENTS} usable ones",
    "item_without_id": "items without an id",
    "duplicate_item": "further rows of an item id already seen",
    "item_without_text": "items without title and text",
}


class Cleaned(NamedTuple):
    """Usable rows, and the list of the others.

    Attributes:
        interactions: `row, user_id, item_id, timestamp`, in source order, every item in `items`.
        items: `row, item_id, title, text`, ids unique, nothing null.
        dropped: `table, row, reason, user_id, item_id`, ordered by table and row.
    """

    interactions: pl.DataFrame
    items: pl.DataFrame
    dropped: pl.DataFrame


def clean(tables: RawTables, *, strict: bool = False, drop_bad_timestamps: bool = False) -> Cleaned:
    """Keep what can be used, and list the rest.

    A row is listed once, under the first reason that hits it. A timestamp that cannot be read makes the order
    of events unknown, which silently spoils the split: it is an error unless `drop_bad_timestamps`.

    Raises:
        DataError: a bad timestamp; with `strict` any dropped row; nothing left.
    """
    items, item_drops = _clean_items(tables.items)
    interactions, event_drops = _clean_interactions(tables, items)
    listed = [_list_drops("interactions", drop, reason) for reason, drop in event_drops.items()]
    listed += [_list_drops("items", drop, reason) for reason, drop in item_drops.items()]
    dropped = pl.concat(listed).sort("table", "row")
    bad = event_drops["bad_timestamp"]
    if bad.height and not drop_bad_timestamps:
        found = bad["timestamp_text"][0]
        raise DataError(
            f"{bad.height} interactions have no readable timestamp (row {bad['row'][0]}: "
            f"{'missing' if found is None else repr(found)}), needed a finite number or an ISO date",
            "mend the rows, or pass --drop-bad-timestamps",
        )
    if strict and dropped.height:
        raise DataError(
            f"--strict and {describe(dropped)}", "mend the rows, or drop --strict to leave them out"
        )
    if interactions.height == 0:
        raise DataError(
            f"none of {tables.interactions.height} interactions is usable: {describe(dropped) or 'no rows'}"
            f"{_example_of_ids(tables)}",
            f"needed users with at least {MIN_EVENTS} events on items of the catalogue",
        )
    return Cleaned(interactions.drop("timestamp_text"), items, dropped)


def count_reasons(dropped: pl.DataFrame) -> dict[str, int]:
    """Rows dropped per reason, only reasons that occurred, in the order of `REASONS`."""
    counts = dict(dropped.group_by("reason").len().iter_rows())
    return {reason: counts[reason] for reason in REASONS if reason in counts}


def describe(dropped: pl.DataFrame) -> str:
    """One line: counts, meanings and the first row of each reason."""
    parts = []
    for reason, count in count_reasons(dropped).items():
        first = dropped.filter(pl.col("reason") == reason).row(0, named=True)
        parts.append(f"{count} {REASONS[reason]} (first: {first['table']} row {first['row']})")
    return "; ".join(parts)


def _clean_items(items: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, pl.DataFrame]]:
    drops: dict[str, pl.DataFrame] = {}
    left = items
    for reason, hit in [
        ("item_without_id", pl.col("item_id").is_null()),
        ("duplicate_item", ~pl.col("item_id").is_first_distinct()),
        ("item_without_text", pl.col("text").is_null()),
    ]:
        drops[reason] = left.filter(hit)
        left = left.filter(~hit)
    # A title is for people: where only other text exists, the id stands in.
    return left.with_columns(pl.col("title").fill_null(pl.col("item_id"))), drops


def _clean_interactions(
    tables: RawTables, items: pl.DataFrame
) -> tuple[pl.DataFrame, dict[str, pl.DataFrame]]:
    drops: dict[str, pl.DataFrame] = {}
    left = tables.interactions
    known = tables.items["item_id"].drop_nulls().unique().implode()
    usable = items["item_id"].implode()
    for reason, hit in [
        ("missing_user_id", pl.col("user_id").is_null()),
        ("missing_item_id", pl.col("item_id").is_null()),
        ("bad_timestamp", pl.col("timestamp").is_null()),
        ("duplicate_event", ~pl.struct("user_id", "item_id", "timestamp").is_first_distinct()),
        ("unknown_item", ~pl.col("item_id").is_in(known)),
        ("event_of_item_without_text", ~pl.col("item_id").is_in(usable)),
        ("short_user", pl.len().over("user_id") < MIN_EVENTS),
    ]:
        drops[reason] = left.filter(hit)
        left = left.filter(~hit)
    return left, drops


def _list_drops(table: str, drop: pl.DataFrame, reason: str) -> pl.DataFrame:
    user = pl.col("user_id") if "user_id" in drop.columns else pl.lit(None, pl.String).alias("user_id")
    return drop.select(pl.lit(table).alias("table"), "row", pl.lit(reason).alias("reason"), user, "item_id")


def _example_of_ids(tables: RawTables) -> str:
    events, items = tables.interactions["item_id"].drop_nulls(), tables.items["item_id"].drop_nulls()
    if not len(events) or not len(items) or events.is_in(items.implode()).any():
        return ""
    return f" (interactions speak of item {events[0]!r}, the catalogue of {items[0]!r})"
