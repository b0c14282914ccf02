"""Dataset and tokenizer for several folders of tests, made by the real stages from the synthetic source."""

from __future__ import annotations

from pathlib import Path

from recast_cli.data.prepare import Params, prepare
from recast_cli.data.prompts import CHAT_TEMPLATE
from recast_cli.data.render import render
from recast_cli.data.synthetic import SyntheticConfig, source
from recast_cli.tokenizer.build import TokenizerParams, build

HISTORY = 5
NUM_ITEMS = 40


def write_artifacts(folder: Path) -> tuple[Path, Path]:
    """(dataset, tokenizer): 60 users, 40 items, 3 levels of 8 codes, a Qwen3 of width 64."""
    data, tokenizer = folder / "data", folder / "tokenizer"
    config = SyntheticConfig(num_users=60, num_items=NUM_ITEMS, num_clusters=4, sparsity=0.7)
    prepare(source(config), Params(history=HISTORY), data)
    write_tokenizer(data, tokenizer)
    return data, tokenizer


def write_tokenizer(data: Path, tokenizer: Path, base_model: Path | None = None) -> None:
    """3 levels of 8 codes over a dataset, with a Qwen3 of width 64 or a named model expanded."""

    def finish(scratch: Path) -> None:
        render(data, scratch / "semantic_ids.parquet", scratch / "verl")

    params = TokenizerParams(
        (8, 8, 8),
        embeddings="cooccurrence",
        hidden_size=64,
        num_layers=2,
        base_model=None if base_model is None else str(base_model),
    )
    build(data, tokenizer, params, chat_template=CHAT_TEMPLATE, finish=finish)
