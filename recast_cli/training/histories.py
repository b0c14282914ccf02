"""The whole history of each RL row, for rollouts that must not repeat it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recast_cli.errors import DataError


def add_histories(rows: pa.Table, data: Path) -> pa.Table:
    """RL rows with `extra_info.history`: all that the user had before the target, the prompt shows less.

    Args:
        rows: As verl reads them; `extra_info.index` is the target's row in `interactions.parquet`.
        data: Folder of `recast prepare-data`.

    Returns:
        The same with one more field of `extra_info`: item rows (order of `items.parquet`, which is that of
        `semantic_ids.parquet`), in time order.

    Raises:
        DataError: a row whose index does not lead to its target, or whose history leaves no item.
    """
    events = pq.read_table(data / "interactions.parquet", columns=["item_id", "position"])
    items = pq.read_table(data / "items.parquet", columns=["item_id"])["item_id"].combine_chunks()
    item_E = pc.index_in(events["item_id"].combine_chunks(), items).to_numpy(zero_copy_only=False)
    position_E = events["position"].to_numpy()
    extra_info = rows["extra_info"].combine_chunks()
    index_R = extra_info.field("index").to_numpy()
    target_R = pc.index_in(extra_info.field("target_item_id"), items).fill_null(-1).to_numpy()
    known_R = index_R < len(item_E)
    wrong = np.flatnonzero(~known_R | (item_E[np.where(known_R, index_R, 0)] != target_R))
    if len(wrong):
        raise DataError(
            f"RL row with index {index_R[wrong[0]]} is no event of its target in {data}/interactions.parquet",
            "rerun recast prepare-data and recast build-tokenizer",
        )
    histories = [item_E[index - position_E[index] : index] for index in index_R]
    for index, history in zip(index_R.tolist(), histories, strict=True):
        if len(history) >= len(items) and len(np.unique(history)) == len(items):
            raise DataError(
                f"the history of RL row {index} holds all {len(items)} items, needed one left to answer",
                "set rl.exclude_history=false",
            )
    fields = {extra_info.type.field(i).name: extra_info.field(i) for i in range(extra_info.type.num_fields)}
    fields["history"] = pa.array(histories, pa.list_(pa.int32()))
    column = pa.StructArray.from_arrays(list(fields.values()), names=list(fields))
    return rows.set_column(rows.column_names.index("extra_info"), "extra_info", column)
