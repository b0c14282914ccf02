"""What the stage reads of a dataset folder.

E training events.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recast_cli.errors import ArtifactError

HELD_OUT = 2  # last events of every user: validation and test targets


def read_items(data: Path, dataset: dict[str, Any]) -> pl.DataFrame:
    """Item ids and texts in item-row order.

    Raises:
        ArtifactError: not what the dataset's manifest says.
    """
    items = _read_columns(data / "items.parquet", ("item_id", "text"))
    if len(items) != dataset["num_items"] or items["item_id"].n_unique() != len(items):
        raise ArtifactError(
            f"{data / 'items.parquet'} holds {items['item_id'].n_unique()} items in {len(items)} rows, "
            f"its manifest says {dataset['num_items']}",
            "rerun `recast prepare-data`",
        )
    return items


def read_interactions(data: Path) -> pl.DataFrame:
    """user_id, item_id and position (0-based in the user's sequence) of every event."""
    return _read_columns(data / "interactions.parquet", ("user_id", "item_id", "position"))


def training_events(
    interactions: pl.DataFrame, item_ids: pl.Series
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """User and item number of every event but each user's last two (the validation and test targets).

    Args:
        interactions: user_id, item_id, position (0-based in the user's sequence).
        item_ids: Item ids in the order of their rows.
    """
    rows = pl.DataFrame({"item_id": item_ids, "item": np.arange(len(item_ids))})
    kept = (
        interactions.filter(pl.col("position") < pl.col("position").max().over("user_id") + 1 - HELD_OUT)
        .join(rows, on="item_id", how="left", maintain_order="left")
        .with_columns(user=pl.col("user_id").rank("dense") - 1)
    )
    if kept["item"].null_count():
        missing = kept.filter(pl.col("item").is_null())["item_id"][0]
        raise ArtifactError(
            f"interactions name item {missing!r}, which items.parquet lacks", "rerun `recast prepare-data`"
        )
    return kept["user"].cast(pl.Int64).to_numpy(), kept["item"].to_numpy()


def _read_columns(path: Path, columns: Sequence[str]) -> pl.DataFrame:
    """Read these columns of a parquet file of the dataset.

    Raises:
        ArtifactError: unreadable, or a column is missing.
    """
    try:
        return pl.read_parquet(path, columns=list(columns))
    except (OSError, pl.exceptions.PolarsError) as exc:
        reason = " ".join(str(exc).split())[:200]
        raise ArtifactError(
            f"{path} lacks {', '.join(columns)}: {reason}", "rerun `recast prepare-data`"
        ) from exc
