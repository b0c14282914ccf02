"""The dataset stage: raw tables in, a dataset artifact out, all or nothing.

Files of the artifact (`index` is the row of the target event in interactions.parquet: unique over the three
files of targets, and the same whatever the options for RL rows):

    items.parquet         item_id, title, text                       row number = item index
    interactions.parquet  user_id, item_id, timestamp, position      by user, then time
    sft.parquet           index, user_id, items, learn_from          windows; places >= learn_from are learned
    rl|validation|test    index, user_id, position, history, target  one target each, history capped
    dropped.csv           table, row, reason, user_id, item_id       what was not usable
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recast_cli.artifacts import find_existing, write_manifest
from recast_cli.data import split
from recast_cli.data.clean import MIN_EVENTS, Cleaned, clean, count_reasons
from recast_cli.data.source import Source
from recast_cli.data.tables import INTERACTIONS, ITEMS, TARGETS, WINDOWS, slices, write_parquet
from recast_cli.errors import DataError, RecipeError
from recast_cli.outputs import atomic_dir

RL_ROWS = ("sft", "held-out")
MAX_HISTORY = 100_000  # items; no model reads as many


@dataclass(frozen=True)
class Params:
    """What shapes a dataset beside its source; recorded in the manifest and compared before reuse.

    Attributes:
        k_core: Users and items keep at least this many events; 0 keeps every item, 1 those with an
            event (users always need 3).
        history: Most items in a prompt.
        rl_rows: `sft`: RL sees the rows that SFT learned; `held-out`: only a later slice SFT never learned.
        held_out_share: Share of each user's training positions in that slice (at least one position).
        strict: Unusable rows are errors.
        drop_bad_timestamps: Rows whose timestamp cannot be read are dropped instead of being an error.
    """

    k_core: int = 0
    history: int = 20
    rl_rows: str = "sft"
    held_out_share: float = 0.1
    strict: bool = False
    drop_bad_timestamps: bool = False

    def __post_init__(self) -> None:
        if self.k_core < 0:
            raise RecipeError(f"k-core is {self.k_core}, needed 0 or more", "0 keeps every item")
        if not 1 <= self.history <= MAX_HISTORY:
            raise RecipeError(f"history is {self.history}, needed 1 to {MAX_HISTORY}", "20 is the default")
        if self.rl_rows not in RL_ROWS:
            raise RecipeError(
                f"rl-rows is {self.rl_rows!r}, needed one of {', '.join(RL_ROWS)}", "sft is the default"
            )
        if not 0 < self.held_out_share < 1:
            raise RecipeError(
                f"held-out-share is {self.held_out_share}, needed above 0 and below 1", "0.1 is the default"
            )


def prepare(
    source: Source, params: Params, out: Path, *, seed: int = 0, overwrite: bool = False
) -> tuple[dict[str, Any], bool]:
    """Make the dataset in `out`, or reuse the one there if source and parameters are the same.

    Returns:
        The manifest, and whether an existing dataset was reused.

    Raises:
        DataError, ArtifactError, EnvironmentFault: bad input, an occupied `out`, no disk or network.
    """
    existing = find_existing(
        out, "dataset", lambda found: _difference(found, source, params), overwrite=overwrite
    )
    if existing is not None:
        return existing, True
    cleaned = clean(source.load(), strict=params.strict, drop_bad_timestamps=params.drop_bad_timestamps)
    events, items, removed = _filter(cleaned, params.k_core)
    with atomic_dir(out, replace=overwrite) as folder:
        (folder / "dropped.csv").write_text(cleaned.dropped.write_csv(), encoding="utf-8")
        rows = _write_tables(folder, events, items, params)
        manifest = write_manifest(
            folder,
            "dataset",
            seed=seed,
            num_users=events["user_id"].n_unique(),
            num_items=items.height,
            num_interactions=events.height,
            params=asdict(params),
            tie_share=split.tie_share(events),
            target_tie_share=split.target_tie_share(events),
            tie_rule="source row order",
            dropped=count_reasons(cleaned.dropped),
            k_core_removed=removed,
            rows=rows,
            source={"name": source.name, "sha256": source.sha256, **source.facts},
        )
    return manifest, False


def _filter(cleaned: Cleaned, k: int) -> tuple[pl.DataFrame, pl.DataFrame, dict[str, int]]:
    """Ordered events and sorted items after the k-core, and how much it removed."""
    before = cleaned.interactions
    left = split.k_core(before, min_user=max(k, MIN_EVENTS), min_item=k)
    if left.height == 0:
        raise DataError(
            f"the {k}-core of {before.height} interactions ({before['user_id'].n_unique()} users, "
            f"{before['item_id'].n_unique()} items) is empty, needed at least one user",
            "lower --k-core",
        )
    items = cleaned.items
    if k > 0:
        items = items.join(left.select("item_id").unique(), on="item_id", how="semi")
    removed = {
        "users": before["user_id"].n_unique() - left["user_id"].n_unique(),
        "items": cleaned.items.height - items.height,
        "interactions": before.height - left.height,
    }
    items = items.sort(*split.order_ids("item_id", items["item_id"])).select("item_id", "title", "text")
    return split.order_events(left), items, removed


def _write_tables(folder: Path, events: pl.DataFrame, items: pl.DataFrame, params: Params) -> dict[str, int]:
    """Write the parquet files of the artifact and return the rows of each split."""
    held_out = params.rl_rows == "held-out"
    users = split.layout(events, params.held_out_share if held_out else None)
    windows = split.sft_windows(users, params.history)
    user_ids = events["user_id"].gather(users.first_U).to_arrow()
    item_ids = events["item_id"].to_arrow()
    write_parquet(folder / "items.parquet", ITEMS, {name: items[name].to_arrow() for name in items.columns})
    write_parquet(
        folder / "interactions.parquet",
        INTERACTIONS,
        {name: events[name].to_arrow() for name in events.columns},
    )
    write_parquet(
        folder / "sft.parquet",
        WINDOWS,
        {
            "index": np.arange(len(windows.user_W)),
            "user_id": user_ids.take(windows.user_W),
            "items": slices(item_ids, windows.start_W, windows.stop_W),
            "learn_from": windows.learn_from_W,
        },
    )
    targets = {
        "rl": split.rl_targets(users, params.history, held_out=held_out),
        "validation": split.evaluation_targets(users, params.history, from_end=2),
        "test": split.evaluation_targets(users, params.history, from_end=1),
    }
    for name, rows in targets.items():
        write_parquet(
            folder / f"{name}.parquet",
            TARGETS,
            {
                "index": rows.target_R,
                "user_id": user_ids.take(rows.user_R),
                "position": rows.target_R - users.first_U[rows.user_R],
                "history": slices(item_ids, rows.start_R, rows.target_R),
                "target": item_ids.take(rows.target_R),
            },
        )
    counts = {name: len(rows.target_R) for name, rows in targets.items()}
    return {"sft_windows": len(windows.user_W), "sft_positions": int(users.num_sft_U.sum()), **counts}


def _difference(manifest: dict[str, Any], source: Source, params: Params) -> str:
    """What keeps a dataset from being reused, in words; empty if nothing."""
    found = manifest.get("source", {})
    if found.get("name") != source.name:
        return f"with source {found.get('name')}, needed {source.name}"
    if found.get("sha256") != source.sha256:
        return f"with other content of source {source.name}"
    for key, needed in asdict(params).items():
        value = manifest.get("params", {}).get(key)
        if value != needed:
            return f"with {key} {value}, needed {needed}"
    return ""
