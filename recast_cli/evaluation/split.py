"""The rows an evaluation asks about: targets, whole histories, and the events a baseline may learn from.

Shapes: U evaluated rows, N items, E training events.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recast_cli.artifacts import load_manifest
from recast_cli.core.runs import runs
from recast_cli.errors import ArtifactError

SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Split:
    """One split of a dataset artifact, item ids replaced by item rows.

    Attributes:
        name: `validation` or `test`.
        index_U: `index` of each row, unique.
        user_ids: U user ids.
        target_U: Item row of each target.
        histories: U arrays of item rows, ALL the user's events before the target in time order, repeats
            included; longer than what the prompt shows.
        train_user_E: User number of each event that a baseline may learn from.
        train_item_E: Item row of that event.
        item_ids: N ids, row order.
        manifest: Of the dataset.
    """

    name: str
    index_U: NDArray[np.int64]
    user_ids: list[str]
    target_U: NDArray[np.int64]
    histories: list[NDArray[np.int64]]
    train_user_E: NDArray[np.int64]
    train_item_E: NDArray[np.int64]
    item_ids: list[str]
    manifest: dict[str, Any]

    @property
    def num_items(self) -> int:
        return len(self.item_ids)


@dataclass(frozen=True)
class Log:
    """All interactions by user: user u owns events `start[u]:start[u + 1]` of `item_E`, in time order."""

    users: dict[str, int]
    start: NDArray[np.int64]
    item_E: NDArray[np.int64]
    item_ids: list[str]

    def before(self, user_id: str, position: int | None = None) -> NDArray[np.int64]:
        """Item rows of a user's events before `position`, all of them by default."""
        user = self.users[user_id]
        start, end = int(self.start[user]), int(self.start[user + 1])
        return self.item_E[start : end if position is None else start + position]


def load_log(data_dir: Path) -> Log:
    """Read items and interactions of a dataset artifact.

    Raises:
        ArtifactError: unknown items, or positions that do not count 0, 1, 2, ... inside each user.
    """
    item_ids = pl.read_parquet(data_dir / "items.parquet", columns=["item_id"])["item_id"].to_list()
    rows = pl.DataFrame({"item_id": item_ids, "row": np.arange(len(item_ids), dtype=np.int64)})
    events = (
        pl.read_parquet(data_dir / "interactions.parquet", columns=["user_id", "item_id", "position"])
        .sort("user_id", "position")
        .join(rows, on="item_id", how="left", maintain_order="left")
    )
    if (unknown := events["row"].null_count()) > 0:
        raise ArtifactError(
            f"{data_dir}: {unknown} interactions name no item of the catalogue", "rerun prepare-data"
        )
    users = events.group_by("user_id", maintain_order=True).len()
    start = np.zeros(len(users) + 1, dtype=np.int64)
    np.cumsum(users["len"].to_numpy(), out=start[1:])
    place = runs(0, np.diff(start))
    if not np.array_equal(place, events["position"].to_numpy()):
        raise ArtifactError(
            f"{data_dir}: positions do not count 0, 1, 2, ... in every user", "rerun prepare-data"
        )
    return Log(
        {user: number for number, user in enumerate(users["user_id"])},
        start,
        events["row"].to_numpy(),
        item_ids,
    )


def load_split(data_dir: Path, name: str, *, max_users: int | None = None, seed: int = 0) -> Split:
    """Read one split.

    Args:
        data_dir: Dataset artifact.
        name: `validation` or `test`.
        max_users: Keep this many rows, drawn by `seed`; training events stay complete.
        seed: Of that draw.

    Raises:
        ArtifactError: no such split, no rows, or rows that do not fit the interactions.
    """
    if name not in SPLITS:
        raise ArtifactError(f"split is {name!r}, needed {' or '.join(SPLITS)}", "pass --split test")
    manifest = load_manifest(data_dir, "dataset")
    log = load_log(data_dir)
    table = pl.read_parquet(data_dir / f"{name}.parquet", columns=["index", "user_id", "position", "target"])
    if len(table) == 0:
        raise ArtifactError(
            f"{data_dir}: the {name} split has no rows", "users need more events, see prepare-data"
        )
    item_row = {item: row for row, item in enumerate(log.item_ids)}
    cut = _cuts(data_dir, name, log)
    events_U = np.diff(log.start)
    train = runs(0, events_U) < np.repeat(cut, events_U)
    if max_users is not None and max_users < len(table):
        kept = np.sort(np.random.default_rng(seed).choice(len(table), size=max_users, replace=False))
        table = table[kept]
    target_U = np.array([item_row[item] for item in table["target"]], dtype=np.int64)
    histories = [
        log.before(user, position) for user, position in table.select("user_id", "position").iter_rows()
    ]
    _check_targets(data_dir, name, log, table, target_U)
    return Split(
        name=name,
        index_U=table["index"].to_numpy().astype(np.int64),
        user_ids=table["user_id"].to_list(),
        target_U=target_U,
        histories=histories,
        train_user_E=np.repeat(np.arange(len(log.users)), np.diff(log.start))[train],
        train_item_E=log.item_E[train],
        item_ids=log.item_ids,
        manifest=manifest,
    )


def _cuts(data_dir: Path, name: str, log: Log) -> NDArray[np.int64]:
    """Per user, the first position that a baseline must not see: its earliest held-out target.

    For `validation` neither the validation nor the test target is seen; for `test` validation events are.
    """
    cut = np.diff(log.start)
    for held_out in SPLITS if name == "validation" else ("test",):
        table = pl.read_parquet(data_dir / f"{held_out}.parquet", columns=["user_id", "position"])
        users = np.array([log.users[user] for user in table["user_id"]], dtype=np.int64)
        np.minimum.at(cut, users, table["position"].to_numpy().astype(np.int64))
    return cut


def _check_targets(
    data_dir: Path, name: str, log: Log, table: pl.DataFrame, target_U: NDArray[np.int64]
) -> None:
    if table["index"].n_unique() != len(table):
        raise ArtifactError(f"{data_dir}: {name} rows share an index", "rerun prepare-data")
    start_U = np.array([log.start[log.users[user]] for user in table["user_id"]], dtype=np.int64)
    wrong = np.flatnonzero(log.item_E[start_U + table["position"].to_numpy()] != target_U)
    if wrong.size:
        row = table.row(int(wrong[0]), named=True)
        raise ArtifactError(
            f"{data_dir}: {name} row {row['index']} has target {row['target']}, not so in the interactions",
            "rerun prepare-data",
        )
