"""Preparing a log, beside pandas on the part of it that is the same.

    python benchmarks/prepare_data.py

A csv of a million events (50,000 users, 20,000 items, popularity by Zipf's law) becomes a dataset:
duplicates out, 5-core, order, leave-one-out targets with their last 20 items. `recast prepare-data` also
checks every row, lists what it dropped, and writes windows for SFT and rows for RL. Wall-clock seconds, two
cores; arms take turns. Events, targets and histories must be the same.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import record
from timing import compared, in_turns, show, wall

from recast_cli.data import files
from recast_cli.data.prepare import Params, prepare

RESULT = Path(__file__).parent / "results" / "prepare_data.json"
NUM_EVENTS, NUM_USERS, NUM_ITEMS = 1_000_000, 50_000, 20_000
CORE, HISTORY = 5, 20


def write_log(folder: Path, num_events: int, num_users: int, num_items: int) -> None:
    """`log.csv` and `items.csv`; a few events come twice, some items once."""
    rng = np.random.default_rng(0)
    weight_N = 1 / np.arange(1, num_items + 1)
    items = rng.choice(num_items, num_events, p=weight_N / weight_N.sum())
    log = {
        "user_id": rng.integers(0, num_users, num_events),
        "item_id": items,
        "timestamp": rng.integers(0, 2 * num_events, num_events),
    }
    pl.DataFrame(log).write_csv(folder / "log.csv")
    titles = [f"item {item}" for item in range(num_items)]
    pl.DataFrame({"item_id": np.arange(num_items), "title": titles}).write_csv(folder / "items.csv")


def with_recast(folder: Path) -> Path:
    """The dataset stage of `recast prepare-data`."""
    out = folder / "recast"
    shutil.rmtree(out, ignore_errors=True)
    source = files.source(folder / "log.csv", folder / "items.csv")
    prepare(source, Params(k_core=CORE, history=HISTORY), out)
    return out


def with_pandas(folder: Path) -> Path:
    """Events and the two held-out targets of every user, as one would write it with pandas."""
    out = folder / "pandas"
    out.mkdir(exist_ok=True)
    events = pd.read_csv(folder / "log.csv", dtype={"user_id": str, "item_id": str})
    known = pd.read_csv(folder / "items.csv", dtype={"item_id": str})["item_id"]
    events = events.drop_duplicates(["user_id", "item_id", "timestamp"])
    events = events[events["item_id"].isin(known)]
    before = -1
    while len(events) != before:
        before = len(events)
        for column in ("item_id", "user_id"):
            events = events[events.groupby(column)[column].transform("size") >= CORE]
    events = events.assign(number=events["user_id"].astype("int64"))
    events = events.sort_values(["number", "timestamp"])  # several keys: stable, so ties keep their order
    events["position"] = events.groupby("number").cumcount()
    columns = ["user_id", "item_id", "timestamp", "position"]
    events[columns].to_parquet(out / "interactions.parquet", index=False)
    users, items = events["user_id"].to_numpy(), events["item_id"].to_numpy()
    begin_U = np.flatnonzero(events["position"].to_numpy() == 0)
    end_U = np.append(begin_U[1:], len(events))
    for name, from_end in (("test", 1), ("validation", 2)):
        target_U = end_U - from_end
        start_U = np.maximum(begin_U, target_U - HISTORY)
        histories = [items[start:target] for start, target in zip(start_U, target_U, strict=True)]
        rows = {"user_id": users[begin_U], "history": histories, "target": items[target_U]}
        pd.DataFrame(rows).to_parquet(out / f"{name}.parquet", index=False)
    return out


def require_same(ours: Path, theirs: Path) -> int:
    """Events of both datasets, which must be the same, with their targets and histories."""
    for name, columns in (
        ("interactions", ["user_id", "item_id", "timestamp", "position"]),
        ("test", ["user_id", "history", "target"]),
        ("validation", ["user_id", "history", "target"]),
    ):
        found, needed = (
            pl.read_parquet(folder / f"{name}.parquet").select(columns) for folder in (ours, theirs)
        )
        assert found.height and found.rows() == needed.rows(), name
    return pl.read_parquet(ours / "interactions.parquet").height


def measure(repeats: int, num_events: int = NUM_EVENTS) -> dict[str, list[float]]:
    """Seconds of both arms."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        share = num_events / NUM_EVENTS
        write_log(folder, num_events, int(NUM_USERS * share), int(NUM_ITEMS * share))
        arms = {"recast": lambda: with_recast(folder), "pandas": lambda: with_pandas(folder)}
        seconds = in_turns(arms, repeats, wall)
        require_same(folder / "recast", folder / "pandas")
    return seconds


def main() -> None:
    parser = record.parser(__doc__, RESULT)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    start = record.before()
    rows: dict[str, Any] = compared(measure(args.repeats))
    show(rows)
    record.write(args.result, start, {"events": NUM_EVENTS, "arms": rows})


if __name__ == "__main__":
    main()
