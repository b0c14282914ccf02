"""What a training run reads: dataset and tokenizer, checked against each other."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from recast_cli.artifacts import identity, load_manifest, require_parent
from recast_cli.errors import DataError
from recast_cli.recipe import Recipe


@dataclass(frozen=True)
class Inputs:
    """The parents of a run, checked."""

    data: Path
    tokenizer: Path
    dataset: dict[str, Any]
    tokenizer_manifest: dict[str, Any]

    @classmethod
    def load(cls, recipe: Recipe) -> Inputs:
        """Read both manifests and refuse a tokenizer of another dataset."""
        data, tokenizer = Path(recipe.data), Path(recipe.tokenizer)
        dataset, tokenizer_manifest = load_manifest(data, "dataset"), load_manifest(tokenizer, "tokenizer")
        require_parent(tokenizer_manifest, dataset, tokenizer, data)
        return cls(data, tokenizer, dataset, tokenizer_manifest)

    def require_rl_rows(self) -> None:
        """Refuse a dataset without rows for RL, before a warm start of minutes.

        Raises:
            DataError: naming the file.
        """
        path = self.tokenizer / "verl" / "rl.parquet"
        if pq.read_metadata(path).num_rows == 0:
            raise DataError(f"{path} holds no RL rows", "rerun recast prepare-data with more interactions")

    @property
    def num_levels(self) -> int:
        return int(self.tokenizer_manifest["num_levels"])

    @property
    def rl_rows(self) -> str:
        """`sft` if RL learns rows that SFT learned too, `held-out` if a later slice was kept for it."""
        return str(self.dataset["params"]["rl_rows"])

    @property
    def item_tokens(self) -> int:
        """Tokens of one item in a prompt: begin, L codes, end."""
        return self.num_levels + 2

    @property
    def prompt_length(self) -> int:
        """Most tokens of a prompt: a full history and the `<|sid_begin|>` that asks for the next item."""
        return int(self.dataset["params"]["history"]) * self.item_tokens + 1

    @property
    def example_length(self) -> int:
        """Most tokens of an SFT row: a full history and the item after it."""
        return self.prompt_length - 1 + self.item_tokens

    @property
    def sft_rows(self) -> Path:
        return self.tokenizer / "verl" / "sft.parquet"

    @property
    def num_sft_rows(self) -> int:
        return pq.read_metadata(self.sft_rows).num_rows

    def checkpoint_bytes(self, model: str | None = None) -> int:
        """At most what one checkpoint takes, in float32: weights twice (verl's and the export), two moments.

        Args:
            model: Folder of the start model; None for the tokenizer's own.
        """
        folder = Path(model) if model else self.tokenizer / "model"
        stored = sum(file.stat().st_size for file in (*folder.glob("*.safetensors"), *folder.glob("*.bin")))
        config = folder / "config.json"
        facts = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
        half = str(facts.get("dtype", facts.get("torch_dtype"))) in ("float16", "bfloat16")
        return 4 * stored * (2 if half else 1)

    @property
    def parents(self) -> dict[str, str]:
        return {"dataset": identity(self.dataset), "tokenizer": identity(self.tokenizer_manifest)}
