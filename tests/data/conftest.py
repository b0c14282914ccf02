from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl
import pytest

from recast_cli.data.source import RawTables, Source


@pytest.fixture
def raw_tables() -> Callable[..., RawTables]:
    """Raw tables from (user, item, timestamp) tuples; by default every item has a title."""

    def make(
        events: Sequence[tuple[str | None, str | None, float | None]],
        items: Sequence[tuple[str | None, str | None]] | None = None,
    ) -> RawTables:
        if items is None:
            items = [(item, f"Title {item}") for item in dict.fromkeys(item for _, item, _ in events if item)]
        names = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Float64}
        interactions = pl.DataFrame(events, schema=names, orient="row").with_row_index("row", offset=1)
        catalogue = pl.DataFrame(items, schema={"item_id": pl.String, "title": pl.String}, orient="row")
        return RawTables(
            interactions.with_columns(timestamp_text=pl.col("timestamp").cast(pl.String)),
            catalogue.with_row_index("row", offset=1).with_columns(text=pl.col("title")),
        )

    return make


@pytest.fixture
def make_source(raw_tables: Callable[..., RawTables]) -> Callable[..., Source]:
    """A source over tuples, as `raw_tables` takes them."""

    def make(events: Sequence[tuple[str, str, float]], **options: object) -> Source:
        return Source(name="toy", sha256="0", load=lambda: raw_tables(events, **options))

    return make


@pytest.fixture
def csv_files(tmp_path: Path) -> tuple[Path, Path]:
    """A clean log of two users with four events each, and its catalogue of five items."""
    log, catalogue = tmp_path / "log.csv", tmp_path / "items.csv"
    log.write_text(
        "user_id,item_id,timestamp,rating\n"
        "u1,a,1,5\nu1,b,2,4\nu1,c,3,3\nu1,d,4,5\n"
        "u2,b,10,5\nu2,c,20,5\nu2,d,30,5\nu2,e,40,5\n"
    )
    catalogue.write_text(
        "item_id,title,genre,price\na,Alpha,Action,1\nb,Beta,Drama,2\nc,Gamma,,3\nd,Delta,Comedy,4\ne,Eta,,5\n"
    )
    return log, catalogue
