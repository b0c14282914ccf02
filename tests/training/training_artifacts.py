"""A dataset and a tokenizer folder with just what the training stage reads of them, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from sealing import whole

from recast_cli.artifacts import identity, weights_sha256, write_manifest
from recast_cli.recipe import dump_recipe
from recast_cli.training import run, warm_start
from recast_cli.training.inputs import Inputs

HISTORY, LEVELS, NUM_RL_ROWS, NUM_WINDOWS = 4, 3, 6, 10
MODEL_BYTES = 1000


def sid(item: int) -> str:
    return f"<s_a_{item}><s_b_0><s_c_{item + 1}>"


def rl_row(index: int) -> dict[str, Any]:
    return {
        "data_source": "tiny",
        "prompt": [
            {"role": "assistant", "content": sid(index)},
            {"role": "assistant", "content": sid(index + 1)},
        ],
        "ability": "recommendation",
        "reward_model": {"style": "rule", "ground_truth": sid(index + 2)},
        "extra_info": {
            "index": index,
            "user_id": f"u{index}",
            "target_item_id": str(index + 2),
            "split": "rl",
        },
    }


def write_artifacts(folder: Path, *, num_rl_rows: int = NUM_RL_ROWS) -> tuple[Path, Path]:
    """(dataset, tokenizer) folders."""
    data, tokenizer = folder / "data", folder / "tokenizer"
    for path in (data, tokenizer / "verl", tokenizer / "model"):
        path.mkdir(parents=True)
    (data / "items.parquet").write_bytes(b"12 items")  # its hash is the dataset's identity
    dataset = write_manifest(data, "dataset", **whole("dataset", num_items=12, params={"history": HISTORY}))
    schema = pa.Table.from_pylist([rl_row(0)]).schema
    rows = pa.Table.from_pylist([rl_row(i) for i in range(num_rl_rows)], schema=schema)
    for name in ("rl", "validation"):
        pq.write_table(rows, tokenizer / "verl" / f"{name}.parquet")
    messages = [[{"role": "assistant", "content": sid(i)}] for i in range(NUM_WINDOWS)]
    pq.write_table(pa.table({"messages": messages}), tokenizer / "verl" / "sft.parquet")
    (tokenizer / "model" / "model.safetensors").write_bytes(b"0" * MODEL_BYTES)
    facts = whole("tokenizer", num_items=12, num_levels=LEVELS)
    write_manifest(tokenizer, "tokenizer", parents={"dataset": identity(dataset)}, **facts)
    return data, tokenizer


def finish_run(recipe, inputs: Inputs) -> None:
    out = Path(recipe.out)
    out.mkdir(exist_ok=True)
    (out / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    (out / "command.txt").write_text("python -m something\n", encoding="utf-8")
    start = {"model": "m", "sha256": weights_sha256(model_of(inputs))}
    run.close(out, inputs, {"recipe": recipe.model_dump(), "seed": recipe.seed, "start": start})


def model_of(inputs: Inputs) -> Path:
    return inputs.tokenizer / "model"


def finish_warm_start(recipe, inputs: Inputs) -> Path:
    folder = warm_start.folder_of(recipe)
    folder.mkdir(parents=True)
    write_manifest(
        folder, "warm-start", parents=inputs.parents, **whole("warm-start", **warm_start.facts(recipe))
    )
    return folder
