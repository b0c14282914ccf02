"""A dataset and its semantic IDs become the parquet files that verl reads.

sft.parquet                     messages
rl|validation|test.parquet      data_source, prompt, ability, reward_model, extra_info
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recast_cli.artifacts import load_manifest
from recast_cli.data.prompts import Message, build_messages, code_text
from recast_cli.data.tables import write_batches
from recast_cli.errors import ArtifactError, DataError

ABILITY = "recommendation"
SPLITS = ("rl", "validation", "test")

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SFT = pa.schema([("messages", _MESSAGES)])
RL = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", _MESSAGES),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        (
            "extra_info",
            pa.struct(
                [
                    ("index", pa.int64()),
                    ("user_id", pa.string()),
                    ("target_item_id", pa.string()),
                    ("split", pa.string()),
                ]
            ),
        ),
    ]
)


def render(dataset: Path, semantic_ids: Path | Mapping[str, str], out: Path) -> dict[str, int]:
    """Write the verl files of a dataset into `out` (a folder of the caller's, who makes it atomic).

    Args:
        dataset: A folder of `recast prepare-data`.
        semantic_ids: item id -> semantic ID, or a parquet with exactly the columns `item_id, sid`,
            or a tokenizer folder that holds it as semantic_ids.parquet.
        out: Created if absent.

    Returns:
        Rows per file.

    Raises:
        ArtifactError: the semantic IDs do not fit the dataset's items.
        DataError: an index is missing or used twice; a semantic ID is misspelt or shared by two items.
    """
    name = load_manifest(dataset, "dataset")["source"]["name"]
    sids = read_semantic_ids(semantic_ids)
    _require_all(sids, pq.read_table(dataset / "items.parquet")["item_id"].to_pylist())
    paths = {split: dataset / f"{split}.parquet" for split in SPLITS}
    check_index({split: pq.read_table(path)["index"].to_pylist() for split, path in paths.items()})
    out.mkdir(parents=True, exist_ok=True)
    windows = (
        {
            "messages": [
                build_messages([sids[item] for item in row["items"]], row["learn_from"]) for row in rows
            ]
        }
        for rows in _read_batches(dataset / "sft.parquet")
    )
    counts = {"sft": write_batches(out / "sft.parquet", SFT, windows)}
    for split, path in paths.items():
        batches = ([render_row(row, sids, name, split) for row in rows] for rows in _read_batches(path))
        columns = ({key: [row[key] for row in rows] for key in RL.names} for rows in batches)
        counts[split] = write_batches(out / f"{split}.parquet", RL, columns)
    return counts


def _read_batches(path: Path) -> Iterator[list[dict[str, Any]]]:
    # A message is a dict: all rows of a large log at once would take many times the file in memory.
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=4096):
            yield batch.to_pylist()


def render_row(
    row: Mapping[str, Any], sids: Mapping[str, str], data_source: str, split: str
) -> dict[str, Any]:
    """One row of rl, validation or test as verl reads it; the target travels with the row."""
    prompt: list[Message] = build_messages([sids[item] for item in row["history"]])
    return {
        "data_source": data_source,
        "prompt": prompt,
        "ability": ABILITY,
        "reward_model": {"style": "rule", "ground_truth": code_text(sids[row["target"]])},
        "extra_info": {
            "index": row["index"],
            "user_id": row["user_id"],
            "target_item_id": row["target"],
            "split": split,
        },
    }


def check_index(index: Mapping[str, Sequence[int | None]]) -> None:
    """Every row needs an index of its own: verl silently takes 0 for a missing one.

    Args:
        index: split -> the `index` of its rows.

    Raises:
        DataError: naming split and row.
    """
    seen: dict[int, tuple[str, int]] = {}
    for split, values in index.items():
        for place, value in enumerate(values):
            if value is None:
                raise DataError(f"{split}.parquet row {place} has no index", "rerun recast prepare-data")
            if value in seen:
                other, first = seen[value]
                raise DataError(
                    f"{split}.parquet row {place} has index {value}, already in {other}.parquet row {first}",
                    "rerun recast prepare-data",
                )
            seen[value] = (split, place)


def read_semantic_ids(semantic_ids: Path | Mapping[str, str]) -> dict[str, str]:
    """item id -> semantic ID, spelling and uniqueness checked.

    Raises:
        ArtifactError: the parquet is missing or has other columns.
        DataError: a semantic ID is misspelt, has another number of levels, or belongs to two items.
    """
    pairs = _read_pairs(semantic_ids)
    sids: dict[str, str] = {}
    owner: dict[str, str] = {}
    num_levels = code_text(pairs[0][1]).count("<") if pairs else 0
    for item, sid in pairs:
        found = code_text(sid).count("<")
        if found != num_levels:
            raise DataError(
                f"item {item!r} has {found} codes, needed {num_levels}", "rerun recast build-tokenizer"
            )
        if item in sids or sid in owner:
            problem = (
                f"items {owner[sid]!r} and {item!r} share {sid}"
                if sid in owner
                else f"item {item!r} occurs twice"
            )
            raise DataError(f"semantic IDs: {problem}", "rerun recast build-tokenizer")
        sids[item], owner[sid] = sid, item
    return sids


def _read_pairs(semantic_ids: Path | Mapping[str, str]) -> list[tuple[str, str]]:
    if isinstance(semantic_ids, Mapping):
        return list(semantic_ids.items())
    if semantic_ids.is_dir():
        semantic_ids = semantic_ids / "semantic_ids.parquet"
    if not semantic_ids.is_file():
        raise ArtifactError(f"{semantic_ids} does not exist", "make it with `recast build-tokenizer`")
    table = pq.read_table(semantic_ids)
    if table.column_names != ["item_id", "sid"]:
        raise ArtifactError(
            f"{semantic_ids} has columns {', '.join(table.column_names)}, needed item_id, sid",
            "rerun recast build-tokenizer",
        )
    return list(zip(table["item_id"].to_pylist(), table["sid"].to_pylist(), strict=True))


def _require_all(sids: Mapping[str, str], items: Sequence[str]) -> None:
    lacking = [item for item in items if item not in sids]
    if lacking or len(sids) != len(items):
        example = f", item {lacking[0]!r} has none" if lacking else ""
        raise ArtifactError(
            f"semantic IDs cover {len(sids)} items, this dataset has {len(items)}{example}",
            "rerun recast build-tokenizer on this dataset",
        )
