"""Write parquet with fixed schemas and settings, so that equal content gives equal bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recast_cli.core.runs import runs

# Plain `string` and `list` (polars would give their 64-bit kinds, which some readers do not know).
ITEMS = pa.schema([("item_id", pa.string()), ("title", pa.string()), ("text", pa.string())])
INTERACTIONS = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("timestamp", pa.float64()),
        ("position", pa.int32()),
    ]
)
WINDOWS = pa.schema(
    [
        ("index", pa.int64()),
        ("user_id", pa.string()),
        ("items", pa.list_(pa.string())),
        ("learn_from", pa.int32()),
    ]
)
TARGETS = pa.schema(
    [
        ("index", pa.int64()),
        ("user_id", pa.string()),
        ("position", pa.int32()),
        ("history", pa.list_(pa.string())),
        ("target", pa.string()),
    ]
)


def write_parquet(path: Path, schema: pa.Schema, columns: Mapping[str, Any]) -> None:
    """Write columns (arrow, numpy or lists) under a fixed schema."""
    write_batches(path, schema, [columns])


def write_batches(path: Path, schema: pa.Schema, batches: Iterable[Mapping[str, Any]]) -> int:
    """Write batches of columns one after the other, one in memory at a time; returns the number of rows."""
    num_rows = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for columns in batches:
            arrays = [_cast(columns[field.name], field.type) for field in schema]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            num_rows += len(arrays[0])
    return num_rows


def _cast(column: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return column.cast(kind) if isinstance(column, pa.Array) else pa.array(column, type=kind)


def slices(values: pa.Array, start_R: np.ndarray, stop_R: np.ndarray) -> pa.ListArray:
    """`values[start:stop]` for each row as one list column; slices may overlap."""
    sizes_R = stop_R - start_R
    offsets = np.concatenate([[0], np.cumsum(sizes_R)])
    taken = values.take(pa.array(runs(start_R, sizes_R)))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), taken)
