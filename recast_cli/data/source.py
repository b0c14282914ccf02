"""What a data source hands to the dataset stage, whatever its origin."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import polars as pl


class RawTables(NamedTuple):
    """A log and a catalogue in one shape, not yet cleaned.

    Attributes:
        interactions: `row` (1-based data row in the source), `user_id`, `item_id` (text, null where missing),
            `timestamp` (f64, null where missing or unreadable), `timestamp_text` (as found).
        items: `row`, `item_id`, `title`, `text` (null where missing).
    """

    interactions: pl.DataFrame
    items: pl.DataFrame


@dataclass(frozen=True)
class Source:
    """A named, hashed origin of data. Nothing is read until `load` is called, so that reuse is quick.

    Attributes:
        name: Short name; becomes `data_source` of the rows that verl reads.
        sha256: Hash of all that decides the content: files and column map, or generator settings.
        load: Reads or makes the tables.
        facts: Anything JSON worth recording in the manifest.
    """

    name: str
    sha256: str
    load: Callable[[], RawTables]
    facts: dict[str, Any] = field(default_factory=dict)


def hash_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
