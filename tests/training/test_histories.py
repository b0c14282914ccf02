"""Whole histories of RL rows against a plain loop over the log."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recast_cli.data.prepare import Params, prepare
from recast_cli.data.render import render
from recast_cli.data.synthetic import SyntheticConfig, source
from recast_cli.errors import DataError
from recast_cli.training.histories import add_histories


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pa.Table]:
    """A dataset whose prompts show 2 items, and its RL rows in an order of our own."""
    folder = tmp_path_factory.mktemp("histories")
    config = SyntheticConfig(num_users=20, num_items=12, num_clusters=3, sparsity=0.5)
    prepare(source(config), Params(history=2), folder / "data")
    items = pq.read_table(folder / "data" / "items.parquet")["item_id"].to_pylist()
    sids = {item: f"<|sid_begin|><s_a_{row}><|sid_end|>" for row, item in enumerate(items)}
    render(folder / "data", sids, folder / "verl")
    rows = pq.read_table(folder / "verl" / "rl.parquet")
    return folder / "data", rows.take(list(range(rows.num_rows))[::-3])


def test_history_is_every_event_before_the_target(rendered: tuple[Path, pa.Table]) -> None:
    data, rows = rendered
    items = pq.read_table(data / "items.parquet")["item_id"].to_pylist()
    events = pq.read_table(data / "interactions.parquet").to_pylist()
    found = add_histories(rows, data)
    longer = 0
    for before, row in zip(rows.to_pylist(), found.to_pylist(), strict=True):
        info = row["extra_info"]
        target = events[info["index"]]
        earlier = [
            e for e in events if e["user_id"] == info["user_id"] and e["position"] < target["position"]
        ]
        earlier.sort(key=lambda event: event["position"])
        assert [items[item] for item in info["history"]] == [event["item_id"] for event in earlier]
        shown = [f"<s_a_{item}>" for item in info["history"][-len(row["prompt"]) :]]
        assert [message["content"] for message in row["prompt"]] == shown
        longer += len(info["history"]) > len(row["prompt"])
        assert {**row, "extra_info": {k: v for k, v in info.items() if k != "history"}} == before
    assert longer > 10


def test_rows_of_another_dataset_are_refused(rendered: tuple[Path, pa.Table], tmp_path: Path) -> None:
    _, rows = rendered
    config = SyntheticConfig(num_users=20, num_items=12, num_clusters=3, sparsity=0.5, seed=9)
    prepare(source(config), Params(history=2), tmp_path / "other")
    with pytest.raises(DataError, match=r"RL row with index \d+ is no event of its target"):
        add_histories(rows, tmp_path / "other")


def test_a_history_of_the_whole_catalogue_is_refused(tmp_path: Path) -> None:
    """A user who had both items already, and then one of them again."""
    pq.write_table(pa.table({"item_id": ["a", "b"]}), tmp_path / "items.parquet")
    events = {"item_id": ["a", "b", "a", "a"], "position": pa.array([0, 1, 2, 0], pa.int32())}
    pq.write_table(pa.table(events), tmp_path / "interactions.parquet")

    def rows(index: int, target: str) -> pa.Table:
        return pa.table({"extra_info": [{"index": index, "target_item_id": target}]})

    fine = add_histories(rows(1, "b"), tmp_path)
    assert fine["extra_info"].to_pylist() == [{"index": 1, "target_item_id": "b", "history": [0]}]
    assert add_histories(rows(3, "a"), tmp_path)["extra_info"].to_pylist()[0]["history"] == []
    with pytest.raises(DataError, match="history of RL row 2 holds all 2 items"):
        add_histories(rows(2, "a"), tmp_path)
