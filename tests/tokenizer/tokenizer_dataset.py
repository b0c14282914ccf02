"""A small dataset artifact, written by hand, and the chat template of the tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
from sealing import whole

from recast_cli.artifacts import write_manifest

TEMPLATE = (
    "{%- for message in messages -%}<|sid_begin|>{{- message['content'] -}}<|sid_end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|sid_begin|>{%- endif -%}"
)
NUM_ITEMS = 120
SIZES = (8, 8, 8)


def write_dataset(
    folder: Path, *, num_items: int = NUM_ITEMS, last_two: int = 0, text: bool = True, history: int = 10
) -> Path:
    """Write a dataset by hand; `last_two` shifts every user's last two items and nothing else."""
    folder.mkdir()
    ids = [str(item + 1) for item in range(num_items)]
    rng = np.random.default_rng(0)
    genres = np.array(["drama", "comedy", "western", "horror"])
    texts = [f"Film {item} | {genres[item % 4]}" if text else "" for item in range(num_items)]
    pl.DataFrame({"item_id": ids, "title": texts, "text": texts}).write_parquet(folder / "items.parquet")
    rows = []
    for user in range(60):
        length = int(rng.integers(3, 12))
        sequence = (user % 4 + 4 * rng.integers(0, num_items // 4, length)) % num_items
        sequence[-2:] = (sequence[-2:] + last_two) % num_items
        rows += [(f"u{user:03d}", ids[item], float(place), place) for place, item in enumerate(sequence)]
    schema = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Float64, "position": pl.Int32}
    pl.DataFrame(rows, schema=schema, orient="row").write_parquet(folder / "interactions.parquet")
    facts = {"num_users": 60, "num_items": num_items, "num_interactions": len(rows)}
    write_manifest(folder, "dataset", seed=0, **whole("dataset", params={"history": history}, **facts))
    return folder
