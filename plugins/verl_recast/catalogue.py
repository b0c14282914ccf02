"""The catalogue as the plugin needs it: trie, token ids of codes, and the set of valid semantic IDs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from recast_cli.artifacts import load_manifest
from recast_cli.core.spelling import parse
from recast_cli.core.trie import Trie
from recast_cli.vocabulary import Vocabulary


@dataclass(frozen=True)
class Catalogue:
    """Items of one tokenizer artifact.

    Attributes:
        trie: The constraint.
        level_offsets: Token id of code 0 of each level; code k of level l is token `level_offsets[l] + k`.
        pad_token_id: Token for left padding.
        members: Every semantic ID as a tuple of codes, read from the catalogue parquet and not from the
            trie, so that counting invalid rollouts does not depend on the thing it checks.
    """

    trie: Trie
    level_offsets: tuple[int, ...]
    pad_token_id: int
    members: frozenset[tuple[int, ...]]

    @property
    def num_levels(self) -> int:
        return len(self.level_offsets)

    @classmethod
    def load(cls, folder: str | Path) -> Catalogue:
        """Read a tokenizer artifact (`recast build-tokenizer`)."""
        folder = Path(folder)
        load_manifest(folder, "tokenizer")
        vocabulary = Vocabulary.load(folder / "vocabulary.json")
        sids = pl.read_parquet(folder / "semantic_ids.parquet", columns=["sid"])["sid"].to_list()
        return cls(
            trie=Trie.load(folder / "trie.npz"),
            level_offsets=vocabulary.level_offsets,
            pad_token_id=vocabulary.pad,
            members=frozenset(parse(sid) for sid in sids),
        )

    def token_ids(self, codes: np.ndarray) -> np.ndarray:
        """Codes (..., L) to token ids (..., L)."""
        return codes + np.asarray(self.level_offsets)
