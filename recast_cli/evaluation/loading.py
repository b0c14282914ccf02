"""Reading what an evaluation stands on: the catalogue's spelling, checked."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from recast_cli.errors import ArtifactError


def read_catalogue(tokenizer_dir: Path, data_dir: Path) -> dict[str, int]:
    """Text of each semantic ID in semantic_ids.parquet -> item row.

    Raises:
        ArtifactError: other items than the dataset's, or a semantic ID of two items.
    """
    table = pl.read_parquet(tokenizer_dir / "semantic_ids.parquet")
    items = pl.read_parquet(data_dir / "items.parquet", columns=["item_id"])
    if table["item_id"].to_list() != items["item_id"].to_list():
        raise ArtifactError(
            f"{tokenizer_dir}: semantic_ids.parquet does not list the items of {data_dir} in their order",
            "rerun `recast build-tokenizer` on this dataset",
        )
    row_of_sid = {sid: row for row, sid in enumerate(table["sid"])}
    if len(row_of_sid) != len(table):
        raise ArtifactError(
            f"{tokenizer_dir}: {len(table)} items share {len(row_of_sid)} semantic IDs",
            "rerun `recast build-tokenizer`",
        )
    return row_of_sid
